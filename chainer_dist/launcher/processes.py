"""Processes that a process has started, and those that these have started, whatever session they are in.

This needs Linux, which knows the parent of each process, and can make a process the parent of orphans among
its descendants. Elsewhere nothing is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_SET_PDEATHSIG, _SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h
_IS_LINUX = sys.platform == "linux"


def adopt_orphans() -> None:
    """Become the parent of all descendants whose own parent ends. Local."""
    if _IS_LINUX:
        ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def bury_orphans(child: int) -> None:
    """Forget adopted processes that have ended. Local.

    Args:
        child: Number of a process that is left alone, as other code waits for it.
    """
    if not _IS_LINUX:
        return
    with contextlib.suppress(ChildProcessError):
        while True:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is None or ended.si_pid == child:
                return
            os.waitpid(ended.si_pid, 0)


def ended_with_parent() -> Callable[[], None] | None:
    """Return a function to call in a new child: the system kills it when this process ends. Local."""
    if not _IS_LINUX:
        return None
    prctl = ctypes.CDLL(None).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != parent:
            os._exit(1)

    return ask


def end_with_parent() -> None:
    """Have the system send this process a SIGTERM when its parent ends. Local."""
    if _IS_LINUX:
        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def descendants() -> list[int]:
    """Return the processes that descend from this one and have not ended. Local."""
    children: dict[int, list[int]] = {}
    ended = set()
    for process in Path("/proc").glob("[0-9]*") if _IS_LINUX else ():
        with contextlib.suppress(OSError):
            state, parent = (process / "stat").read_bytes().rpartition(b")")[2].split()[:2]
            children.setdefault(int(parent), []).append(int(process.name))
            if state in b"ZX":
                ended.add(int(process.name))
    found = [os.getpid()]
    for each in found:
        found += children.get(each, [])
    return [each for each in found[1:] if each not in ended]


def signal_descendants(number: int) -> bool:
    """Send a signal to them; return whether there are any. Local."""
    found = descendants()
    for each in found:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(each, number)
    return bool(found)


def kill_descendants(seconds: float) -> None:
    """Kill them, and wait until they are gone; no longer than some seconds. Local."""
    deadline = time.monotonic() + seconds
    while signal_descendants(signal.SIGKILL) and time.monotonic() < deadline:
        time.sleep(0.01)


def allow_open_files(n: int) -> None:
    """Let this process have so many open files, as far as it may. Local."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < n:
        most = n if hard == resource.RLIM_INFINITY else min(n, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

"""Memory that is freed stays with the process, unless the user has decided otherwise."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import numpy as np
import pytest

import chainer_dist
from chainer_dist import _allocator

# Prints how many pages the system hands out in a round of 40 arrays of 3 MB, after some rounds.
ROUNDS = """
import resource
import numpy as np
import chainer_dist
comm = chainer_dist.create_communicator()
for _ in range(5):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    arrays = [np.ones(3 << 18, np.float32) for _ in range(40)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 40 * (3 << 20) // os.sysconf("SC_PAGE_SIZE")

glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="is about glibc")


@glibc_only
@pytest.mark.parametrize(
    ("variables", "are_kept"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.rtld.optional_static_tls=512"}, True),
    ],
)
def test_pages_are_handed_out_once(comm, variables, are_kept):
    """The system counts them."""
    if comm.size > 1:
        pytest.skip("starts a process that is to be alone")
    environ = {key: value for key, value in os.environ.items() if key not in _allocator.VARIABLES}
    pages = int(
        subprocess.run(
            [sys.executable, "-c", ROUNDS],
            env={**environ, **variables},
            stdout=subprocess.PIPE,
            check=True,
            timeout=60,
        ).stdout
    )
    assert pages < PAGES / 20 if are_kept else pages > PAGES / 2


@glibc_only
def test_setup_does_not_stay(comm):
    """What was freed before parameters are made ready for updates goes back to the system."""
    del comm
    if not _allocator.keep_freed_memory():
        pytest.skip("the user has decided")
    arrays = [np.ones(3 << 18, np.float32) for _ in range(40)]
    held = _resident()
    del arrays
    kept = _resident()
    _allocator.release_freed_memory()
    assert kept > held - (20 << 20)
    assert _resident() < held - (80 << 20)


def _resident():
    """Return how many bytes of memory this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123 - not a file to keep
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_any_c_library_will_do(monkeypatch):
    """Where it is not glibc nothing is done."""
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert not _allocator.keep_freed_memory()
    _allocator.release_freed_memory()
    assert chainer_dist.create_communicator().size >= 1

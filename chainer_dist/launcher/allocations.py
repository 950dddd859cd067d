"""The hosts that a scheduler has given to this job: Slurm, PBS, LSF or Flux."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import TYPE_CHECKING, Any

from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.hostfiles import (
    MAX_HOSTS,
    MAX_RANKS,
    Host,
    expand,
    parse_hosts,
    read_hostfile,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["allocation"]

SECONDS_TO_ANSWER = 60

_REPEATED = re.compile(r"(\d{1,18})(?:\(x(\d{1,18})\))?", re.ASCII)
_RANGE = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?", re.ASCII)


def allocation(environ: Mapping[str, str]) -> tuple[str, list[Host]] | None:
    """Return the hosts that a scheduler has given to this job. Local.

    Args:
        environ: The environment of the process.

    Returns:
        The name of the scheduler, "Flux", "Slurm", "PBS" or "LSF", and the hosts; None outside of a job.

    Raises:
        LaunchError: If what the scheduler says cannot be read.
    """
    if "FLUX_URI" in environ:  # an instance of Flux may itself run in a job of another scheduler
        return "Flux", _from_flux(environ)
    if "SLURM_JOB_NODELIST" in environ:
        return "Slurm", _from_slurm(environ)
    if "PBS_NODEFILE" in environ:
        return "PBS", read_hostfile(environ["PBS_NODEFILE"], "PBS_NODEFILE")
    if "LSB_MCPU_HOSTS" in environ:
        return "LSF", _from_lsf(environ["LSB_MCPU_HOSTS"])
    return None


def _from_slurm(environ: Mapping[str, str]) -> list[Host]:
    try:
        names = expand(environ["SLURM_JOB_NODELIST"])
    except LaunchError as error:
        raise LaunchError(f"SLURM_JOB_NODELIST: {error}") from None
    tasks = environ.get("SLURM_TASKS_PER_NODE", f"1(x{len(names)})")
    counts: list[int] = []
    for item in tasks.split(","):
        match = _REPEATED.fullmatch(item.strip())
        if (
            not match
            or not 1 <= int(match[1]) <= MAX_RANKS
            or len(counts) + int(match[2] or 1) > MAX_HOSTS
        ):
            raise LaunchError(f"SLURM_TASKS_PER_NODE is {tasks!r}, expected a list such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    if len(counts) != len(names):
        raise LaunchError(
            f"SLURM_TASKS_PER_NODE={tasks} is for {len(counts)} hosts, "
            f"SLURM_JOB_NODELIST={environ['SLURM_JOB_NODELIST']} has {len(names)}"
        )
    return [Host(name, slots) for name, slots in zip(names, counts)]


def _from_lsf(pairs: str) -> list[Host]:
    """Read a list of hosts, each followed by its number of slots."""
    words = pairs.split()
    if not words or len(words) % 2:
        raise LaunchError(f"LSB_MCPU_HOSTS is {pairs!r}, expected hosts, each followed by a number")
    try:
        return parse_hosts(",".join(map(":".join, zip(words[::2], words[1::2]))))
    except LaunchError as error:
        raise LaunchError(f"LSB_MCPU_HOSTS is {pairs!r}: {error}") from None


def _from_flux(environ: Mapping[str, str]) -> list[Host]:
    """Ask an instance of Flux for its resources, which it describes in the format of its RFC 20."""
    flux = shutil.which("flux", path=environ.get("PATH"))
    if flux is None:
        raise LaunchError(
            "FLUX_URI is set, and there is no command flux on PATH to ask for the hosts"
        )
    command = [flux, "resource", "R"]
    try:
        answer = subprocess.run(  # noqa: S603 - the scheduler's own command
            command,
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_ANSWER,
            check=False,
            env=dict(environ),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(f"flux resource R: {error}") from None
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or [f"status {answer.returncode}"]
        raise LaunchError(f"flux resource R: {lines[-1]}")
    try:
        execution = json.loads(answer.stdout)["execution"]
        names = [name for names in execution["nodelist"] for name in expand(names)]
        slots = _slots_of_flux(execution["R_lite"])
        return [Host(name, slots[rank]) for rank, name in enumerate(names) if rank in slots]
    except (ValueError, KeyError, TypeError, LaunchError) as error:
        raise LaunchError(f"flux resource R prints what is no resource set: {error}") from None


def _slots_of_flux(entries: Any) -> dict[int, int]:
    """Return how many cores the brokers of Flux have, by their numbers, which follow the list of hosts."""
    slots: dict[int, int] = {}
    for entry in entries:
        n_cores = len(_numbers(entry["children"]["core"]))
        slots.update(dict.fromkeys(_numbers(entry["rank"]), n_cores))
    return slots


def _numbers(ranges: Any) -> list[int]:
    """Return the numbers that a list such as 0-3,7 stands for."""
    found: list[int] = []
    for each in str(ranges).split(","):
        match = _RANGE.fullmatch(each)
        if not match or int(match[2] or match[1]) - int(match[1]) >= MAX_HOSTS:
            raise ValueError(f"{ranges!r} is no list of numbers")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found

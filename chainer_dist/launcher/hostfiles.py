"""The hosts of a job, and the number of ranks that each takes.

Hosts come from the command line, from a file in the format of MPICH or of Open MPI, or from the
scheduler: see :mod:`~chainer_dist.launcher.allocations`.
"""

from __future__ import annotations

import math
import re
from argparse import ArgumentTypeError
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chainer_dist._arguments import positive
from chainer_dist.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

__all__ = [
    "Host",
    "expand",
    "most_slots",
    "n_slots",
    "parse_hostfile",
    "parse_hosts",
    "read_hostfile",
]

_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_SETTING = re.compile(r"([\w-]+)\s*=\s*(\S+)")
_RANGE = re.compile(r"(\d{1,18})(?:-(\d{1,18}))?", re.ASCII)
# A slip such as node[1-10000000000] should not fill the memory, nor a device that is named as a hostfile.
MAX_HOSTS = 100_000
MAX_RANKS = 1_000_000
MAX_CHARACTERS = 10_000_000


class Host(NamedTuple):
    """A machine.

    Attributes:
        name: Name or address by which ``mpiexec`` reaches it.
        slots: Number of ranks that it takes, at least 1.
        max_slots: Largest number of ranks where there are more ranks than slots; None is any number.
    """

    name: str
    slots: int = 1
    max_slots: int | None = None


def n_slots(hosts: Iterable[Host]) -> int:
    """Return how many ranks the hosts take together. Local."""
    return sum(host.slots for host in hosts)


def most_slots(hosts: Iterable[Host]) -> float:
    """Return how many ranks the hosts take at most, infinity if one of them takes any number. Local."""
    return sum(math.inf if host.max_slots is None else host.max_slots for host in hosts)


def parse_hostfile(text: str, source: str) -> list[Host]:
    """Read a hostfile. Local.

    A line is a host in MPICH's format, ``node1:4``, or in Open MPI's, ``node1 slots=4 max_slots=8``
    (``max-slots`` too), whichever MPI will be used. A host alone takes one rank, and one that is
    named again takes more. ``node[01-03,7]`` stands for four hosts. ``#`` begins a comment.

    Args:
        text: Content of the file.
        source: Name of the file, for the error.

    Returns:
        The hosts in the order of the file, each once, at least one.

    Raises:
        LaunchError: If a line is in neither format; it names the file and the line.
    """
    hosts = []
    for number, line in enumerate(text.split("\n"), 1):
        words = line.partition("#")[0].strip()
        try:
            hosts += _parse_line(words) if words else []
        except LaunchError as error:
            raise LaunchError(f"{source}, line {number}: {error}") from None
    if not hosts:
        raise LaunchError(f"{source} names no host; a line is node1:4 or node1 slots=4")
    return _merged(hosts)


def parse_hosts(text: str) -> list[Host]:
    """Read hosts from one line: ``node1:4,node2:4``, ``node[1-2]:4``. Local.

    Returns:
        The hosts in that order, each once, at least one.

    Raises:
        LaunchError: If it cannot be read.
    """
    try:
        return _merged([host for item in _split(text) for host in _parse_line(item.strip())])
    except LaunchError as error:
        raise LaunchError(f"hosts {text!r}: {error}") from None


def expand(nodelist: str) -> list[str]:
    """Return the names that a list in Slurm's notation stands for. Local.

    Args:
        nodelist: Such as ``login,node[01-03,7],rack[1-2]n[0-9]``; leading zeros are kept.

    Returns:
        The names in that order, repeated ones included.

    Raises:
        LaunchError: If it cannot be read.
    """
    names: list[str] = []
    for item in _split(nodelist):
        names += _expand_item(item.strip())
        if len(names) > MAX_HOSTS:
            raise LaunchError(f"{nodelist!r} are more than {MAX_HOSTS:,} hosts")
    return names


def read_hostfile(file: str, variable: str = "") -> list[Host]:
    """Read the hostfile of that name; see :func:`parse_hostfile`. Local.

    Args:
        file: Name of the file.
        variable: Name of the environment variable that has the file's name, for errors.

    Raises:
        LaunchError: If it is not there or cannot be read.
    """
    if variable:
        return parse_hostfile(_read(file, f"{variable}: {file}"), f"{variable} {file}")
    return parse_hostfile(_read(file, f"hostfile {file}"), file)


def _read(file: str, what: str) -> str:
    try:
        with Path(file).open(encoding="utf-8-sig") as lines:
            text = lines.read(MAX_CHARACTERS)
            if lines.read(1):
                raise LaunchError(f"{what}: it is too long to be a list of hosts")
    except (OSError, ValueError) as error:  # of a name, or of what cannot be decoded
        raise LaunchError(f"{what}: {getattr(error, 'strerror', None) or error}") from None
    return text


def _parse_line(words: str) -> list[Host]:
    first, *rest = words.split(maxsplit=1) or [""]
    names, colon, count = first.rpartition(":")
    settings = rest[0] if rest else ""
    if not colon:
        names, count = first, "1"
    elif settings:
        raise LaunchError(f"{words!r} is neither node1:4 nor node1 slots=4")
    given = dict(_SETTING.findall(settings))
    left = _SETTING.sub("", settings).strip()
    unknown = [left] if left else sorted({*given} - {"slots", "max_slots", "max-slots"})
    if unknown:
        raise LaunchError(
            f"{unknown[0]!r} is not known; after the host may follow slots= and max_slots="
        )
    slots = _count(given.get("slots", count), "slots")
    most = given.get("max_slots", given.get("max-slots"))
    max_slots = None if most is None else _count(most, "max_slots")
    if max_slots is not None and max_slots < slots:
        raise LaunchError(f"max_slots={max_slots} is less than slots={slots}")
    return [Host(name, slots, max_slots) for name in expand(names)]


def _count(text: str, what: str) -> int:
    try:
        number = positive(text)
    except ArgumentTypeError:
        raise LaunchError(f"{what} are a number from 1 up, not {text!r}") from None
    if number > MAX_RANKS:
        raise LaunchError(f"{what} are {MAX_RANKS:,} at most, not {text}")
    return number


def _merged(hosts: list[Host]) -> list[Host]:
    """Return each host once, with the sum of its slots."""
    merged: dict[str, Host] = {}
    for host in hosts:
        before = merged.get(host.name, Host(host.name, 0, 0))
        most = (before.max_slots, host.max_slots)
        merged[host.name] = Host(
            host.name,
            before.slots + host.slots,
            None if None in most else sum(number or 0 for number in most),
        )
    return list(merged.values())


def _split(text: str) -> Iterator[str]:
    """Split at the commas outside of brackets."""
    depth, item = 0, ""
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            yield item
            item = ""
        else:
            item += letter
    yield item


def _expand_item(item: str) -> list[str]:
    names = [""]
    for part in re.split(r"(\[[^][]*\])", item):
        ends = _expand_ranges(part[1:-1]) if part.startswith("[") else [part]
        if len(names) * len(ends) > MAX_HOSTS:
            raise LaunchError(f"{item!r} are more than {MAX_HOSTS:,} hosts")
        names = [name + end for name in names for end in ends]
    for name in names:
        if not _NAME.fullmatch(name):
            raise LaunchError(f"{item!r} is no host; hosts are node1 or node[01-03,7]")
    return names


def _expand_ranges(ranges: str) -> list[str]:
    numbers: list[str] = []
    for item in ranges.split(","):
        match = _RANGE.fullmatch(item.strip())
        if not match:
            raise LaunchError(f"[{ranges}] is no list of numbers and ranges such as [01-03,7]")
        first, last = match[1], match[2] or match[1]
        if int(last) < int(first):
            raise LaunchError(f"[{ranges}]: {first}-{last} runs backward")
        if int(last) - int(first) >= MAX_HOSTS:
            raise LaunchError(f"[{ranges}] are more than {MAX_HOSTS:,} hosts")
        numbers += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return numbers

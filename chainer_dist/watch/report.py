"""Reports of a stall: which ranks have come to an operation, which have not, and what the missing ranks do."""

from __future__ import annotations

import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist.collectives import operation
from chainer_dist.collectives.frames import calls_user_code, user_line
from chainer_dist.watch.inquiry import Silence

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from chainer_dist.collectives.operation import Operation
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.watch.address import Address

_MOST = 24  # lines, and stacks, that a report shows
_MOST_FRAMES = 60  # innermost ones of a thread
_MOST_CHARACTERS = 100_000  # of all stacks of a rank

OWN_THREADS = "chainer_dist watch"


class _Line(NamedTuple):
    text: str
    has_come: bool
    is_known: bool = True  # whether this rank knows if the other one has come


def find_wait(stack: Sequence[Operation]) -> Operation | None:
    """Return the outermost operation of a thread in which it may wait for other ranks."""
    return next((each for each in stack if each.kind.waits), None)


def answer(comm: CommunicatorBase | None, *, full: bool) -> dict[str, Any]:
    """Return what this rank does, for a report of another rank. Local, from any thread.

    Args:
        comm: The communicator of the report; None if this rank no longer has it.
        full: Whether the answer has Python stacks.
    """
    now = time.perf_counter()
    frames = sys._current_frames()  # noqa: SLF001 - Python's
    stacks = operation.stacks()
    found: dict[str, Any] = {"knows": comm is not None, "number": 0, "recent": [], "waits": None}
    if comm is not None:
        found["number"] = comm.operation_log.number
        found["recent"] = list(comm.operation_log.recent)
    for thread, stack in stacks.items():
        wait = next((each for each in stack if each.comm is comm), None)
        if wait is not None and comm is not None:
            inner = "" if stack[-1] is wait else stack[-1].describe()
            found["waits"] = {
                "name": wait.kind.name,
                "text": wait.describe(),
                "number": wait.number,
                "inner": inner,
                "seconds": now - wait.begun,
                "line": user_line(frames.get(thread)),
                "busy": calls_user_code(frames.get(thread)),
            }
    main = threading.main_thread().ident or 0
    found["now"] = _now(stacks.get(main, []), user_line(frames.get(main)), now)
    if full:
        found["stacks"] = _stacks_text(frames)
    return found


def _now(stack: Sequence[Operation], line: str, now: float) -> str:
    wait = find_wait(stack)
    if wait is not None:
        which = f", operation {wait.number}," if wait.number else ""
        return (
            f"in {wait.describe()}{which} of {_communicator(wait)} for {now - wait.begun:.0f} s, "
            f"at {line}"
        )
    within = f" but in {stack[-1].describe()}" if stack else ""
    return f"in no collective{within}, at {line}"


def _communicator(wait: Operation) -> str:
    comm: Any = wait.comm
    return f"the {comm.name} communicator of {len(comm.operation_log.peers)} ranks"


def _stacks_text(frames: Mapping[int, Any]) -> str:
    names = {each.ident: each.name for each in threading.enumerate()}
    main = threading.main_thread().ident
    text = []
    for thread in sorted(frames, key=lambda each: each != main):
        name = names.get(thread, "unknown")
        if not name.startswith(OWN_THREADS):
            text += [f"  {name}:\n", *traceback.format_stack(frames[thread], _MOST_FRAMES)]
    return "".join(text)[:_MOST_CHARACTERS]


def compose(wait: Operation, answers: Sequence[Any]) -> tuple[str, str]:
    """Return the ranks that a rank waits for, and what all ranks do, both in words. Local.

    Args:
        wait: The operation in which this rank waits.
        answers: Answers of all ranks of its communicator; stacks are shown where an answer has them.
    """
    comm: Any = wait.comm
    log = comm.operation_log
    lines = [_line(wait, each) for each in answers]
    peer = None if wait.kind.is_collective else _peer(wait, len(answers))
    if peer is None:
        missing = [rank for rank, line in enumerate(lines) if not line.has_come]
        # A rank that cannot be asked is named only if all others have come.
        missing = [rank for rank in missing if lines[rank].is_known] or missing
    else:
        missing = [peer]
    which = f", operation {wait.number}" if wait.number else ""
    waits_for = _ranks(missing) if missing else "its end: all ranks have come to it"
    head = (
        f"rank {log.rank} in {wait.describe()}{which} of {_communicator(wait)}, "
        f"which waits for {waits_for}"
    )
    text = []
    grouped: dict[str, list[int]] = {}
    for rank, line in enumerate(lines):
        who = "" if line.has_come else _process(log.peers[rank], rank)
        grouped.setdefault(f"{who}{line.text}", []).append(rank)
    text += _most([f"  {_ranks(ranks)}{line}" for line, ranks in grouped.items()])
    order = [*missing, *(rank for rank, line in enumerate(lines) if line.has_come)]
    stacks: dict[str, list[int]] = {}
    for rank in order:
        if not isinstance(answers[rank], Silence) and "stacks" in answers[rank]:
            stacks.setdefault(answers[rank]["stacks"].rstrip("\n"), []).append(rank)
    text += _most([f"Stacks of {_ranks(ranks)}:\n{stack}" for stack, ranks in stacks.items()])
    return head, "\n".join(text) + "\n"


def _line(wait: Operation, answered: Any) -> _Line:
    """Return whether a rank has come to the operation, and what it does in words."""
    if isinstance(answered, Silence):
        return _Line(f": {answered.text}", has_come=False, is_known=answered.is_reason)
    waits, number = answered["waits"], wait.number
    if not number:  # a message: every rank does something else
        return _Line(
            f": {answered['now']}", has_come=bool(waits and waits["text"] == wait.describe())
        )
    if waits and waits["number"] == number:
        return _line_within(wait, waits)
    now = f"now {answered['now']}"
    if answered["number"] < number:
        known = "has not come" if answered["knows"] else "has finalized the communicator"
        last = f" (its last is operation {answered['number']})" if answered["number"] else ""
        return _Line(f": {known}{last}; {now}", has_come=False)
    done = dict(map(tuple, answered["recent"])).get(number, wait.kind.name)
    if done == wait.kind.name:
        return _Line(f": has done its part; {now}", has_come=True)
    return _Line(f": has done another operation {number}, {done}; {now}", has_come=False)


def _line_within(wait: Operation, waits: dict[str, Any]) -> _Line:
    """Return the same for a rank that is in an operation of the same number."""
    inner = f" ({waits['inner']})" if waits["inner"] else ""
    if waits["name"] == wait.kind.name:
        # A rank that runs code of the user within the operation keeps the others waiting.
        return _Line(f": has come, at {waits['line']}{inner}", has_come=not waits.get("busy"))
    where = f"{waits['text']}{inner}, at {waits['line']}"
    return _Line(f": is in another operation {wait.number}: {where}", has_come=False)


def _peer(wait: Operation, size: int) -> int | None:
    """Return the rank to or from which a message goes, or None if that may be any."""
    arguments = wait.arguments()
    peer = arguments.get("source", arguments.get("dest"))
    return peer if isinstance(peer, int) and 0 <= peer < size else None


def _process(address: Address | None, rank: int) -> str:
    if address is None:
        return ""
    job = f"rank {address.job_rank} of the job, " if address.job_rank != rank else ""
    return f" ({job}{address.describe()})"


def _ranks(ranks: Iterable[int]) -> str:
    """Return ranks in words, consecutive ones as a range."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]
    several = len(runs) > 1 or len(runs[0]) > 1
    return f"rank{'s' if several else ''} {', '.join(parts)}"


def _most(lines: list[str]) -> list[str]:
    more = len(lines) - _MOST
    return lines if more <= 0 else [*lines[:_MOST], f"  ... and {more} more"]

"""What ranks compare before they set up an update, and before they average parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from chainer_dist.collectives.agreement import agree, digest, raise_mismatch

if TYPE_CHECKING:
    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.parameters import ParameterSet

__all__ = ["Lines", "check_same", "describe_states"]

Lines = list[tuple[str, str]]  # what is compared: subject and description


def check_same(comm: CommunicatorBase, lines: Lines) -> None:
    """Raise on every rank if the ranks' descriptions differ. Collective.

    Args:
        comm: The communicator whose ranks compare.
        lines: Subjects, unique within a rank, and this rank's descriptions.

    Raises:
        RankMismatchError: On every rank, naming the rank and the subject.
    """
    if not all(agree(comm, digest(lines))):
        raise_mismatch(comm, lines)


def describe_states(parameters: ParameterSet) -> Lines:
    """Describe the state of all update rules, which must be of the same kind on every rank. Local."""
    found = []
    for name, param in parameters.all.items():
        rule = param.update_rule
        if rule is not None:
            kept = "not there" if rule.state is None else ", ".join(rule.state) or "empty"
            found.append((f"the state of {name}", f"{kept} (after {rule.t} updates)"))
    return found

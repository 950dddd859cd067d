"""Descriptions that ranks compare before they prepare an update, and before they average parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from chainer_dist.parameters import ParameterSet

__all__ = ["Lines", "describe_states"]

Lines = list[tuple[str, str]]  # subjects and descriptions


def describe_states(parameters: ParameterSet) -> Lines:
    """Describe the state of all update rules, which must be of the same kind on every rank. Local."""
    found = []
    for name, param in parameters.all.items():
        rule = param.update_rule
        if rule is not None:
            kept = "not there" if rule.state is None else ", ".join(rule.state) or "empty"
            found.append((f"the state of {name}", f"{kept} (after {rule.t} updates)"))
    return found

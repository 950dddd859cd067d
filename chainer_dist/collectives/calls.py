"""A check that the arguments of a call are in the right order.

It is made before anything is communicated, as such a mistake is in the script, and so on every rank.
"""

from __future__ import annotations

from typing import Any

__all__ = ["check_call", "is_communicator"]

_LONGEST = 60  # most characters of an argument in a message


def is_communicator(value: Any) -> bool:
    """Return whether an object has the attributes of a communicator: ``rank``, ``size`` and ``bcast_obj``. Local."""
    return not isinstance(value, type) and all(
        hasattr(value, name) for name in ("rank", "size", "bcast_obj")
    )


def check_call(call: str, comm: Any, *others: Any, needs: str | None = None) -> None:
    """Check that a call has a communicator as the right argument, and as no other one. Local.

    Args:
        call: The call as it is written, such as ``"scatter_dataset(dataset, comm)"``. The communicator is its first
            or last argument.
        comm: The value of the communicator's argument.
        others: The values of the other arguments, in their order.
        needs: Name of a method or attribute that the first of ``others`` must have.

    Raises:
        TypeError: If an argument is in the wrong place; the message has the value of each argument.
    """
    lacks = needs is not None and (isinstance(others[0], type) or not hasattr(others[0], needs))
    if is_communicator(comm) and not lacks and not any(map(is_communicator, others)):
        return
    names = call.rstrip(")").partition("(")[2].split(", ")
    values = [comm, *others] if names[0].startswith("comm") else [*others, comm]
    given = ", ".join(f"{name}={_brief(value)}" for name, value in zip(names, values))
    hint = ""
    if any(map(is_communicator, others)) and not is_communicator(comm):
        hint = "; the arguments stand in the wrong order"
    elif lacks:
        first = names[1] if names[0].startswith("comm") else names[0]
        hint = f"; {first} must be an object with {needs}()"
    elif not is_communicator(comm):
        hint = "; a communicator is what chainer_dist.create_communicator() returns"
    raise TypeError(f"the call is {call}, and this one has {given}{hint}")


def _brief(value: Any) -> str:
    if is_communicator(value):
        return "a communicator"
    if value is None or isinstance(value, (str, int, float)):
        return repr(value) if len(repr(value)) <= _LONGEST else f"{repr(value)[:_LONGEST]}..."
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an object of {type(value).__name__}"

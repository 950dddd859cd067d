"""What users pass to a checkpoint, checked. Nothing here communicates."""

from __future__ import annotations

from typing import Any

from chainer_dist._counts import checked_count

__all__ = ["describe_options"]


def describe_options(
    keep: Any, asynchronous: Any, on_error: Any, preemption: Any, allow_pickle: Any
) -> list[tuple[str, str]]:
    """Return names and values of options that are the same on all ranks, or raise what is wrong with one. Local."""
    keep = checked_count("keep", keep, 1)
    if on_error not in ("raise", "warn"):
        raise ValueError(f"on_error is {on_error!r}, expected 'raise' or 'warn'")
    return [
        ("keep", str(keep)),
        ("asynchronous", str(bool(asynchronous))),
        ("on_error", on_error),
        ("preemption", str(bool(preemption))),
        ("allow_pickle", str(bool(allow_pickle))),
    ]

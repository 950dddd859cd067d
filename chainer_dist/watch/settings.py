"""Settings of watching, from environment variables."""

from __future__ import annotations

import math
import os
from typing import NamedTuple

from chainer_dist import _environment

_WARN_SECONDS = 60.0


class Settings(NamedTuple):
    """How this rank is watched.

    Attributes:
        warn: Seconds after which a stall is reported, or None for never.
        abort: Seconds after which a stall ends the job, or None for never.
        checked: Whether collectives are compared before they run.
        timeline: The file that a timeline is written to, or None for none.
        stacks: Whether every report of a stall has stacks; otherwise only the one that ends the job.
    """

    warn: float | None
    abort: float | None
    checked: bool
    timeline: str | None
    stacks: bool = False

    @property
    def limits(self) -> tuple[float, ...]:
        """The seconds after which a stall is reported or ends the job, shortest first."""
        return tuple(sorted(each for each in (self.warn, self.abort) if each is not None))


def from_environment() -> Settings:
    """Return the settings of this process. Local.

    Raises:
        ValueError: If a variable has a wrong value; it names the variable.
    """
    return Settings(
        warn=_seconds(_environment.STALL_WARN, _WARN_SECONDS),
        abort=_seconds(_environment.STALL_ABORT, None),
        checked=_switch(_environment.CHECKED),
        timeline=os.environ.get(_environment.TIMELINE) or None,
        stacks=_switch(_environment.STALL_STACKS),
    )


def _seconds(name: str, default: float | None) -> float | None:
    text = os.environ.get(name, "")
    if not text:
        return default
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise ValueError(f"{name} is {text!r}, expected seconds, or 0 for never")
    return seconds or None


def _switch(name: str) -> bool:
    text = os.environ.get(name, "")
    if text not in ("", "0", "1"):
        raise ValueError(f"{name} is {text!r}, expected 0 or 1")
    return text == "1"

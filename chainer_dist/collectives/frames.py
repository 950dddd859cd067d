"""The line of a user's script that a frame or an error belongs to."""

from __future__ import annotations

import os
import sysconfig
import traceback
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import FrameType


# Packages whose frames are not part of a user's script.
_OWN_PACKAGES = ("chainer_dist", "chainer", "mpi4py")
_PYTHON = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = tuple(f"{_PYTHON}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


def user_line(frame: FrameType | None) -> str:
    """Return ``file:line in function`` of the innermost frame outside chainer_dist and Chainer. Local."""
    innermost = frame
    while frame is not None:
        if not _is_own(frame):
            return _line(frame, frame.f_lineno)
        frame = frame.f_back
    return "an unknown line" if innermost is None else _line(innermost, innermost.f_lineno)


def calls_user_code(frame: FrameType | None) -> bool:
    """Return whether chainer_dist is calling foreign code in this frame. Local.

    The standard library does not count, since chainer_dist itself waits by its means.
    """
    found = False
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] == "chainer_dist":
            return found
        found = found or not (_is_own(frame) or _is_of_python(frame))
        frame = frame.f_back
    return False


def raising_line(error: BaseException) -> str:
    """Return the line that raised an error, in the form of :func:`user_line`. Local."""
    lines = list(traceback.walk_tb(error.__traceback__))
    users = [each for each in lines if not _is_own(each[0])]
    return _line(*(users or lines)[-1]) if lines else "an unknown line"


def _is_of_python(frame: FrameType) -> bool:
    file = frame.f_code.co_filename
    inside = file.startswith(("<frozen ", _PYTHON))
    return inside and not file.startswith(_PACKAGES)


def _is_own(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).partition(".")[0] in _OWN_PACKAGES


def _line(frame: FrameType, number: int) -> str:
    return f"{frame.f_code.co_filename}:{number} in {frame.f_code.co_name}"

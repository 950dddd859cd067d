"""The environment variables of this package, in one place, and what a misspelt one may have meant.

Nothing here imports anything that the launcher would have to wait for.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["PREFIX", "misspelt"]

PREFIX = "CHAINER_DIST_"

# Set by users.
ABORT_ON_EXCEPTION = "CHAINER_DIST_ABORT_ON_EXCEPTION"  # 0: an exception does not end the job
AS_CHAINERMN = "CHAINER_DIST_AS_CHAINERMN"  # 1: `import chainermn` imports this package
CHECKED = "CHAINER_DIST_CHECKED"  # 1: compare collectives
DISTRIBUTE = "CHAINER_DIST_DISTRIBUTE"  # 1, rank or global: make an unmodified script data-parallel
KERNELS = "CHAINER_DIST_KERNELS"  # which kernels compute forward and backward
ONEDNN = "CHAINER_DIST_ONEDNN"  # path of the library of oneDNN
PIN = "CHAINER_DIST_PIN"  # 0: do not bind ranks to cores
STALL_ABORT = "CHAINER_DIST_STALL_ABORT"  # seconds after which a stall ends the job
STALL_STACKS = "CHAINER_DIST_STALL_STACKS"  # 1: reports of a stall have the stacks of the ranks
STALL_WARN = "CHAINER_DIST_STALL_WARN"  # seconds after which a stall is reported
TIMELINE = "CHAINER_DIST_TIMELINE"  # file in which the ranks write their timeline

# Set by the launcher, and read by ranks and their monitors.
ADDRESS = "CHAINER_DIST_ADDRESS"  # at which other hosts reach this one
CALL = "CHAINER_DIST_CALL"  # secret and address from which a rank fetches the function that it runs
CAUSE = "CHAINER_DIST_CAUSE"  # file in which a script says why it ends
FORKSERVER_OF = "CHAINER_DIST_FORKSERVER_OF"  # the process whose fork server this is
IGNORED = "CHAINER_DIST_IGNORED"  # numbers of the signals that the launcher was started to ignore
LAUNCHER = "CHAINER_DIST_LAUNCHER"  # a secret, and addresses and ports of the launcher
NOTES = "CHAINER_DIST_NOTES"  # file in which a script notes what it has to do with other ranks
PROGRESS = "CHAINER_DIST_PROGRESS"  # file in which a script writes how far it has come
RESTART = "CHAINER_DIST_RESTART"  # how often the job has been started again

_NAMES = sorted(
    value
    for value in [*globals().values()]
    if isinstance(value, str) and value[:13] == PREFIX != value
)


def misspelt(environ: Mapping[str, str]) -> list[str]:
    """Return a sentence for each variable with our prefix that has no meaning. Local.

    Args:
        environ: The environment of a process.
    """
    found = []
    for name in sorted(environ):
        if (
            name.upper().startswith(PREFIX)
            and name not in _NAMES
            and not name.startswith(f"{PREFIX}TEST_")
        ):
            ends = [each[len(PREFIX) :] for each in _NAMES]
            close = difflib.get_close_matches(name[len(PREFIX) :].upper(), ends, n=1)
            hint = (
                f"did you mean {PREFIX}{close[0]}?" if close else f"known are {', '.join(_NAMES)}"
            )
            found.append(f"the environment variable {name} has no meaning; {hint}")
    return found

"""Chainer's forward and backward computations on CPUs, made faster without a change in a script.

Chainer computes a convolution by copying its input into columns, and a recurrent network step by step with many small
products. The functions here stand in the place of those, with oneDNN where it is found (convolutions, pooling,
normalization) and with NumPy where that is enough (recurrent networks). Graphs stay Chainer's: only the computation
inside of a function changes, and results are Chainer's up to rounding. What a kernel has no way for (float16, float64,
empty arrays, unusual strides) Chainer's own code computes.

``import chainer_dist`` puts them in; :func:`use` chooses, and so does the environment variable
``CHAINER_DIST_KERNELS``. Nothing in this package knows of ranks.

A new kernel is a function in one of these files, decorated with
``replacements.replaces``; a new family is a file and one word in ``_FAMILIES``.
"""

from __future__ import annotations

import importlib
import os
from typing import NamedTuple

from chainer_dist.kernels import replacements
from chainer_dist.kernels.shared_library import OneDNNError, library

__all__ = ["OneDNNError", "Status", "status", "use"]

VARIABLE = "CHAINER_DIST_KERNELS"

_NAMES = ("onednn", "numpy", "chainer")
CHOICES = ("auto", *_NAMES)

_FAMILIES = (
    "activation",
    "batch_normalization",
    "checks",
    "convolution",
    "dropout",
    "embed_id",
    "get_item",
    "group_normalization",
    "layer_normalization",
    "linear",
    "local_response_normalization",
    "n_step_rnn",
    "pooling",
    "softmax",
    "stateful_gru",
    "stateful_lstm",
    "sum",
    "unpooling",
)


class Status(NamedTuple):
    """What computes forward and backward.

    Attributes:
        name: ``onednn``, ``numpy`` or ``chainer``.
        text: The same for people: the version of oneDNN, its instruction set and where it was found, or why
            it is not used.
    """

    name: str
    text: str


_status = Status("chainer", "Chainer's own code; no kernels were asked for yet")


def status() -> Status:
    """Return what computes forward and backward in this process. Local."""
    return _status


class use:  # noqa: N801 - it is called like a function, as chainer.using_config is
    """Choose what computes forward and backward, in this process. Local.

    Acts at once and stays so; used as a context manager, what was chosen before is put back at its end::

        chainer_dist.kernels.use("numpy")
        with chainer_dist.kernels.use("chainer"):
            ...

    A graph may be made with one choice and differentiated with another.

    Args:
        name: ``onednn``: oneDNN, and NumPy where that is faster. ``numpy``: the kernels that need NumPy alone.
            ``chainer``: Chainer's own code, untouched. ``auto``: ``onednn`` where it is found, else ``numpy``.

    Raises:
        ValueError: For another name.
        OneDNNError: If ``onednn`` is asked for and cannot be used; the message says why.
    """

    def __init__(self, name: str = "auto") -> None:
        self._before = _status
        _choose(name)

    def __enter__(self) -> None:
        """Leave the choice as it is."""

    def __exit__(self, *exception: object) -> None:
        """Choose again what was chosen before."""
        _choose(self._before.name, self._before)


def _choose(name: str, known: Status | None = None) -> None:
    global _status  # noqa: PLW0603 - one choice for the process
    if name not in CHOICES:
        raise ValueError(f"kernels are {', '.join(_NAMES)} or auto, got {name!r}")
    reason = {
        "numpy": "NumPy, as was asked for",
        "chainer": "Chainer's own code, as was asked for",
    }.get(name, "")
    if name in ("onednn", "auto"):
        try:
            opened = library()
            name = "onednn"
            reason = f"oneDNN {opened.version} ({opened.instructions}), {opened.path}"
        except OneDNNError as error:
            if name == "onednn":
                raise
            name, reason = "numpy", f"NumPy, as oneDNN cannot be used: {error}"
    for family in _FAMILIES:
        importlib.import_module(f"{__name__}.{family}")
    if name == "chainer":
        replacements.take_out()
    else:
        replacements.put(with_onednn=name == "onednn")
    _status = known or Status(name, reason)


def use_default() -> None:
    """Choose what the environment asks for, or the best there is. Local.

    ``CHAINER_DIST_KERNELS`` has the names of :func:`use`. ``CHAINER_USE_IDEEP=never`` asked Chainer for its own code,
    and does so here.

    Raises:
        ValueError: If the variable has another value.
    """
    try:
        _choose(asked_for())
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None


def asked_for() -> str:
    """Return the choice that the environment asks for, see :func:`use_default`; ``auto`` where it does not. Local."""
    without = os.environ.get("CHAINER_USE_IDEEP") == "never"
    return os.environ.get(VARIABLE, "chainer" if without else "auto")


def _after_fork() -> None:
    """Do without oneDNN in a child that was forked, since OpenMP's threads are not there."""
    if _status.name == "onednn":
        _choose("numpy", Status("numpy", "NumPy, as this process was forked from one with oneDNN"))


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

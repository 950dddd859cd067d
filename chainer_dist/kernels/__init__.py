"""Chainer's forward and backward computations on CPUs, made faster without a change in a script.

Chainer computes a convolution by copying its input into columns, and a recurrent network step by step with many small
products. The kernels of this package replace that code: by oneDNN where the library is found (convolutions, pooling,
normalization), and by NumPy where that is enough (recurrent networks). Graphs stay Chainer's: only the computation
inside a function changes, and results equal Chainer's up to rounding. Chainer's own code still computes everything
that a kernel does not support: float16, float64, empty arrays and unusual strides.

``import chainer_dist`` installs the kernels. :func:`use` and the environment variable ``CHAINER_DIST_KERNELS`` choose
among them. Nothing in this package uses MPI.

A new kernel is a function in one of these files, decorated with
``replacements.replaces``; a new family is a file and one word in ``_FAMILIES``.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import NamedTuple

from chainer_dist.kernels import replacements, shared_library
from chainer_dist.kernels.shared_library import OneDNNError, forbid_after_fork, library

__all__ = ["OneDNNError", "Status", "status", "use"]

VARIABLE = "CHAINER_DIST_KERNELS"

_NAMES = ("onednn", "numpy", "chainer")
CHOICES = ("auto", *_NAMES)

_FAMILIES = (
    "activation",
    "adam",
    "add",
    "apply",
    "backward",
    "batch_normalization",
    "checks",
    "concat",
    "convolution",
    "dropout",
    "embed_id",
    "get_item",
    "group_normalization",
    "layer_normalization",
    "linear",
    "local_response_normalization",
    "lstm_units",
    "n_step_rnn",
    "pooling",
    "softmax",
    "stateful_gru",
    "stateful_lstm",
    "sum",
    "unpooling",
    "views",
)


class Status(NamedTuple):
    """The implementation that computes forward and backward.

    Attributes:
        name: ``onednn``, ``numpy`` or ``chainer``.
        text: Description for people: version, instruction set and path of oneDNN, or the reason why it is not used.
    """

    name: str
    text: str


_status = Status("chainer", "Chainer's own code; no kernels were asked for yet")


def status() -> Status:
    """Return the implementation that computes forward and backward in this process. Local."""
    return _status


class use:  # noqa: N801 - it is called like a function, as chainer.using_config is
    """Choose the implementation that computes forward and backward in this process. Local.

    The choice takes effect at once, and lasts. A context manager restores the previous choice at its end::

        chainer_dist.kernels.use("numpy")
        with chainer_dist.kernels.use("chainer"):
            ...

    A graph may be made with one choice and differentiated with another.

    Args:
        name: Name of the implementation. ``onednn`` stands for oneDNN, and NumPy where that is faster; ``numpy`` for
            the kernels that need NumPy alone; ``chainer`` for Chainer's own code. ``auto`` is ``onednn`` where the
            library is found, and otherwise ``numpy``.

    Raises:
        ValueError: If the name is none of these.
        OneDNNError: If ``onednn`` is asked for and cannot be used; the message has the reason.
    """

    def __init__(self, name: str = "auto") -> None:
        self._before = _status
        _choose(name)

    def __enter__(self) -> None:
        """Leave the choice as it is."""

    def __exit__(self, *exception: object) -> None:
        """Restore the previous choice."""
        if self._before.name == "onednn":
            _choose("auto")  # a process that was forked meanwhile has no oneDNN
        else:
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
    """Choose the implementation that the environment asks for, or else the fastest one available. Local.

    ``CHAINER_DIST_KERNELS`` takes the names that :func:`use` takes. ``CHAINER_USE_IDEEP=never``, by which scripts ask
    Chainer for its own code, means ``chainer``. A library that ``CHAINER_DIST_ONEDNN`` names and that cannot be used is
    a RuntimeWarning.

    Raises:
        ValueError: If ``CHAINER_DIST_KERNELS`` has another value.
    """
    try:
        _choose(asked_for())
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None
    if (
        asked_for() == "auto"
        and status().name == "numpy"
        and os.environ.get(shared_library.VARIABLE)
    ):
        warnings.warn(
            f"{shared_library.VARIABLE} is of no use here: {status().text}",
            RuntimeWarning,
            stacklevel=2,
        )


def asked_for() -> str:
    """Return the name that the environment asks for, as :func:`use_default` takes it; ``auto`` by default. Local."""
    without = os.environ.get("CHAINER_USE_IDEEP") == "never"
    return os.environ.get(VARIABLE, "chainer" if without else "auto")


def _after_fork() -> None:
    """Choose NumPy in the place of oneDNN in a child process. Local."""
    forbid_after_fork()
    if _status.name == "onednn":
        _choose("auto")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

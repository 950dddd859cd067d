"""Averaging the persistent values of a model, such as running statistics, over all ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from chainer.training import extension

from chainer_dist import _chainer
from chainer_dist.collectives.agreement import check_same
from chainer_dist.collectives.calls import check_call

if TYPE_CHECKING:
    import chainer

    from chainer_dist.communicators import CommunicatorBase


class AllreducePersistent(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """Replaces the float persistent values of a model by their means over the ranks.

    The same as ChainerMN's extension. With it the running mean and variance of BatchNormalization are
    nearly the statistics of all ranks' samples: the mean of variances leaves out how
    far the ranks' means lie apart, which :class:`~chainer_dist.links.MultiNodeBatchNormalization`
    does not. To be called before the model is evaluated or saved: by default once an epoch, before
    evaluators.

    Float arrays of any dtype, shape and layout are changed in place, floats and NumPy's float
    scalars replaced. All else (integers, strings, None) is left alone.

    For example::

        trainer.extend(chainer_dist.extensions.AllreducePersistent(model, comm))

    Args:
        model: A link on each rank, whose persistent values have the same names and types.
        comm: Communicator.
    """

    trigger = 1, "epoch"
    priority = extension.PRIORITY_WRITER + 1

    def __init__(self, model: chainer.Link, comm: CommunicatorBase) -> None:
        check_call("AllreducePersistent(model, comm)", comm, model, needs="namedlinks")
        self.model = model
        self.comm = comm

    def __call__(self, trainer: chainer.training.Trainer | None = None) -> None:
        """Average. Collective: in a Trainer, let it run in the same iteration on every rank.

        Raises:
            RankMismatchError: On every rank, naming rank and value, if names or types differ.
            TypeError: On every rank, if an array is not NumPy's.
        """
        del trainer
        persistents = sorted(persistent_values(self.model), key=lambda item: item[0])
        lines = [(name, _kind(link.__dict__[key])) for name, link, key in persistents]
        check_same(self.comm, lines)
        means, arrays = [], []
        for name, link, key in persistents:
            value = link.__dict__[key]
            if not _is_float(value):
                continue
            if not _is_numpy(value):
                raise TypeError(
                    f"{name} is a {type(value).__module__}.{type(value).__name__}; chainer_dist "
                    "exchanges NumPy arrays: call model.to_cpu() first"
                )
            in_place = isinstance(value, np.ndarray) and value.flags.writeable
            arrays.append(value if in_place else np.array(value))
            means.append((link, key, value))
        self.comm.mean_arrays(arrays)
        for (link, key, value), mean in zip(means, arrays):
            if mean is not value:
                setattr(link, key, mean if isinstance(value, np.ndarray) else type(value)(mean))


def persistent_values(model: chainer.Link) -> list[tuple[str, chainer.Link, str]]:
    """Return path, link and name of each persistent value of a model. Local."""
    return [
        (f"{path.rstrip('/')}/{name}", link, name)
        for path, link in model.namedlinks()
        for name in _chainer.persistent_names(link)
    ]


def _is_float(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(value, float) or getattr(dtype, "kind", None) == "f"


def _kind(value: Any) -> str:
    """Describe what ranks must have alike."""
    if not _is_float(value):
        return "no float"
    shape, dtype = getattr(value, "shape", ()), getattr(value, "dtype", "float")
    return f"{shape} {dtype}" if _is_numpy(value) else f"{shape} {dtype} {type(value).__module__}"


def _is_numpy(value: Any) -> bool:
    return isinstance(value, (np.ndarray, float, np.generic))

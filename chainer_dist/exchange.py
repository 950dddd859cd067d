"""Parameters and gradients of a model, made equal or averaged over the ranks.

A communicator knows arrays; what is particular to a model is here, once for every kind of
communicator: which parameters there are and in which order, which are initialized, which have a
gradient, and what happens when ranks differ in that. All of it is decided by all ranks together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import chainer
import numpy as np

from chainer_dist import _chainer
from chainer_dist.collectives import reduction
from chainer_dist.collectives.agreement import agree, raise_mismatch
from chainer_dist.collectives.failures import raise_together
from chainer_dist.collectives.operation import EXCHANGE, Kind, Operation, collective
from chainer_dist.errors import NonFiniteGradientError
from chainer_dist.parameters import ParameterSet, private_grads

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from chainer_dist._typing import Array
    from chainer_dist.collectives.arrays import ArrayCommunicator

__all__ = [
    "bcast_data",
    "check_finite",
    "check_means",
    "check_same_grads",
    "mean_agreed_grad",
    "mean_grad",
]

_BCAST = Kind("broadcast of", EXCHANGE)


@collective("zero_fill", name="multi_node_mean_grad")
def mean_grad(comm: ArrayCommunicator, model: chainer.Link, *, zero_fill: bool = False) -> None:
    """Replace every gradient by its mean over the ranks, in place. Collective.

    A parameter whose gradient is None on every rank is not exchanged. Uninitialized parameters
    are skipped. float16 gradients are summed in float32 and rounded once.

    For example, without an optimizer of this package::

        model.cleargrads()
        model(x, t).backward()
        chainer_dist.exchange.mean_grad(comm, model)
        optimizer.update()  # Chainer's own

    Args:
        comm: The communicator over whose ranks the mean is taken.
        model: A link, or another object with ``namedparams()``, whose gradients are replaced. Names,
            shapes and dtypes are the same on every rank.
        zero_fill: Whether a gradient that is None counts as zero where other ranks have one, and becomes an
            array of zeros in any case. If False it stays None, and must be None on every rank.

    Raises:
        RankMismatchError: On every rank, naming the rank and the parameter, if parameters differ
            or (without ``zero_fill``) some ranks have a gradient that others do not have.
        TypeError: If a parameter is not a NumPy array.
        NonFiniteGradientError: See :func:`check_finite` and, in Chainer's debug mode,
            :func:`check_means`.
    """
    parameters = ParameterSet(model)
    same_structure, same_grads = agree(comm, *parameters.digests)
    if not same_structure:
        raise_mismatch(comm, parameters.describe())
    parameters.check_supported()
    if not zero_fill:
        check_same_grads(comm, parameters, same_grads=same_grads)
    check_finite(comm, parameters)
    mean_agreed_grad(comm, parameters, same_grads=same_grads, zero_fill=zero_fill)


@collective(name="mean of gradients")
def mean_agreed_grad(
    comm: ArrayCommunicator,
    parameters: ParameterSet,
    *,
    same_grads: bool,
    zero_fill: bool,
    mean: Callable[[dict[str, Array]], object] | None = None,
    means: Mapping[str, Array] | None = None,
) -> None:
    """Do what :func:`mean_grad` does, for parameters that the ranks agree on. Collective.

    Args:
        comm: The communicator over whose ranks the mean is taken.
        parameters: Parameters with NumPy arrays, of equal structure on every rank.
        same_grads: Whether the same parameters have a gradient on every rank; if not, ``zero_fill`` is True.
        zero_fill: See :func:`mean_grad`.
        mean: Called with the gradients, by name, to replace them by their means over the ranks, in place;
            None for ``comm.mean_arrays``.
        means: The means, by name, where they are there already; 1-dimensional. A gradient that has
            none is zero on all ranks.
    """
    if not same_grads:
        parameters.fill_zeros()
    grads = private_grads(parameters)

    def by_name() -> dict[str, Array]:
        names = [name for name, has in zip(parameters.names, parameters.has_grad) if has]
        return dict(zip(names, grads))

    if means is not None:
        for name, grad in by_name().items():
            if name in means:
                grad[...] = means[name].reshape(grad.shape)
    elif mean is None:
        comm.mean_arrays(grads)
    elif grads:
        mean(by_name())
    check_means(parameters)
    if same_grads and zero_fill:
        parameters.fill_zeros()


def check_same_grads(
    comm: ArrayCommunicator, parameters: ParameterSet, *, same_grads: bool
) -> None:
    """Raise RankMismatchError on every rank if some have a gradient that others lack. Collective."""
    if not same_grads:
        raise_mismatch(comm, parameters.describe_grads())


def check_finite(comm: ArrayCommunicator, parameters: ParameterSet, *, look: bool = True) -> None:
    """Raise on every rank if a gradient has NaN or infinity on any. Collective, in checked mode only.

    Args:
        comm: The communicator. Nothing happens unless it is in checked mode (see
            :mod:`chainer_dist.watch`).
        parameters: Parameters whose gradients are checked.
        look: Whether gradients of this rank count.

    Raises:
        NonFiniteGradientError: Names the lowest rank that has one, and the parameter.
    """
    if comm.operation_log.check is None:
        return
    error = None
    for name, grad in zip(parameters.names, parameters.grads):
        if look and grad is not None and not np.isfinite(grad).all():
            counts = int(np.isnan(grad).sum()), int(np.isinf(grad).sum())
            error = NonFiniteGradientError(
                f"the gradient of {name} has {counts[0]} NaN and {counts[1]} infinite of "
                f"{grad.size} values before the exchange"
            )
            break
    raise_together(comm, error)


def check_means(parameters: ParameterSet) -> None:
    """Raise if an averaged gradient has NaN or infinity, in Chainer's debug mode. Local.

    All ranks have the same averages, so those in debug mode, as a rule all of them, raise the same.

    Raises:
        NonFiniteGradientError: Names the parameter.
    """
    if not chainer.is_debug():
        return
    for name, param in zip(parameters.names, parameters.params):
        if param.grad is not None and not np.isfinite(param.grad).all():
            raise NonFiniteGradientError(
                f"Parameters diverged after allreduce: the mean of the gradients of {name} over the "
                "ranks has NaN or infinity (chainer.set_debug looks for that)"
            )


@collective()
def bcast_data(comm: ArrayCommunicator, model: chainer.Link) -> None:
    """Make the parameters of all ranks equal to rank 0's, in place. Collective.

    A parameter that rank 0 has not initialized yet is taken from the lowest rank that has, and
    is initialized with that shape where it is not. One that no rank has initialized is left so.

    Args:
        comm: The communicator whose ranks become equal.
        model: A link, or another object with ``namedparams()``, whose parameters change. Names, and
            shapes and dtypes where initialized, are the same on every rank. Persistent values are
            left alone.

    Raises:
        RankMismatchError: On every rank, naming the rank and the parameter, if they differ.
        TypeError: If a parameter is not a NumPy array.
    """
    parameters = ParameterSet(model)
    sources: dict[str, int] = dict.fromkeys(parameters.names, 0)
    if not all(agree(comm, parameters.digest)):
        sources = _initialize_missing(comm, parameters)
        parameters = ParameterSet(model)
        if not all(agree(comm, parameters.digest)):
            raise_mismatch(comm, parameters.describe())
    parameters.check_supported()
    for name, param in zip(parameters.names, parameters.params):
        with Operation(_BCAST, comm, within=name):
            _bcast_param(comm, param, sources[name])


def _initialize_missing(comm: ArrayCommunicator, parameters: ParameterSet) -> dict[str, int]:
    """Initialize what other ranks have initialized; return each parameter's source rank."""
    everyone = [dict(structure) for structure in comm.allgather_obj(parameters.structure)]
    sources: dict[str, int] = {}
    for name in parameters.all:
        for rank, structure in enumerate(everyone):
            spec = structure.get(name)
            if spec is None:
                continue
            source = sources.setdefault(name, rank)
            first = everyone[source][name]
            if spec != first:
                raise_mismatch(comm, parameters.describe())
    if any(structure.keys() != everyone[0].keys() for structure in everyone):
        raise_mismatch(comm, parameters.describe())
    for name, source in sources.items():
        param = parameters.all[name]
        if param.array is None:
            spec = everyone[source][name]
            assert spec is not None  # noqa: S101 - sources hold initialized ones only
            param.initialize(spec[0])
    return sources


def _bcast_param(comm: ArrayCommunicator, param: chainer.Parameter, root: int) -> None:
    array = param.array
    work = array if array.flags.c_contiguous and array.flags.writeable else array.copy(order="C")
    before = work.copy() if _chainer.float32_copy(param) is not None else None
    for piece in reduction.pieces(work.reshape(-1).view(np.uint8)):
        comm.mpi_comm.Bcast(piece, root=root)
    if work is not array:
        if array.flags.writeable:
            np.copyto(array, work)
        else:
            param.array = work
    if before is not None and not np.array_equal(before, work, equal_nan=True):
        # The float32 master copy of `use_fp32_update` belongs to the old value.
        _chainer.forget_float32_copy(param)

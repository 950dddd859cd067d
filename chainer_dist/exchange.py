"""Parameters and gradients of a model, made equal or averaged over the ranks.

A communicator knows arrays; what is particular to a model is here, once for every kind of
communicator: which parameters there are and in which order, which are initialized, which have a
gradient, and what happens when ranks differ in that. All of it is decided by all ranks together.
"""

from __future__ import annotations

import functools
import operator
import weakref
from typing import TYPE_CHECKING, Any, Optional

import chainer
import numpy as np

from chainer_dist.communicators import _reduction
from chainer_dist.communicators.agreement import agree, digest, raise_mismatch, raise_together
from chainer_dist.communicators.operation import EXCHANGE, Kind, Operation, collective
from chainer_dist.errors import NonFiniteGradientError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.communicators.arrays import Array
    from chainer_dist.compression import Compression

__all__ = [
    "ParameterSet",
    "bcast_data",
    "check_finite",
    "check_means",
    "check_same_grads",
    "mean_agreed_grad",
    "mean_grad",
    "private_grads",
    "same",
]

# One entry a parameter: its name, and shape and dtype, or None while it is uninitialized.
Structure = tuple[tuple[str, Optional[tuple[tuple[int, ...], Any]]], ...]

_BCAST = Kind("broadcast of", EXCHANGE)

_cached_digest = functools.lru_cache(maxsize=256)(digest)


class _Layout:
    """What of a :class:`ParameterSet` stays as it is while no array is replaced."""

    def __init__(
        self, model: chainer.Link, walked: list[chainer.Parameter], found: list[Array | None]
    ) -> None:
        self.walked, self.found = walked, found
        self.all: dict[str, chainer.Parameter] = {}
        seen: set[int] = set()
        for name, param in sorted(model.namedparams(), key=lambda item: str(item[0])):
            if id(param) not in seen:
                seen.add(id(param))
                self.all[name] = param
        structure: list[tuple[str, Any]] = []
        self.unsupported = ""  # why the parameters cannot be exchanged
        self.names: list[str] = []
        self.params: list[chainer.Parameter] = []
        self.arrays: list[Array] = []
        for name, param in self.all.items():
            array = param.array
            if array is None:
                structure.append((name, None))
            else:
                kind: Any
                if isinstance(array, np.ndarray):
                    kind = array.dtype
                else:
                    kind = f"{type(array).__module__}.{type(array).__name__}"
                    self.unsupported = (
                        f"{name} is a {kind}; chainer_dist exchanges NumPy arrays: "
                        "call model.to_cpu() first"
                    )
                structure.append((name, (array.shape, kind)))
                self.names.append(name)
                self.params.append(param)
                self.arrays.append(array)
        self.structure: Structure = tuple(structure)
        self.digest = digest(self.structure)


# Finding the layout anew takes as long as averaging many small gradients does. By the model's id,
# as a link may be of a class that cannot be hashed.
_layouts: dict[int, tuple[weakref.ref[chainer.Link], _Layout]] = {}


def _layout(model: chainer.Link) -> _Layout:
    if not isinstance(model, chainer.Link):  # anything that lists its parameters will do
        walked = [param for _, param in model.namedparams()]
        return _Layout(model, walked, [param.array for param in walked])
    walked = list(model.params())
    arrays = [param._data[0] for param in walked]  # what the property array returns, faster
    key = id(model)
    if key in _layouts:
        known, layout = _layouts[key]
        if known() is model and same(layout.walked, walked) and same(layout.found, arrays):
            return layout
    layout = _Layout(model, walked, arrays)
    _layouts[key] = (weakref.ref(model, lambda _: _layouts.pop(key, None)), layout)
    return layout


def same(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    """Tell whether two sequences hold the same objects."""
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


class ParameterSet:
    """The parameters of a model as they are now, in the order in which ranks exchange them.

    That order is by name. A parameter registered at two places counts once, under its first name.
    Local.

    Attributes:
        structure: Names, shapes and dtypes, comparable between calls and between ranks.
        digest: Of the structure.
        all: All parameters, by name.
        params: The initialized parameters, those that can have a gradient.
        names: Their names.
        arrays: Their arrays.
        unsupported: Why they cannot be exchanged, or an empty string.
        grads: Their gradients, or None.
        has_grad: Which of them have a gradient.
    """

    def __init__(self, model: chainer.Link) -> None:
        layout = _layout(model)
        self.structure, self.digest, self.all = layout.structure, layout.digest, layout.all
        self.names, self.params, self.arrays = layout.names, layout.params, layout.arrays
        self.unsupported = layout.unsupported
        self.look_at_grads()

    @property
    def digests(self) -> tuple[int, int]:
        """Digests of the structure, and of which parameters have a gradient."""
        return self.digest, _cached_digest(self.has_grad)

    def without_grad(self) -> list[chainer.Parameter]:
        """Return the initialized parameters that have no gradient."""
        return [param for param, has in zip(self.params, self.has_grad) if not has]

    def fill_zeros(self) -> None:
        """Give those that have no gradient one of zeros."""
        for param in self.without_grad():
            param.grad = np.zeros_like(param.array)
        self.look_at_grads()

    def look_at_grads(self) -> None:
        """Take over gradients that were set since."""
        self.grads = [param.grad for param in self.params]
        self.has_grad = tuple([grad is not None for grad in self.grads])

    def describe(self) -> list[tuple[str, str]]:
        """Return names and descriptions in words, for errors."""
        return [
            (name, "uninitialized" if spec is None else f"{spec[0]} {spec[1]}")
            for name, spec in self.structure
        ]

    def describe_grads(self) -> list[tuple[str, str]]:
        """Return which parameters have a gradient, in words, for errors."""
        return [
            (f"the gradient of {name}", "an array" if has else "None")
            for name, has in zip(self.names, self.has_grad)
        ]

    def check_supported(self) -> None:
        """Raise TypeError for parameters that are not NumPy arrays."""
        if self.unsupported:
            raise TypeError(self.unsupported)


@collective("zero_fill", name="multi_node_mean_grad")
def mean_grad(comm: CommunicatorBase, model: chainer.Link, *, zero_fill: bool = False) -> None:
    """Replace every gradient by its mean over the ranks, in place. Collective.

    A parameter whose gradient is None on every rank is not exchanged. Uninitialized parameters
    are skipped. float16 gradients are summed in float32 and rounded once.

    Args:
        comm: Over whose ranks the mean is taken.
        model: Its gradients are replaced; a link, or anything else with ``namedparams()``. Names,
            shapes and dtypes are the same on every rank.
        zero_fill: What to do about a gradient that is None. If True it counts as zero where other
            ranks have one, and becomes an array of zeros in any case; if False it stays None,
            and must be None on every rank.

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
    comm: CommunicatorBase,
    parameters: ParameterSet,
    *,
    same_grads: bool,
    zero_fill: bool,
    compression: Compression | None = None,
    means: Mapping[str, Array] | None = None,
) -> None:
    """Do what :func:`mean_grad` does, for parameters that the ranks agree on. Collective.

    Args:
        comm: Over whose ranks the mean is taken.
        parameters: Of equal structure on every rank, and NumPy arrays.
        same_grads: Whether the same parameters have a gradient on every rank; if not, ``zero_fill``.
        zero_fill: See :func:`mean_grad`.
        compression: How to average with fewer bytes between nodes; None for exactly.
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
    elif compression is not None:
        compression.mean(comm, by_name())
    else:
        comm.mean_arrays(grads)
    check_means(parameters)
    if same_grads and zero_fill:
        parameters.fill_zeros()


def check_same_grads(comm: CommunicatorBase, parameters: ParameterSet, *, same_grads: bool) -> None:
    """Raise RankMismatchError on every rank if some have a gradient that others lack. Collective."""
    if not same_grads:
        raise_mismatch(comm, parameters.describe_grads())


def check_finite(comm: CommunicatorBase, parameters: ParameterSet, *, look: bool = True) -> None:
    """Raise on every rank if a gradient has NaN or infinity on any. Collective, in checked mode only.

    Args:
        comm: Whose ranks look, if it is checked (see :mod:`chainer_dist.watch`); otherwise nothing
            happens.
        parameters: Whose gradients are looked at.
        look: Whether this rank's count.

    Raises:
        NonFiniteGradientError: Names the lowest rank that has one, and the parameter.
    """
    if comm._log.check is None:
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
def bcast_data(comm: CommunicatorBase, model: chainer.Link) -> None:
    """Make the parameters of all ranks equal to rank 0's, in place. Collective.

    A parameter that rank 0 has not initialized yet is taken from the lowest rank that has, and
    is initialized with that shape where it is not. One that no rank has initialized is left so.

    Args:
        comm: Whose ranks become equal.
        model: Its parameters change; a link, or anything else with ``namedparams()``. Names, and
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


def _initialize_missing(comm: CommunicatorBase, parameters: ParameterSet) -> dict[str, int]:
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


def _bcast_param(comm: CommunicatorBase, param: chainer.Parameter, root: int) -> None:
    array = param.array
    work = array if array.flags.c_contiguous and array.flags.writeable else array.copy(order="C")
    before = work.copy() if _fp32_copy(param) is not None else None
    for piece in _reduction.pieces(work.reshape(-1).view(np.uint8)):
        comm.mpi_comm.Bcast(piece, root=root)
    if work is not array:
        if array.flags.writeable:
            np.copyto(array, work)
        else:
            param.array = work
    if before is not None and not np.array_equal(before, work, equal_nan=True):
        # The float32 master copy of `use_fp32_update` belongs to the old value.
        param.update_rule._fp32_param = None


def _fp32_copy(param: chainer.Parameter) -> Any:
    return getattr(getattr(param, "update_rule", None), "_fp32_param", None)


def private_grads(parameters: ParameterSet) -> list[Array]:
    """Return the gradients, each in memory that may be changed without changing another. Local.

    Backward may hand one array to several parameters, or a read-only view; those are replaced by
    copies, because a sum in place over shared memory would depend on which ranks share.
    """
    grads = [grad for grad in parameters.grads if grad is not None]
    owners = [id(grad if grad.base is None else grad.base) for grad in grads]
    if len({*owners}) == len(owners) and all(grad.flags.writeable for grad in grads):
        return grads
    ends: dict[int, float] = {}  # where the arrays so far in the memory of each owner end
    having = [param for param, has in zip(parameters.params, parameters.has_grad) if has]
    for index in sorted(range(len(grads)), key=lambda index: grads[index].ctypes.data):
        grad, owner = grads[index], owners[index]
        begin, is_dense = grad.ctypes.data, grad.flags.forc
        if not grad.flags.writeable or (owner in ends and not (is_dense and begin >= ends[owner])):
            having[index].grad = grads[index] = grad.copy()
        else:
            ends[owner] = begin + grad.nbytes if is_dense else np.inf
    parameters.look_at_grads()
    return grads

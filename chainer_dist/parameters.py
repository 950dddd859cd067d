"""The parameters of a model, in the order in which ranks exchange them."""

from __future__ import annotations

import functools
import operator
import weakref
from typing import TYPE_CHECKING, Any, Optional

import chainer
import numpy as np

from chainer_dist.collectives.agreement import digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist._typing import Array

__all__ = ["ParameterSet", "Structure", "are_identical", "private_grads"]

# One entry a parameter: its name, and shape and dtype, or None while it is uninitialized.
Structure = tuple[tuple[str, Optional[tuple[tuple[int, ...], Any]]], ...]

_cached_digest = functools.lru_cache(maxsize=256)(digest)


class _Layout:
    """The attributes of a :class:`ParameterSet` that do not change while no array is replaced."""

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
    arrays = [param._data[0] for param in walked]  # noqa: SLF001 - the property array, faster
    key = id(model)
    if key in _layouts:
        known, layout = _layouts[key]
        if (
            known() is model
            and are_identical(layout.walked, walked)
            and are_identical(layout.found, arrays)
        ):
            return layout
    layout = _Layout(model, walked, arrays)
    _layouts[key] = (weakref.ref(model, lambda _: _layouts.pop(key, None)), layout)
    return layout


def are_identical(ones: Sequence[Any], others: Sequence[Any]) -> bool:
    """Return whether two sequences hold the same objects. Local."""
    return len(ones) == len(others) and all(map(operator.is_, ones, others))


class ParameterSet:
    """The parameters of a model as they are now, in the order in which ranks exchange them.

    That order is by name. A parameter registered at two places counts once, under its first name.
    Local.

    Attributes:
        structure: Names, shapes and dtypes, comparable between calls and between ranks.
        digest: Digest of the structure.
        all: All parameters, by name.
        params: The initialized parameters, which can have a gradient.
        names: Names of ``params``.
        arrays: Arrays of ``params``.
        unsupported: Reason why they cannot be exchanged, or an empty string.
    """

    def __init__(self, model: chainer.Link) -> None:
        layout = _layout(model)
        self.structure, self.digest, self.all = layout.structure, layout.digest, layout.all
        self.names, self.params, self.arrays = layout.names, layout.params, layout.arrays
        self.unsupported = layout.unsupported
        self._grads: list[Array | None] | None = None
        self._has_grad: tuple[bool, ...] | None = None

    @property
    def digests(self) -> tuple[int, int]:
        """Digests of the structure, and of which parameters have a gradient."""
        return self.digest, _cached_digest(self.has_grad)

    def without_grad(self) -> list[chainer.Parameter]:
        """Return the initialized parameters that have no gradient."""
        return [param for param, has in zip(self.params, self.has_grad) if not has]

    def scale_missing(self, loss_scale: float | None) -> None:
        """Let the parameters without a gradient count as having one that was computed with a loss scale.

        That is the scale of the gradients that other ranks have computed, to which zeros are added here.
        """
        for param in self.without_grad():
            param._loss_scale = loss_scale  # noqa: SLF001 - Chainer's

    def fill_zeros(self) -> None:
        """Give initialized parameters without a gradient one of zeros."""
        missing = self.without_grad()
        for param in missing:
            param.grad = np.zeros_like(param.array)
        if missing:
            self.look_at_grads()

    @property
    def grads(self) -> list[Array | None]:
        """Gradients of ``params``, each an array or None, as they were when this was first asked."""
        if self._grads is None:
            self._grads = [param.grad for param in self.params]
        return self._grads

    @property
    def has_grad(self) -> tuple[bool, ...]:
        """One bool for each of ``params``: whether it has a gradient."""
        if self._has_grad is None:
            self._has_grad = tuple([grad is not None for grad in self.grads])
        return self._has_grad

    def look_at_grads(self) -> None:
        """Read the gradients of the parameters again, after they were set."""
        self._grads = self._has_grad = None

    def count_as_having(self, has_grad: Sequence[bool]) -> None:
        """Set which parameters count as having a gradient, for example one that is kept elsewhere.

        Args:
            has_grad: One bool for each of :attr:`params`.
        """
        self._has_grad = tuple(has_grad)

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
    having = [param for param, grad in zip(parameters.params, parameters.grads) if grad is not None]
    for index in sorted(range(len(grads)), key=lambda index: grads[index].ctypes.data):
        grad, owner = grads[index], owners[index]
        begin, is_dense = grad.ctypes.data, grad.flags.forc
        if not grad.flags.writeable or (owner in ends and not (is_dense and begin >= ends[owner])):
            having[index].grad = grads[index] = grad.copy()
        else:
            ends[owner] = begin + grad.nbytes if is_dense else np.inf
    parameters.look_at_grads()
    return grads

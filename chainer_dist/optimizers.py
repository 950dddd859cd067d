"""The multi-node optimizer: an ordinary Chainer optimizer that all ranks step together."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from chainer_dist import exchange
from chainer_dist.communicators.agreement import agree, raise_mismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import chainer
    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["create_multi_node_optimizer"]


class _MultiNodeOptimizer:
    """Wraps an optimizer; everything but the few names below is the wrapped optimizer's own."""

    _OWN = frozenset(
        {
            "actual_optimizer",
            "communicator",
            "zero_fill",
            "_structure",
            "_started",
            "_loaded",
            "_random_state",
        }
    )

    def __init__(
        self, actual_optimizer: chainer.Optimizer, communicator: CommunicatorBase, zero_fill: bool
    ) -> None:
        self.actual_optimizer = actual_optimizer
        self.communicator: CommunicatorBase | None = communicator
        self.zero_fill = zero_fill
        self._structure: exchange.Structure | None = None  # of the last parameters made equal
        self._started = False  # whether the first update is over
        self._loaded = False  # whether a snapshot was loaded since the last update
        self._random_state: Any = None  # numpy.random's during updates, equal on all ranks
        if actual_optimizer.target is not None:
            self._make_equal()

    def setup(self, link: chainer.Link) -> Self:
        """Set the target link, and make its parameters equal to rank 0's. Collective."""
        self.actual_optimizer.setup(link)
        self._started = False
        self._make_equal()
        return self

    def update(self, lossfun: Callable[..., Any] | None = None, *args: Any, **kwds: Any) -> None:
        """Update the parameters by the gradients' mean over the ranks. Collective.

        Gradients are averaged after backward and before any hook of the optimizer runs.

        The first update, and every one before which the parameters changed on some rank (layers
        initialized by this very forward pass, links added, a snapshot loaded), makes them equal
        to rank 0's. Where that happened after the loss was computed, forward and backward are
        repeated with the equal parameters, so that no update is lost or computed from others.

        Args:
            lossfun: Returns the loss; None if the gradients are there already.
            args: Passed to ``lossfun``.
            kwds: Passed to ``lossfun``.

        Raises:
            RankMismatchError: On every rank, naming the rank and the parameter, if ranks differ.
        """
        if not self._started:
            self._make_equal()
            self._started = True
        comm, target = self._connected(), self.target
        persistents = None
        if lossfun is not None:
            if any(spec is None for _, spec in self._structure or ()):
                persistents = _persistent_values(target)
            self._backward(lossfun, args, kwds)
        parameters, same_grads, changed = self._agree()
        if changed:
            self._make_equal()
            if lossfun is not None:
                if persistents is not None:
                    _restore(persistents)
                self._backward(lossfun, args, kwds)
            parameters, same_grads, _ = self._agree()
        filled = exchange.mean_agreed_grad(
            comm, parameters, same_grads=same_grads, zero_fill=self.zero_fill
        )
        # Gradients carry the loss scale; so must those that other ranks computed for this one.
        for param in filled:
            param._loss_scale = self.actual_optimizer._loss_scale
        with self._equal_randomness():
            self.actual_optimizer.update(None, *args, **kwds)

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Save or load the optimizer as Chainer does. Local; to load, load on every rank."""
        import chainer

        self.actual_optimizer.serialize(serializer)
        if isinstance(serializer, chainer.Deserializer):
            self._loaded = True

    def _backward(
        self, lossfun: Callable[..., Any], args: tuple[Any, ...], kwds: dict[str, Any]
    ) -> None:
        """Compute the gradients, in the way of ``chainer.GradientMethod.update``."""
        loss = lossfun(*args, **kwds)
        if getattr(self, "_use_cleargrads", True):
            self.target.cleargrads()
        else:
            self.target.zerograds()
        loss.backward(loss_scale=self.actual_optimizer._loss_scale)

    def _agree(self) -> tuple[exchange.ParameterSet, bool, bool]:
        """Compare the ranks' parameters before a step. Collective.

        Returns:
            The parameters, whether the same ones have a gradient on every rank, and whether any
            rank's parameters are not those that were last made equal.
        """
        comm = self._connected()
        parameters = exchange.ParameterSet(self.target)
        changed = self._loaded or parameters.structure != self._structure
        same_structure, same_grads, same_t, same_changed = agree(
            comm, *parameters.digests, self.actual_optimizer.t, int(changed)
        )
        if not same_t:
            raise_mismatch(
                comm,
                [("optimizer.t (was a snapshot loaded on some ranks only?)", str(self.t))],
            )
        return parameters, same_grads, changed or not (same_structure and same_changed)

    def _make_equal(self) -> None:
        exchange.bcast_data(self._connected(), self.target)
        self._structure = exchange.ParameterSet(self.target).structure
        self._loaded = False

    @contextlib.contextmanager
    def _equal_randomness(self) -> Iterator[None]:
        """Let hooks and update rules draw the same numbers on every rank. Collective at first.

        A hook such as ``GradientNoise`` would otherwise move the ranks' parameters apart. Outside
        of updates the ranks' random states stay their own (for dropout, say).
        """
        comm = self._connected()
        if comm.size == 1:
            yield
            return
        own: Any = np.random.get_state()  # noqa: NPY002 - what Chainer draws from
        if self._random_state is None:
            # From rank 0's seed, but without drawing from it.
            seed = comm.bcast_obj(np.random.RandomState(own[1]).randint(2**31))
            self._random_state = np.random.RandomState(seed).get_state()
        np.random.set_state(self._random_state)  # noqa: NPY002
        try:
            yield
        finally:
            self._random_state = np.random.get_state()  # noqa: NPY002
            np.random.set_state(own)  # noqa: NPY002

    def _connected(self) -> CommunicatorBase:
        if self.communicator is None:
            raise RuntimeError(
                "this multi-node optimizer was unpickled and has no communicator; "
                "assign one: optimizer.communicator = comm"
            )
        return self.communicator

    def __getattr__(self, name: str) -> Any:
        try:
            actual = self.__dict__["actual_optimizer"]
        except KeyError:  # while being unpickled
            raise AttributeError(name) from None
        return getattr(actual, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._OWN:
            super().__setattr__(name, value)
        else:
            setattr(self.actual_optimizer, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self.actual_optimizer)})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "communicator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __copy__(self) -> Self:
        return self._copied(copy.copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._copied(lambda value: copy.deepcopy(value, memo))

    def _copied(self, copy_one: Callable[[Any], Any]) -> Self:
        twin = type(self).__new__(type(self))
        twin.__dict__.update({key: copy_one(value) for key, value in self.__dict__.items()})
        return twin


def create_multi_node_optimizer(
    actual_optimizer: chainer.Optimizer,
    communicator: CommunicatorBase,
    double_buffering: bool = False,
    zero_fill: bool = True,
) -> _MultiNodeOptimizer:
    """Make an optimizer that averages gradients over the ranks before each of its updates.

    Use it exactly like the optimizer it wraps, on every rank. ``setup`` and ``update`` become
    collective. Attributes read and set, hooks added, and what is saved are the wrapped
    optimizer's, so that hyperparameter schedules and snapshots need no change.

    Training on N ranks then gives what one process gives on the concatenated batch, if each rank's
    loss is a mean over an equally large batch.

    Args:
        actual_optimizer: Any Chainer optimizer, set up or not. It is changed by the updates.
        communicator: Over whose ranks gradients are averaged.
        double_buffering: Not supported yet; must be False.
        zero_fill: Whether a gradient that is None on this rank counts as zero. If False it must
            be None on all ranks or on none.

    Returns:
        The optimizer to use in place of ``actual_optimizer``. Pickled, it leaves its communicator
        behind; deep-copied, it keeps it.

    Raises:
        ValueError: If ``double_buffering`` is asked for.
    """
    if double_buffering:
        raise ValueError("double_buffering is not supported by this communicator; leave it False")
    return _MultiNodeOptimizer(actual_optimizer, communicator, zero_fill)


def _persistent_values(link: chainer.Link) -> list[tuple[chainer.Link, str, Any]]:
    """Copy the persistent values (such as running statistics) of a link and those below it."""
    return [
        (sublink, name, copy.deepcopy(sublink.__dict__[name]))
        for sublink in link.links()
        for name in sublink._persistent
    ]


def _restore(persistents: list[tuple[chainer.Link, str, Any]]) -> None:
    for sublink, name, value in persistents:
        if value is not None:  # None waited for its shape, as a parameter does
            sublink.__dict__[name] = value

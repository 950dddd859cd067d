"""The multi-node optimizer: an ordinary Chainer optimizer that all ranks step together."""

from __future__ import annotations

import contextlib
import copy
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist import exchange
from chainer_dist.communicators.agreement import agree, digest, raise_mismatch
from chainer_dist.communicators.shared_memory import SharedMemoryCommunicator
from chainer_dist.sharding import ShardedUpdate, Signature, obstacle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import chainer
    from typing_extensions import Self

    from chainer_dist.communicators import CommunicatorBase

__all__ = ["create_multi_node_optimizer"]

_logger = logging.getLogger("chainer_dist")

_UNSHARED: dict[str, Any] = {"_shards": None, "_signature": None}  # what copies start with


class _Options(NamedTuple):
    """How the update is to be shared out; see :func:`create_multi_node_optimizer`."""

    sharded_update: bool | None
    mean_grad: bool
    share_parameters: bool


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
            "_options",
            "_shards",
            "_signature",
            "_reported",
        }
    )

    def __init__(
        self,
        actual_optimizer: chainer.Optimizer,
        communicator: CommunicatorBase,
        zero_fill: bool,
        options: _Options,
    ) -> None:
        self.actual_optimizer = actual_optimizer
        self.communicator: CommunicatorBase | None = communicator
        self.zero_fill = zero_fill
        self._structure: exchange.Structure | None = None  # of the last parameters made equal
        self._started = False  # whether the first update is over
        self._loaded = False  # whether a snapshot was loaded since the last update
        self._random_state: Any = None  # numpy.random's during updates, equal on all ranks
        self._options = options
        self._shards: ShardedUpdate | None = None  # None while every rank updates everything
        self._signature: Signature | None = None  # what that was chosen for
        self._reported: str | None = ""  # why the update was last said not to be sharded
        if actual_optimizer.target is not None:
            self._make_equal()

    @property
    def sharded(self) -> bool | None:
        """Whether each rank updates a slice of the parameters only; None before the first update."""
        return None if self._signature is None else self._shards is not None

    def setup(self, link: chainer.Link) -> Self:
        """Set the target link, and make its parameters equal to rank 0's. Collective."""
        self._unshare()
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
        self._allow_missing_grads(parameters, same_grads=same_grads)
        if self._shards is not None:
            parameters.fill_zeros()
            if comm.size == 1:  # hooks change the gradients where they are
                exchange.private_grads(parameters)
            self._shards.update(parameters)
            return
        exchange.mean_agreed_grad(comm, parameters, same_grads=same_grads, zero_fill=self.zero_fill)
        with self._equal_randomness():
            self.actual_optimizer.update(None, *args, **kwds)

    def _allow_missing_grads(self, parameters: exchange.ParameterSet, *, same_grads: bool) -> None:
        if not self.zero_fill:
            exchange.check_same_grads(self._connected(), parameters, same_grads=same_grads)
            return
        # Gradients carry the loss scale; so must those that other ranks compute for this one.
        for param in parameters.without_grad():
            param._loss_scale = self.actual_optimizer._loss_scale

    def serialize(self, serializer: chainer.AbstractSerializer) -> None:
        """Save or load the optimizer as Chainer does. Local; to load, load on every rank.

        Any single rank can save alone: all of the state is there on each. A serializer that keeps
        arrays to write them later gets copies of what the ranks of a node share.
        """
        import chainer

        if isinstance(serializer, chainer.Deserializer):
            self._unshare()
            self._loaded = True
        with contextlib.ExitStack() as stack:
            if self._shards is not None:
                stack.enter_context(self._shards.copied_states())
            self.actual_optimizer.serialize(serializer)

    def _backward(
        self, lossfun: Callable[..., Any], args: tuple[Any, ...], kwds: dict[str, Any]
    ) -> None:
        """Compute the gradients, in the way of ``chainer.GradientMethod.update``."""
        loss = lossfun(*args, **kwds)
        self.target.cleargrads()
        if not getattr(self, "_use_cleargrads", True):
            self.target.zerograds()  # alone it would write to arrays that may be read-only
        loss.backward(loss_scale=self.actual_optimizer._loss_scale)

    def _agree(self) -> tuple[exchange.ParameterSet, bool, bool]:
        """Compare the ranks' parameters before a step. Collective.

        Returns:
            The parameters, whether the same ones have a gradient on every rank, and whether any
            rank's parameters are not those that were last made equal.
        """
        comm, optimizer = self._connected(), self.actual_optimizer
        parameters = exchange.ParameterSet(self.target)
        changed = self._loaded or parameters.structure != self._structure
        signature = Signature(optimizer, parameters)
        settled = signature == self._signature and (
            self._shards is None or self._shards.fits(parameters)
        )
        settings = _settings(optimizer, parameters)
        same_structure, same_grads, same_t, same_changed, same_settled, same_settings = agree(
            comm,
            *parameters.digests,
            optimizer.t,
            int(changed),
            int(settled),
            digest(settings),
        )
        if not same_t:
            raise_mismatch(
                comm,
                [("optimizer.t (was a snapshot loaded on some ranks only?)", str(optimizer.t))],
            )
        if not same_settings:
            raise_mismatch(comm, settings)
        if same_structure:
            parameters.check_supported()
        changed = changed or not (same_structure and same_changed)
        if not (settled and same_settled):
            self._unshare()
            if not changed:
                self._choose(parameters, signature)
        return parameters, same_grads, changed

    def _choose(self, parameters: exchange.ParameterSet, signature: Signature) -> None:
        """Choose how parameters are updated, for as long as the signature stays. Collective."""
        comm = self._connected()
        reasons = comm.allgather_obj(self._against_sharding(parameters))
        reason = next(filter(None, reasons), None)
        if reason is None:
            states = _states(parameters)
            if not all(agree(comm, digest(states))):
                raise_mismatch(comm, states)
            assert isinstance(comm, SharedMemoryCommunicator)  # noqa: S101 - no reason against it
            self._shards = ShardedUpdate(
                comm,
                self.actual_optimizer,
                parameters,
                mean_grad=self._options.mean_grad,
                share_parameters=self._options.share_parameters,
            )
        elif self._options.sharded_update:
            raise ValueError(f"the update cannot be sharded: {reason}")
        self._signature = signature
        if comm.rank == 0 and reason != self._reported:
            if reason is None:
                _logger.info("chainer_dist: each rank updates a slice of the parameters")
            elif self._options.sharded_update is None and isinstance(
                comm, SharedMemoryCommunicator
            ):
                _logger.warning("chainer_dist: every rank updates all parameters, as %s", reason)
            self._reported = reason

    def _against_sharding(self, parameters: exchange.ParameterSet) -> str | None:
        comm = self._connected()
        if self._options.sharded_update is False:
            return "sharded_update is False"
        if not isinstance(comm, SharedMemoryCommunicator):
            return f"the communicator is {comm.name}, not shared_memory"
        return obstacle(self.actual_optimizer, parameters)

    def _unshare(self) -> None:
        """Go back to state and gradients of one's own. Local; the next update chooses anew."""
        if self._shards is not None:
            self._shards.release()
        self._shards = self._signature = None

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
        return {**self.__dict__, **_UNSHARED, "communicator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __copy__(self) -> Self:
        return self._copied(copy.copy)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self._copied(lambda value: copy.deepcopy(value, memo))

    def _copied(self, copy_one: Callable[[Any], Any]) -> Self:
        twin = type(self).__new__(type(self))
        own = {**self.__dict__, **_UNSHARED}
        twin.__dict__.update({key: copy_one(value) for key, value in own.items()})
        return twin


def create_multi_node_optimizer(
    actual_optimizer: chainer.Optimizer,
    communicator: CommunicatorBase,
    double_buffering: bool = False,
    zero_fill: bool = True,
    *,
    sharded_update: bool | None = None,
    mean_grad: bool = False,
    share_parameters: bool = False,
) -> _MultiNodeOptimizer:
    """Make an optimizer that averages gradients over the ranks before each of its updates.

    Use it exactly like the optimizer it wraps, on every rank. ``setup`` and ``update`` become
    collective. Attributes read and set, hooks added, and what is saved are the wrapped
    optimizer's, so that hyperparameter schedules and snapshots need no change.

    Training on N ranks then gives what one process gives on the concatenated batch, if each rank's
    loss is a mean over an equally large batch.

    With the communicator ``shared_memory`` the update is sharded where that provably gives the same
    parameters: each rank of a node runs Chainer's update rules on a slice of the parameters, and the
    others copy the result. So it is for Chainer's rules (except MSVAG) with the hooks ``WeightDecay``,
    ``Lasso``, ``GradientHardClipping`` and ``GradientClipping``, whose norm is summed over slices, and
    with no other hooks. In any other case every rank updates all parameters, as in ChainerMN, and
    rank 0 logs the reason, once, as a warning of the logger ``chainer_dist``. ``optimizer.sharded``
    tells which it is. What a sharded update changes:

    - ``param.grad`` stays this rank's own gradient (of ChainerMN's updates it is the average); see
      ``mean_grad``. Hooks see the average in any case.
    - The state of the update rules exists once per node, in arrays that cannot be written. Any rank
      can save it. Load it on every rank, through this optimizer.
    - Parameters are updated in place in each rank's own arrays; see ``share_parameters``.

    Args:
        actual_optimizer: Any Chainer optimizer, set up or not. It is changed by the updates.
        communicator: Over whose ranks gradients are averaged.
        double_buffering: Not supported yet; must be False.
        zero_fill: Whether a gradient that is None on this rank counts as zero. If False it must
            be None on all ranks or on none.
        sharded_update: False to have every rank update all parameters, True to raise ValueError
            where the update cannot be sharded.
        mean_grad: Whether a sharded update leaves the average in ``param.grad``, as the hooks left
            it: the same on every rank, kept once per node, and read-only for that. It stays as it
            is until this rank's next update; keep a copy for longer.
        share_parameters: Whether a sharded update keeps parameters, too, once per node. It saves
            time and memory. From the first update on ``param.array`` is then memory of all ranks
            of the node: what one rank writes there all of them see, so that ``param.array *= 2``
            on every rank doubles it once for each rank; and arrays held elsewhere since before,
            as those of ``model.copy()``, are no longer the model's.

    Returns:
        The optimizer to use in place of ``actual_optimizer``. Pickled, it leaves its communicator
        behind; deep-copied, it keeps it.

    Raises:
        ValueError: If ``double_buffering`` is asked for. From updates, if ``sharded_update`` is True
            and the update cannot be sharded.
    """
    if double_buffering:
        raise ValueError("double_buffering is not supported by this communicator; leave it False")
    options = _Options(sharded_update, mean_grad, share_parameters)
    return _MultiNodeOptimizer(actual_optimizer, communicator, zero_fill, options)


def _settings(
    optimizer: chainer.Optimizer, parameters: exchange.ParameterSet
) -> list[tuple[str, str]]:
    """Return names and values of all hyperparameters, which must be the same on every rank."""
    hyperparam = getattr(optimizer, "hyperparam", None)
    found = [] if hyperparam is None else _described("optimizer", hyperparam.get_dict())
    for name, param in parameters.all.items():
        rule = param.update_rule
        if rule is not None and len(vars(rule.hyperparam)) > 1:  # more than its parent
            found += _described(f"the update rule of {name}", vars(rule.hyperparam))
    return found


def _states(parameters: exchange.ParameterSet) -> list[tuple[str, str]]:
    """Describe the state of all update rules, which must be of the same kind on every rank."""
    found = []
    for name, param in parameters.all.items():
        rule = param.update_rule
        if rule is not None:
            kept = "not there" if rule.state is None else ", ".join(rule.state) or "empty"
            found.append((f"the state of {name}", f"{kept} (after {rule.t} updates)"))
    return found


def _described(owner: str, values: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        (f"{owner}.{key}", repr(value)) for key, value in sorted(values.items()) if key != "_parent"
    ]


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

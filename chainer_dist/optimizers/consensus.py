"""What decides what an update does, described so that ranks can compare it.

Ranks that update by different rules or hooks, or freeze different layers, drift apart without a word, or
wait for one another forever. So all of it is compared in each update, by a digest. Where a value is
equal it counts as equal: ``1`` and ``numpy.float64(1)`` are, and so are two objects of one class with
equal numbers, although each rank has its own.
"""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist import _chainer
from chainer_dist.collectives.agreement import digest, raise_mismatch
from chainer_dist.collectives.extremes import extremes
from chainer_dist.collectives.operation import WAITING, Kind
from chainer_dist.optimizers.descriptions import describe, is_of_chainer, is_plain, name_of
from chainer_dist.parameters import are_identical

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    from chainer_dist.communicators import CommunicatorBase
    from chainer_dist.compression import Compression
    from chainer_dist.parameters import ParameterSet
    from chainer_dist.updates.comparison import Lines
    from chainer_dist.updates.options import Options

__all__ = ["GRADIENTS", "PARAMETERS", "Report", "Settings", "compare", "describe_options"]

_Value = tuple[Any, ...]  # its owner, its name, the value, and values within it that may change


# The comparisons of an update, in which all ranks wait for the slowest: before forward and after backward.
PARAMETERS = Kind("comparison of parameters", WAITING)
GRADIENTS = Kind("comparison of gradients", WAITING)

_MOST_KNOWN = 1000  # objects whose descriptions are kept

# Chainer's attributes of an optimizer; the first is the same even where the others follow the loss.
_LOSS_SCALING = (
    "_loss_scaling_is_dynamic",
    "_loss_scale",
    "_loss_scale_max",
    "_loss_scaling_multiplier",
)


class Report(NamedTuple):
    """What ranks compare in an update: numbers and digests, or for each whether it is the same.

    Attributes:
        structure: Digest of the names, shapes and dtypes of the parameters.
        change: Change of the parameters since the last comparison, a :class:`Change`.
        values: Digest of the new values of changed parameters.
        grads: Digest of which parameters have a gradient.
        t: Number of updates.
        calls: Number of batches that were accumulated since the last update.
        settings: Digest of all settings that decide what the update does.
        planned: Whether the way of updating need not be chosen anew.
        clean: Whether gradients are still those that were exchanged during backward, if any were.
    """

    structure: int = 0
    change: int = 0
    values: int = 0
    grads: int = 0
    t: int = 0
    calls: int = 0
    settings: int = 0
    planned: int = 0
    clean: int = 0


_SAME = Report(*[1] * len(Report._fields))  # what ranks find out nearly always


class Settings:
    """All that must be the same on every rank for an update to be the same.

    Hooks and rules that are Chainer's are looked at in each update, as their numbers may follow a
    schedule. Other objects are described when they are first met, since they may count, or measure
    time, in attributes of their own.

    Args:
        are_alike: Whether the ranks do the same updates. Otherwise (local SGD) each has a loss scale
            and numbers of updates of its own.

    Attributes:
        version: Number that grows with each call of :meth:`digest` that has found something changed, other
            than numbers of updates.
    """

    def __init__(self, *, are_alike: bool = True) -> None:
        self._are_alike = are_alike
        self.version = 0
        self._known: dict[int, tuple[Any, str]] = {}  # descriptions of users' objects, by id
        self._rules: list[Any] = []  # the rules that the digest of classes is of
        self._classes = 0
        self._values: list[_Value] = []  # the values that the digest of descriptions is of
        self._described = 0
        # What, next to these, the following digest is of; None if they have changed.
        self._lasting: Any = None
        self._base = 0

    def digest(self, options: Lines, optimizer: chainer.Optimizer, parameters: ParameterSet) -> int:
        """Return a number that is the same on every rank if all of it is. Local.

        Args:
            options: Names and values of the multi-node optimizer's options.
            optimizer: The wrapped one.
            parameters: The parameters of its target.
        """
        rules = [param.update_rule for param in parameters.all.values()]
        if not are_identical(rules, self._rules):
            self._rules, self._lasting = rules, None
            self._classes = digest([name_of(type(rule)) for rule in rules])
        values, states = self._look(optimizer, parameters)
        if not _are_equal(values, self._values):
            self._values, self._lasting = values, None
            self._described = digest(self._describe(values))
        lasting = (options, states)
        if lasting != self._lasting:
            self.version += 1
            self._lasting = lasting
            self._base = digest((self._classes, self._described, *lasting))
        if not self._are_alike:
            return self._base
        counts = [rule.t for rule in rules if rule is not None]
        if len({*counts}) == 1:
            return self._base + int(counts[0])
        return digest((self._base, counts))

    def lines(
        self, options: Lines, optimizer: chainer.Optimizer, parameters: ParameterSet
    ) -> Lines:
        """Return what :meth:`digest` is of, in words. Local."""
        values, _ = self._look(optimizer, parameters)
        found = [*options, *self._describe(values)]
        for name, param in parameters.all.items():
            rule = param.update_rule
            if rule is None:
                found.append((f"the update rule of {name}", "None"))
                continue
            found += [
                (f"the update rule of {name}", name_of(type(rule))),
                (f"the update of {name}", "enabled" if rule.enabled else "disabled"),
                (
                    f"the update of {name} in float32 (use_fp32_update)",
                    str(bool(rule._use_fp32_update)),  # noqa: SLF001 - Chainer's
                ),
            ]
            if self._are_alike:
                found.append((f"the number of updates of {name}", str(rule.t)))
        return found

    def _look(
        self, optimizer: chainer.Optimizer, parameters: ParameterSet
    ) -> tuple[list[_Value], list[bool]]:
        """Return hyperparameters, loss scaling and hooks as they are now, and which rules do what. Local."""
        found: list[_Value] = []
        states: list[bool] = []
        hyperparam = getattr(optimizer, "hyperparam", None)
        if hyperparam is not None:
            found += [("optimizer", *item) for item in hyperparam.get_dict().items()]
        for key in _LOSS_SCALING if self._are_alike else _LOSS_SCALING[:1]:
            found.append(("optimizer", key, getattr(optimizer, key, None)))
        found += _look_at_hooks("optimizer", optimizer)
        for name, param in parameters.all.items():
            rule = param.update_rule
            if rule is None:
                continue
            states += (rule.enabled, rule._use_fp32_update)  # noqa: SLF001 - Chainer's
            own = vars(rule.hyperparam)
            if len(own) > 1:  # more than its parent
                owner = f"the update rule of {name}"
                found += [(owner, *item) for item in own.items() if item[0] != "_parent"]
            hookable = rule._hookable  # noqa: SLF001 - Chainer's, read in every update
            if hookable._pre_update_hooks or hookable._post_update_hooks:  # noqa: SLF001 - Chainer's, read in every update
                found += _look_at_hooks(f"the update rule of {name}", rule)
        return found, states

    def _describe(self, values: list[_Value]) -> Lines:
        return [(f"{owner}.{key}", self._describe_one(value)) for owner, key, value, *_ in values]

    def _describe_one(self, value: Any) -> str:
        if is_plain(value) or is_of_chainer(value):
            return describe(value)
        known, text = self._known.get(id(value), (None, ""))
        if known is not value:
            if len(self._known) == _MOST_KNOWN:
                self._known.clear()
            text = describe(value)
            self._known[id(value)] = value, text  # which keeps the object, and so its id
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial(Settings, are_alike=self._are_alike), ()


def _look_at_hooks(owner: str, hooked: Any) -> list[_Value]:
    """Return hooks in their order, and the attributes of Chainer's."""
    found: list[_Value] = []
    for time, hooks in zip(("pre_update_hooks", "post_update_hooks"), _chainer.hooks_of(hooked)):
        if hooks:
            found.append((owner, time, list(hooks)))
        for name, hook in hooks.items():
            attributes = dict(vars(hook)) if is_of_chainer(hook) else None
            found.append((owner, f"hook {name}", hook, attributes))
    return found


def _are_equal(ones: list[_Value], others: list[_Value]) -> bool:
    try:
        return ones == others
    except Exception:  # noqa: BLE001 - arrays, and what users compare as they like
        return False


def compare(
    comm: CommunicatorBase,
    kind: Kind,
    report: Report,
    describe_settings: Callable[[], Lines],
) -> Report:
    """Compare the ranks' reports. Collective.

    Args:
        comm: The communicator whose ranks compare.
        kind: Which comparison of an update it is, :data:`PARAMETERS` or :data:`GRADIENTS`.
        report: This rank's report.
        describe_settings: Function that returns what ``report.settings`` is a digest of, in words.

    Returns:
        For each entry, whether it is the same on every rank.

    Raises:
        RankMismatchError: On every rank, if ranks differ in what they cannot make equal.
    """
    most, least = extremes(comm, kind, *report)
    if most == least:
        return _SAME
    same = Report(*map(operator.eq, most, least))
    if not same.t:
        subject = "optimizer.t (was a snapshot loaded on some ranks only?)"
        raise_mismatch(comm, [(subject, str(report.t))])
    if not same.settings:
        raise_mismatch(comm, describe_settings())
    if not same.calls:
        subject = (
            "the number of batches accumulated before this one (did only some ranks call update "
            "in no_sync, add links or load a snapshot?)"
        )
        raise_mismatch(comm, [(subject, str(report.calls))])
    return same


def describe_options(kind: type, options: Options, *, zero_fill: bool) -> Lines:
    """Describe all that ranks must be given alike to communicate at the same time. Local.

    Args:
        kind: The class of the multi-node optimizer.
        options: The user's choice.
        zero_fill: Whether a gradient that is None counts as zero.
    """
    # Of the others ranks find out in each update whether they are the same.
    others = options._replace(compression=None, accumulate_steps=0, schedule=None)._asdict()
    del others["compression"]
    values = {"compression": _describe_compression(options.compression), **others}
    values["zero_fill"] = zero_fill
    lines = [
        (f"the option {name} of the multi-node optimizer", str(value))
        for name, value in values.items()
    ]
    # The class and the compression come first, as other options follow from them.
    return [("the multi-node optimizer", kind.__name__), *lines]


def _describe_compression(compression: Compression | None) -> str:
    """Return the class and the numbers of a compression, without what it keeps of gradients."""
    if compression is None:
        return "None"
    numbers = {
        name: value
        for name, value in vars(compression).items()
        if not name.startswith("_") and name != "sent"
    }
    return f"{name_of(type(compression))} {describe(numbers)}"

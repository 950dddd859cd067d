"""Values that Chainer 7.8.1, which no longer changes, has under private names, and several modules read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    import chainer


class Selected(NamedTuple):
    """The samples that a ``SubDataset`` takes from the dataset below it.

    Attributes:
        dataset: The dataset below.
        start: First position.
        finish: Position after the last.
        order: Indices of the dataset below, to which the positions refer; None for its own order.
    """

    dataset: Any
    start: int
    finish: int
    order: Any


def selected(dataset: chainer.datasets.SubDataset) -> Selected:
    """Return which samples a ``SubDataset`` takes. Local."""
    return Selected(dataset._dataset, dataset._start, dataset._finish, dataset._order)


def dataset_below(dataset: Any) -> Any:
    """Return the dataset that a ``TransformDataset`` or a ``SubDataset`` takes samples from. Local."""
    return dataset._dataset


def datasets_within(dataset: Any) -> Any:
    """Return the datasets of a ``TupleDataset``, ``DictDataset`` (a dict) or ``ConcatenatedDataset``. Local."""
    return dataset._datasets


def order_of(iterator: chainer.dataset.Iterator) -> Any:
    """Return the indices of samples in the order of the present epoch, or None for the dataset's. Local."""
    return iterator._state.order


def call_converter(converter: Any, batch: Any, device: Any) -> Any:
    """Return a batch of samples as arrays, by any kind of converter that Chainer takes. Local."""
    from chainer.dataset import convert

    return convert._call_converter(converter, batch, device)


def extension_entries(trainer: chainer.training.Trainer) -> Any:
    """Return the entries of a trainer's extensions by name: the dict itself, for changes as well. Local."""
    return trainer._extensions


def persistent_names(link: chainer.Link) -> Iterable[str]:
    """Return the names of a link's own persistent values. Local."""
    names: Iterable[str] = link._persistent
    return names


def hooks_of(hooked: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the hooks by name that an optimizer or an update rule calls before, and after, an update. Local."""
    hookable = hooked._hookable
    return hookable._pre_update_hooks, hookable._post_update_hooks


def float32_copy(param: chainer.Variable) -> chainer.Parameter | None:
    """Return the copy of a float16 parameter that ``use_fp32_update`` updates, if there is one. Local."""
    return getattr(getattr(param, "update_rule", None), "_fp32_param", None)


def forget_float32_copy(param: chainer.Parameter) -> None:
    """Let the next update make the copy anew from the parameter. Local."""
    param.update_rule._fp32_param = None

"""What is trained while scaling is measured: built-in models with generated data, or the user's own."""

from __future__ import annotations

import functools
import importlib.util
import numbers
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from chainer_dist.scaling.models import (
    CNN,
    MLP,
    TIMES,
    WORDS,
    LanguageModel,
    ResNet50,
    Transformer,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    import chainer

    # Given examples a rank and the rank, return a model and what it is called with for its loss.
    Make = Callable[[int, int], tuple[chainer.Link, tuple[Any, ...]]]

__all__ = ["WORKLOADS", "Workload", "draw_images", "draw_words", "load"]


class Workload(NamedTuple):
    """Something to train.

    Attributes:
        make: Given the number of examples of a batch and the rank, returns a model whose parameters may be of
            any value, and the arguments with which ``model(*arguments)`` is the loss of that rank's batch.
        batch: Default number of examples in a batch of one rank.
        text: Description in words.
        torch: Returns the same model as a torch module, called with tensors for its loss; None where there is
            none, so that torch cannot be measured.
        images: Whether it takes arrays of four dimensions (N, C, H, W), which torch may keep channels last.
    """

    make: Make
    batch: int
    text: str
    torch: Callable[[], Any] | None = None
    images: bool = False


def draw_images(*shape: int, classes: int) -> Callable[[int, int], tuple[Any, ...]]:
    """Return what draws a rank's batch of arrays and of their classes, given its size and the rank. Local.

    Args:
        *shape: Shape of one array, float32.
        classes: Number of classes.
    """

    def draw(batch: int, rank: int) -> tuple[Any, ...]:
        rng = np.random.RandomState(rank)
        x = rng.standard_normal((batch, *shape)).astype(np.float32)
        return x, rng.randint(0, classes, batch).astype(np.int32)

    return draw


def draw_words(
    n_words: int, times: int, classes: int | None
) -> Callable[[int, int], tuple[Any, ...]]:
    """Return what draws a rank's batch of sequences, given its size and the rank. Local.

    Args:
        n_words: How many different words there are.
        times: Words of a sequence.
        classes: How many classes of sequences there are, whose numbers are drawn, too; None for no classes.
    """

    def draw(batch: int, rank: int) -> tuple[Any, ...]:
        rng = np.random.RandomState(rank)
        words = rng.randint(0, n_words, (batch, times)).astype(np.int32)
        return (
            (words,)
            if classes is None
            else (words, rng.randint(0, classes, batch).astype(np.int32))
        )

    return draw


def _built_in(
    model: type[chainer.Link],
    draw: Callable[[int, int], tuple[Any, ...]],
    batch: int,
    text: str,
    *,
    images: bool = False,
) -> Workload:
    """Return a workload whose torch model has the name of Chainer's."""

    def twin() -> Any:
        from chainer_dist.scaling import torch_models

        return getattr(torch_models, model.__name__)()

    return Workload(lambda batch, rank: (model(), draw(batch, rank)), batch, text, twin, images)


WORKLOADS = {
    "mlp": _built_in(
        MLP,
        draw_images(784, classes=10),
        64,
        "perceptron of 22.6 million parameters (784, 6 x 2048, 10)",
    ),
    "cnn": _built_in(
        CNN,
        draw_images(3, 32, 32, classes=10),
        64,
        "three convolutions, images of 32 x 32",
        images=True,
    ),
    "resnet50": _built_in(
        ResNet50,
        draw_images(3, 224, 224, classes=1000),
        4,
        "ResNet-50, generated images of 224 x 224",
        images=True,
    ),
    "lstm": _built_in(
        LanguageModel,
        draw_words(WORDS, TIMES + 1, None),
        8,
        f"language model, 2 layers of LSTM, {WORDS:,} words, sequences of {TIMES}",
    ),
    "transformer": _built_in(
        Transformer, draw_words(1000, TIMES, 10), 32, f"2 encoder layers, sequences of {TIMES}"
    ),
}


@functools.cache
def load(name: str) -> Workload:
    """Return a built-in workload, or the user's own. Local.

    Args:
        name: One of :data:`WORKLOADS`, or ``file.py:function``, where the function is a
            :attr:`Workload.make`. It may have the attributes ``batch``, by default 32, ``torch`` and ``images``.

    Raises:
        ValueError: If there is none of this name, or its number of examples is none.
    """
    if name in WORKLOADS:
        return WORKLOADS[name]
    path, colon, function = name.rpartition(":")
    if not colon:
        raise ValueError(
            f"there is no workload {name!r}: give one of {', '.join(WORKLOADS)}, or file.py:function"
        )
    if not Path(path).is_file():
        raise ValueError(f"workload {name!r}: there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"workload {name!r}: {path!r} is no Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(spec.name, module)
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    make = getattr(module, function, None)
    if not callable(make):
        raise ValueError(  # noqa: TRY004 - as for every wrong name
            f"workload {name!r}: {path!r} has no function {function!r}"
        )
    batch = getattr(make, "batch", 32)
    if not isinstance(batch, numbers.Integral) or batch < 1:
        raise ValueError(f"workload {name!r}: its batch is {batch!r}, expected a number from 1 up")
    return Workload(
        make,
        int(batch),
        name,
        getattr(make, "torch", None),
        getattr(make, "images", False),
    )

"""Summarizing over all ranks what each of them observes."""

from __future__ import annotations

import io
import json
import pickle
import warnings
from typing import TYPE_CHECKING, Any

import chainer
import numpy as np
from chainer import backend, variable
from chainer import serializer as serializers
from chainer.training import extension, util

from chainer_dist.collectives.agreement import shared
from chainer_dist.collectives.calls import check_call
from chainer_dist.extensions._plain_values import pack, unpack

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from chainer_dist.communicators import CommunicatorBase


class ObservationAggregator(extension.Extension):  # type: ignore[misc]  # Chainer has no types
    """Replaces an observation of the trainer by its summary over all ranks. ChainerMN's extension.

    Each rank collects the values it observes. When the trigger fires, rank 0 summarizes the values
    of all ranks since the last time, and the summary becomes an observation on every rank, for
    LogReport and others that run after it.

    Every call is collective: extend the trainers of all ranks with it, and leave its own trigger
    at every iteration. Of ``comm_trigger`` rank 0's counts.

    For example, for the mean of the loss over all ranks::

        trainer.extend(chainer_dist.extensions.ObservationAggregator(comm, "main/loss", "mean/loss"))
        trainer.extend(extensions.LogReport())

    Args:
        comm: Communicator.
        original_key: Name of the observation. Ranks may lack it at any time.
        aggregated_key: Name of the summary; None replaces the observation itself.
        comm_trigger: When to summarize: a trigger or a tuple, such as ``(1, "epoch")``.
        aggregator: Function from the values of all ranks to their summary, or to None for no
            summary; called on rank 0. It takes a list with one list of values for each rank. A
            value is a new Variable, without the graph, if it was one, a number if it was any other
            scalar, an array in a new :class:`numpy.ndarray`, and else what it was. Summaries are
            sent, so they must be picklable. None takes the mean of all values, in double precision:
            scalars, arrays of one shape, and pairs of such a value and its weight. It is a float or
            an array, or a Variable with that, in the dtype of the values (float64 for integers), where
            Variables were observed; there is none where no rank has a value, or all have weight 0.

    Raises:
        Exception: From calls, on every rank, what the aggregator raises.
    """

    trigger = 1, "iteration"
    priority = extension.PRIORITY_EDITOR
    name = None

    def __init__(
        self,
        comm: CommunicatorBase,
        original_key: str,
        aggregated_key: str | None = None,
        *,
        comm_trigger: Any = (1, "iteration"),
        aggregator: Callable[[list[list[Any]]], Any] | None = None,
    ) -> None:
        check_call("ObservationAggregator(comm, original_key)", comm, original_key)
        self.comm = comm
        self.original_key = original_key
        self.aggregated_key = original_key if aggregated_key is None else aggregated_key
        self.comm_trigger = util.get_trigger(comm_trigger)
        self.observation_history: list[Any] = []  # numbers and arrays, which can be saved
        self._dtype: Any = None  # of what was observed last, if that was a Variable
        self.aggregator = aggregator or mean_of_all

    def compute_summary(self, trainer: chainer.training.Trainer) -> Any:
        """Take in the observation; return the summary where it is time for it. Collective.

        Returns:
            The summary on every rank, or None.
        """
        if self.original_key in trainer.observation:
            value = trainer.observation[self.original_key]
            self.observation_history.append(plain_value(value))
            self._dtype = value.dtype if isinstance(value, variable.Variable) else None
        # Ranks whose epochs are not equally long would not summarize together.
        if not self.comm.bcast_obj(self.comm_trigger(trainer)):
            return None
        history, self.observation_history = self.observation_history, []
        if self._dtype is not None:
            history = [variable.Variable(np.asarray(each, self._dtype)) for each in history]
        everyone: Any = self.comm.gather_obj(history)  # None on other ranks than 0
        return shared(self.comm, 0, lambda: self.aggregator(everyone))

    def __call__(self, trainer: chainer.training.Trainer) -> None:
        """Replace the observation where it is time for it. Collective."""
        summary = self.compute_summary(trainer)
        if summary is not None:
            trainer.observation[self.aggregated_key] = summary

    def serialize(self, serializer: Any, *, unseen: Sequence[Any] = ()) -> None:
        """Save or load this rank's values since the last summary, and the trigger. Local.

        Args:
            serializer: Chainer's.
            unseen: More values to save.

        Raises:
            TypeError: If a value to save is neither numbers nor arrays.
            ValueError: If values were saved by an earlier version, and need a pickle that can run code.
        """
        if isinstance(serializer, serializers.Deserializer):
            try:
                content = serializer("values", None).tobytes()
            except KeyError:
                warnings.warn(
                    f"there are no values of {self.original_key} in this snapshot, so the next "
                    "summary is of those observed from now on",
                    UserWarning,
                    stacklevel=2,
                )
                return
            self.observation_history = _load(content, serializer)
        else:
            packed, arrays = pack([*self.observation_history, *unseen])
            serializer("values", np.frombuffer(json.dumps(packed).encode(), dtype=np.uint8))
            serializer("n_arrays", len(arrays))
            for number, array in enumerate(arrays):
                serializer(f"array_{number}", array)
        if hasattr(self.comm_trigger, "serialize"):
            self.comm_trigger.serialize(serializer["comm_trigger"])


def _load(content: bytes, serializer: Any) -> list[Any]:
    """Return values that were saved."""
    if content.startswith(b"\x80"):  # earlier versions saved a pickle
        values: list[Any] = _NumbersOnly(io.BytesIO(content)).load()
        return values
    arrays = [serializer(f"array_{i}", None) for i in range(int(serializer("n_arrays", 0)))]
    loaded: list[Any] = unpack(json.loads(content), arrays)
    return loaded


class _NumbersOnly(pickle.Unpickler):
    """Loads what has nothing in it but numbers, text and lists of these: no pickle of that can run code."""

    def find_class(self, module: str, name: str) -> Any:
        """Refuse everything."""
        raise ValueError(
            f"the observations in this snapshot are a pickle with {module}.{name}, which could run any "
            "code; remove the extension for this resume, so that its next summary begins anew"
        )


def plain_value(value: Any) -> Any:
    """Return an observed value as numbers and NumPy arrays that nothing else changes. Local."""
    if isinstance(value, tuple):
        return tuple(plain_value(each) for each in value)
    if isinstance(value, variable.Variable):
        value = value.array
    if isinstance(value, chainer.get_array_types()):
        value = np.array(backend.CpuDevice().send(value))
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        return value.item()
    return value


def as_variable(mean: Any, dtype: Any) -> variable.Variable:
    """Return a mean as a Variable, of the dtype of the values, unless these were integers. Local."""
    return variable.Variable(np.asarray(mean, dtype if dtype.kind in "fc" else None))


def mean_of_all(everyone: list[list[Any]]) -> Any:
    """Return the mean of all ranks' values, or None if there are none, or they all have weight 0."""
    every = [value for values in everyone for value in values]
    pairs = [value if isinstance(value, tuple) else (plain_value(value), 1) for value in every]
    if not sum(weight for _, weight in pairs):
        return None
    values = np.asarray([value for value, _ in pairs])
    wide = values.astype(np.result_type(values, np.float64))
    mean = np.average(wide, axis=0, weights=[weight for _, weight in pairs])
    dtypes = [value.dtype for value in every if isinstance(value, variable.Variable)]
    if dtypes:
        return as_variable(mean, dtypes[0])
    return mean.item() if np.ndim(mean) == 0 else mean

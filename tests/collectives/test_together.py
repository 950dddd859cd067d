"""Code of users that leaves a rank within an operation of all ranks: the others are told."""

from __future__ import annotations

import types
from pathlib import Path

import chainer
import numpy as np
import pytest
from chainer import iterators
from chainer.training import extensions

import chainer_dist
from chainer_dist.checkpoints import Checkpoint
from chainer_dist.collectives.failures import together
from chainer_dist.datasets import shard_files
from chainer_dist.extensions import GenericMultiNodeEvaluator, ObservationAggregator
from chainer_dist.iterators import (
    DistributedIterator,
    create_multi_node_iterator,
    create_synchronized_iterator,
)
from chainer_dist.links import MultiNodeBatchNormalization

X = np.ones((4, 3), np.float32)


class Stopping:
    """A dataset, sampler, target or else, of which all that a user may write calls ``stop``."""

    def __init__(self, stop):
        self.stop = stop

    def __len__(self):
        self.stop()
        return 4

    def __getitem__(self, index):
        if index == 1:
            self.stop()
        return index

    def __reduce__(self):
        self.stop()
        return list, ()

    def __call__(self, *_):
        """Return what a file holds."""
        self.stop()
        return [0, 1]

    def serialize(self, serializer):
        """Save or load a number."""
        self.stop()
        serializer("x", np.zeros(1))


class StoppingLink(chainer.Link):
    """A link whose forward calls ``stop``."""

    def __init__(self, stop):
        super().__init__()
        self.stop = stop

    def forward(self, x):
        """Return the input."""
        self.stop()
        return chainer.as_variable(x) * 2.0


def serial(dataset, **options):
    """Return an iterator over a dataset, without repetition."""
    return iterators.SerialIterator(dataset, 2, repeat=False, shuffle=False, **options)


def trainer_of(out):
    """Return what extensions want of a trainer."""
    updater = types.SimpleNamespace(iteration=1, epoch_detail=1.0, is_new_epoch=True)
    return types.SimpleNamespace(updater=updater, out=out, observation={"x": 1.0})


def evaluate(comm, stop, _):
    """Evaluate a model."""
    evaluator = extensions.Evaluator(serial([1, 2]), StoppingLink(stop))
    return chainer_dist.create_multi_node_evaluator(evaluator, comm)()


def evaluate_generic(comm, stop, _):
    """Compute results."""

    class Own(GenericMultiNodeEvaluator):
        def calc_local(self, *_args, **_kwds):
            """Stop."""
            stop()

        def aggregate(self, results):
            return results

    return Own(comm, serial([1, 2]), None)(None)


def aggregate_generic(comm, stop, _):
    """Aggregate results."""

    class Own(GenericMultiNodeEvaluator):
        def calc_local(self, *_args, **_kwds):
            return 1

        def aggregate(self, results):
            stop()
            return results

    return Own(comm, serial([1, 2]), None, root=comm.size - 1)(None)


def aggregate(comm, stop, out):
    """Summarize observations."""
    ObservationAggregator(comm, "x", aggregator=lambda _: stop())(trainer_of(out))


def checkpoint(comm, stop, out):
    """Save with the checkpointer."""
    chainer_dist.create_multi_node_checkpointer("run", comm, path=str(out)).save(Stopping(stop), 1)


def load_checkpoint(comm, stop, out):
    """Load with the checkpointer."""
    checkpointer = chainer_dist.create_multi_node_checkpointer("run", comm, path=str(out))
    checkpointer.save(Stopping(lambda: None), 1)
    checkpointer.maybe_load(Stopping(stop), path=str(out))


def pipeline(comm, stop, _):
    """Rank by rank, the last one first, so that all others wait for the one that stops."""
    model = chainer_dist.MultiNodeChainList(comm)
    model.add_link(
        StoppingLink(stop),
        comm.rank + 1 if comm.rank + 1 < comm.size else None,
        comm.rank - 1 if comm.rank else None,
    )
    model(X)


def initialize(comm, stop, _):
    """Draw the first values of a batch normalization."""
    MultiNodeBatchNormalization(None, comm, axis=0, initial_gamma=lambda _: stop())(X)


def draw(comm, stop, _):
    """Draw an order."""
    calls = []

    def sample(*_):
        calls.append(1)
        if len(calls) > 1:  # not while the iterator is made
            stop()
        return np.arange(4)

    create_synchronized_iterator(iterators.SerialIterator([0] * 4, 2, order_sampler=sample), comm)


def read_on_master(comm, stop, _):
    """Read a batch."""
    iterator = create_multi_node_iterator(serial(Stopping(stop)), comm, rank_master=comm.size - 1)
    next(iterator)


def deal(comm, stop, _):
    """Deal out the items of a generator."""

    def items():
        yield from range(3)
        stop()

    list(chainer_dist.pmap(abs, items() if comm.rank == 0 else None, comm) or ())


def save(comm, stop, out):
    """Save a checkpoint."""
    target = StoppingLink(lambda: None)
    target.serialize = lambda _: stop()
    checkpoint = Checkpoint(comm, out, preemption=False)
    checkpoint.resume(target)
    checkpoint.save(target, 1)


def resume(comm, stop, out):
    """Load a checkpoint."""
    target = StoppingLink(lambda: None)
    Checkpoint(comm, out, preemption=False, asynchronous=False).resume(target)
    checkpoint = Checkpoint(comm, out, preemption=False, asynchronous=False)
    checkpoint.resume(target)
    checkpoint.save(target, 1)
    target.serialize = lambda _: stop()
    Checkpoint(comm, out, preemption=False).resume(target)


# The operation, and whether rank 0 is the one that runs the user's code.
OPERATIONS = {
    "together": (lambda comm, stop, _: within(comm, stop), False),
    "evaluator": (evaluate, False),
    "results of an evaluator": (evaluate_generic, False),
    "aggregation of results": (aggregate_generic, False),
    "observations": (aggregate, True),
    "checkpointer": (checkpoint, False),
    "loading": (load_checkpoint, False),
    "pipeline": (pipeline, False),
    "batch normalization": (initialize, False),
    "sampler": (draw, False),
    "reading on the master": (read_on_master, False),
    "input": (deal, True),
    "checkpoint": (save, False),
    "resuming": (resume, False),
    "length": (
        lambda comm, stop, _: DistributedIterator(Stopping(stop), 2, comm),
        False,
    ),
    "scatter": (
        lambda comm, stop, _: chainer_dist.scatter_dataset(Stopping(stop), comm),
        True,
    ),
    "files": (
        lambda comm, stop, _: shard_files(
            [str(rank) for rank in range(comm.size)], comm, open_file=Stopping(stop)
        ),
        False,
    ),
}


def within(comm, stop):
    """Stop."""
    with together(comm):
        stop()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, ArithmeticError])
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_rank_that_leaves(comm, name, kind, tmp_path):
    """It leaves as it wanted to, with its status; every other rank raises an error of that class."""
    act, on_rank_0 = OPERATIONS[name]
    leaver = 0 if on_rank_0 else comm.size - 1
    own = kind(3)
    left = []

    def stop():
        if comm.rank == leaver and not left:
            left.append(own)
            raise own

    out = Path(comm.bcast_obj(str(tmp_path)))
    with pytest.raises((kind, RuntimeError)) as caught:
        act(comm, stop, out)
    if comm.rank == leaver:
        assert left
        if not issubclass(kind, Exception):
            assert caught.value is own
    else:
        text = "exit with status 3" if kind is SystemExit else "3"
        assert f"rank {leaver}: " in str(caught.value)
        assert text in str(caught.value)
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))


def test_any_error_at_all(comm):
    """Of a class that generators cannot raise, too; and nothing happens where nothing is raised."""

    def end():
        with together(comm):
            if comm.rank == comm.size - 1:
                raise StopIteration("over")

    within(comm, lambda: None)
    with pytest.raises(StopIteration, match="over"):
        end()
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))

"""Arguments in the wrong places, and calls in the wrong order, are refused in one line that says it."""

from __future__ import annotations

import chainer
import chainer.links as L
import pytest
from chainer.training import extensions

import chainer_dist
from chainer_dist import iterators
from chainer_dist.collectives.calls import check_call
from chainer_dist.datasets import shard_array, shard_files
from chainer_dist.extensions import (
    AllreducePersistent,
    GenericMultiNodeEvaluator,
    ObservationAggregator,
    multi_node_snapshot,
)
from chainer_dist.links import create_mnbn_model


def iterator():
    """Return an iterator that is made alike on every rank."""
    return chainer.iterators.SerialIterator([1, 2, 3], 1, repeat=False, shuffle=False)


def evaluator():
    """Return an evaluator."""
    return extensions.Evaluator(iterator(), L.Linear(1, 1))


def sgd():
    """Return an optimizer."""
    return chainer.optimizers.SGD(0.1)


# Each call with its two first arguments exchanged.
SWAPPED = {
    "create_multi_node_optimizer": lambda comm: chainer_dist.create_multi_node_optimizer(
        comm, sgd()
    ),
    "create_local_sgd_optimizer": lambda comm: chainer_dist.create_local_sgd_optimizer(
        comm, sgd(), period=2
    ),
    "scatter_dataset": lambda comm: chainer_dist.scatter_dataset(comm, [1, 2]),
    "scatter_index": lambda comm: chainer_dist.scatter_index(comm, 2),
    "create_multi_node_evaluator": lambda comm: chainer_dist.create_multi_node_evaluator(
        comm, evaluator()
    ),
    "DistributedIterator": lambda comm: iterators.DistributedIterator(comm, 2, [1, 2]),
    "create_multi_node_iterator": lambda comm: iterators.create_multi_node_iterator(
        comm, iterator()
    ),
    "create_synchronized_iterator": lambda comm: iterators.create_synchronized_iterator(
        comm, iterator()
    ),
    "create_multi_node_updater": lambda comm: chainer_dist.create_multi_node_updater(comm, sgd()),
    "ObservationAggregator": lambda comm: ObservationAggregator("main/loss", comm),
    "multi_node_snapshot": lambda comm: multi_node_snapshot(extensions.snapshot(), comm, []),
    "AllreducePersistent": lambda comm: AllreducePersistent(comm, L.Linear(1, 1)),
    "GenericMultiNodeEvaluator": lambda comm: GenericMultiNodeEvaluator(iterator(), comm, None),
    "Checkpoint": lambda comm: chainer_dist.Checkpoint("folder", comm),
    "create_mnbn_model": lambda comm: create_mnbn_model(comm, L.Linear(1, 1)),
    "shard_array": lambda comm: shard_array(comm, "x.npy"),
    "shard_files": lambda comm: shard_files(comm, ["x.npy"]),
    "pmap": lambda comm: chainer_dist.pmap(abs, comm, [1]),
    "predict": lambda comm: chainer_dist.predict(comm, L.Linear(1, 1), [1]),
}


@pytest.mark.parametrize("name", SWAPPED)
def test_arguments_in_the_wrong_order(comm, name):
    """The line has the right call, and what stands where."""
    with pytest.raises(TypeError) as caught:
        SWAPPED[name](comm)
    text = str(caught.value)
    assert text.startswith(f"the call is {name}(")
    assert "=a communicator" in text
    assert text.endswith("; the arguments stand in the wrong order")
    assert "\n" not in text


def test_something_else_in_the_place(comm):
    """A class, a model, a name, nothing."""
    make = chainer_dist.create_multi_node_optimizer
    for optimizer, words in [(chainer.optimizers.SGD, "the class SGD"), (L.Linear(1, 1), "Linear")]:
        with pytest.raises(TypeError, match=rf"{words}.*must be an object with update\(\)"):
            make(optimizer, comm)
    for given in ("naive", None):
        with pytest.raises(TypeError, match=f"communicator={given!r}.*create_communicator"):
            make(sgd(), given)
    with pytest.raises(TypeError, match=r"must be an object with evaluate\(\)"):
        chainer_dist.create_multi_node_evaluator(iterator(), comm)
    with pytest.raises(TypeError, match=r"comm='x{59}\.\.\."):
        check_call("f(value, comm)", "x" * 1000, 1)


def test_update_before_setup(comm):
    """The line says which call is missing."""

    class Foreign:
        target = None

        def setup(self, link):
            """Take the target."""
            self.target = link

        def update(self, lossfun=None):
            """Do nothing."""

    for actual in (sgd(), Foreign()):
        optimizer = chainer_dist.create_multi_node_optimizer(actual, comm)
        with pytest.raises(RuntimeError, match=r"before setup\(\): call optimizer.setup\(model\)"):
            optimizer.update(lambda: None)

"""Results of all ranks' batches on one rank, against ChainerMN's class and one process."""

from __future__ import annotations

import functools
import importlib
import itertools

import chainer
import numpy as np
import pytest
from chainer import iterators
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import RankMismatchError
from chainer_dist.extensions import GenericMultiNodeEvaluator
from chainer_dist.iterators import create_multi_node_iterator

serial = functools.partial(iterators.SerialIterator, repeat=False, shuffle=False)


def total(x):
    """Return what the model makes of a batch: who it is, and that it is no training."""
    assert not chainer.config.train
    assert not chainer.config.enable_backprop
    return np.asarray(x).tolist()


@given(data=st.data(), batch_size=st.integers(1, 4))
def test_all_results_in_order(comm, data, batch_size):
    """However many batches ranks have, root gets all results, round by round in order of rank."""
    counts = data.draw(st.lists(st.integers(0, 9), min_size=comm.size, max_size=comm.size))
    root = data.draw(st.integers(0, comm.size - 1))
    shards = [[100 * rank + i for i in range(n)] for rank, n in enumerate(counts)]
    seen = []
    evaluator = GenericMultiNodeEvaluator(
        comm, serial(shards[comm.rank], batch_size), total, root=root, progress_hook=seen.append
    )
    batches = [
        [shard[i : i + batch_size] for i in range(0, len(shard), batch_size)] for shard in shards
    ]
    rounds = max(map(len, batches))
    expected = [each[i] for i in range(rounds) for each in batches if i < len(each)]
    for _ in range(2):
        assert evaluator(None) == (expected if comm.rank == root else None)
    assert seen == (2 * batches[root] if comm.rank == root else [])


def test_chainermn_gives_the_same(comm):
    """The results are ChainerMN's in the same order (as it has no empty shards, with none)."""
    chainermn = importlib.import_module("chainermn")
    theirs = chainermn.create_communicator("naive")

    def evaluate(module, communicator):
        shard = np.arange(comm.rank + 3.0)
        evaluator = module.GenericMultiNodeEvaluator(communicator, serial(shard, 2), np.sum)
        return evaluator(None)

    with chainer.using_config("train", value=False):
        expected = evaluate(chainermn.extensions, theirs)
    ours = evaluate(importlib.import_module("chainer_dist.extensions"), comm)
    assert ours == expected


class Ranked(GenericMultiNodeEvaluator):
    """A score that is no mean: the median of all values."""

    def calc_local(self, x, y=None):
        """Return the values, or nothing for a batch of negative ones."""
        values = x if y is None else x + y
        return None if (values < 0).any() else values.tolist()

    def aggregate(self, results):
        """Return and report the median."""
        median = float(np.median([*itertools.chain(*results)]))
        chainer.report({"median": median})
        return median


@pytest.mark.parametrize("form", [tuple, dict, list])
def test_overridden_methods_compute_the_score(comm, form):
    """Batches of any form reach calc_local; None is left out; aggregate runs on root alone."""
    values = [np.float64(4 * i + comm.rank) for i in range(3)] + [np.float64(-1)]
    samples = {
        tuple: [(v, np.float64(1)) for v in values if v >= 0] + [(values[-1], np.float64(-1))],
        dict: [{"x": v, "y": np.float64(1)} for v in values if v >= 0] + [{"x": values[-1]}],
        list: [v + (v >= 0) for v in values],
    }[form]
    evaluator = Ranked(comm, serial(samples, 1), None)
    with chainer.Reporter().scope(observation := {}):
        result = evaluator(None)
    everything = [4 * i + rank + 1 for i in range(3) for rank in range(comm.size)]
    if comm.rank == 0:
        assert result == observation["median"] == np.median(everything)
    else:
        assert (result, observation) == (None, {})


def test_without_communicator(tmp_path):
    """comm=None evaluates in this process alone (ChainerMN's class fails there)."""
    seen = []
    evaluator = Ranked(None, serial(np.arange(5.0), 2), None, progress_hook=seen.append)
    model = chainer.links.Linear(1, 1)
    optimizer = chainer.optimizers.SGD().setup(model)
    iterator = iterators.SerialIterator(np.ones((4, 1), np.float32), 2)
    updater = chainer.training.StandardUpdater(
        iterator, optimizer, loss_func=lambda x: chainer.functions.sum(model(x))
    )
    trainer = chainer.training.Trainer(updater, (1, "epoch"), out=str(tmp_path))
    log = chainer.training.extensions.LogReport(trigger=(1, "epoch"))
    trainer.extend(evaluator)
    trainer.extend(log)
    trainer.run()
    assert log.log[-1]["median"] == 2
    assert [len(batch) for batch in seen] == [2, 2, 1]
    assert GenericMultiNodeEvaluator(None, serial([], 2), None)(None) == []


class NoReset(chainer.dataset.Iterator):
    """An iterator that can only be copied."""

    position = 0

    def __next__(self):
        self.position += 1
        if self.position > 2:
            raise StopIteration
        return [self.position]


def test_iterators_of_any_kind(comm):
    """One without reset is copied; one of all ranks together is followed by all."""
    evaluator = GenericMultiNodeEvaluator(comm, NoReset(), total)
    everything = [[1]] * comm.size + [[2]] * comm.size
    for _ in range(2):
        assert evaluator(None) == (everything if comm.rank == 0 else None)
    plain = serial([1, 2, 3], 2) if comm.rank == 0 else None
    evaluator = GenericMultiNodeEvaluator(comm, create_multi_node_iterator(plain, comm), total)
    everything = [[1, 2]] * comm.size + [[3]] * comm.size
    for _ in range(2):
        assert evaluator(None) == (everything if comm.rank == 0 else None)


def test_errors_are_raised_on_all(comm):
    """Whatever fails on one rank, batch, result or aggregate, every rank raises and none waits."""
    last = comm.size - 1

    def fail(x):
        if comm.rank == last:
            raise ArithmeticError(f"cannot evaluate {x}")

    evaluator = GenericMultiNodeEvaluator(comm, serial([1.0] * (comm.rank + 2), 1), fail)
    with pytest.raises(ArithmeticError, match="cannot evaluate"):
        evaluator(None)
    evaluator.calc_local = lambda x: (lambda: x) if comm.rank == last else x
    if comm.size > 1:
        with pytest.raises(Exception, match="lambda"):
            evaluator(None)
    evaluator.calc_local = lambda x: x.item()
    evaluator.aggregate = lambda results: results[999]
    with pytest.raises(IndexError, match="list index"):
        evaluator(None)
    evaluator = GenericMultiNodeEvaluator(comm, iterators.SerialIterator([1.0], 1), fail)
    with pytest.raises(ValueError, match="repeat=False"):
        evaluator(None)
    with pytest.raises(ValueError, match=f"root is {comm.size}"):
        GenericMultiNodeEvaluator(comm, None, None, root=comm.size)
    if comm.size > 1:
        evaluator = GenericMultiNodeEvaluator(comm, serial([1.0], 1), fail, root=int(comm.rank > 0))
        with pytest.raises(RankMismatchError, match="rank 1: root is 1"):
            evaluator(None)

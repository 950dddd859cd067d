"""Evaluation on many ranks, against NumPy and plain Chainer on the whole set."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import warnings

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import datasets, iterators
from chainer.training.extensions import Evaluator
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import create_multi_node_evaluator
from chainer_dist.datasets import create_empty_dataset, scatter_dataset

ITERATORS = {
    "serial": lambda data, size: iterators.SerialIterator(data, size, repeat=False, shuffle=False),
    "shuffled": lambda data, size: iterators.SerialIterator(data, size, repeat=False),
    "threads": lambda data, size: iterators.MultithreadIterator(
        data, size, repeat=False, shuffle=True, n_threads=2
    ),
}


class Regressor(chainer.Chain):
    """Reports the mean error of a batch, which means nothing unless weighted by its size."""

    def __init__(self):
        super().__init__()
        self.batches = []

    def __call__(self, x, t):
        """Report the loss and the mean target of a batch."""
        self.batches.append(len(x))
        loss = F.mean((2 * x - t) ** 2)
        chainer.report({"loss": loss, "target": t.mean(), "text": [1, 2]}, self)
        return loss


def samples(n):
    """Return a dataset whose mean loss no subset of it has, and its true means."""
    x = np.arange(n, dtype=np.float64) ** 2
    t = 3.0 ** -np.arange(n)
    truth = {"main/loss": np.mean((2 * x - t) ** 2), "main/target": np.mean(t)}
    return datasets.TupleDataset(x, t), truth


def check(comm, result, truth):
    """Check a result against the truth, and that all ranks have the same bits of it."""
    assert result.keys() == truth.keys()
    for name, value in truth.items():
        assert isinstance(result[name], np.float64)
        np.testing.assert_allclose(result[name], value, rtol=1e-12)
    bits = [(name, value.tobytes()) for name, value in result.items()]
    assert comm.allgather_obj(bits) == [bits] * comm.size


@given(
    n=st.integers(1, 30),
    batch_size=st.integers(1, 9),
    shuffle=st.booleans(),
    equal=st.booleans(),
    iterator=st.sampled_from([*ITERATORS]),
)
def test_the_mean_is_that_of_the_whole_set(comm, n, batch_size, shuffle, equal, iterator):
    """Whatever the shards' sizes and duplicates, every sample counts once; twice over as well."""
    whole, truth = samples(n)
    part = scatter_dataset(whole, comm, shuffle=shuffle, seed=n, force_equal_length=equal)
    model = Regressor()
    plain = Evaluator(ITERATORS[iterator](part, batch_size), model)
    evaluator = create_multi_node_evaluator(plain, comm)
    assert evaluator is plain
    for _ in range(2):
        check(comm, evaluator(), truth)
    evaluator.finalize()
    if equal:  # every rank calls its model equally often, as a model split over ranks needs
        assert len(set(comm.allgather_obj(len(model.batches)))) == 1


def test_plain_chainer_agrees(comm):
    """Plain Chainer on the whole set, one sample a batch so that it is exact, gives the same."""
    whole, _ = samples(3 * comm.size + 2)
    alone = Evaluator(ITERATORS["serial"](whole, 1), Regressor())()
    part = scatter_dataset(whole, comm, shuffle=True, seed=3)
    evaluator = Evaluator(ITERATORS["shuffled"](part, 2), Regressor())
    check(comm, create_multi_node_evaluator(evaluator, comm)(), alone)


def test_worker_processes_keep_the_order(comm):
    """Batches of a MultiprocessIterator, shuffled, are known for what they are."""
    whole, truth = samples(3 * comm.size + 1)
    part = scatter_dataset(whole, comm, shuffle=True, seed=0)
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        iterator = iterators.MultiprocessIterator(
            part, 2, repeat=False, shuffle=True, n_processes=1, shared_mem=1000
        )
        evaluator = create_multi_node_evaluator(Evaluator(iterator, Regressor()), comm)
        for _ in range(2):
            check(comm, evaluator(), truth)
        evaluator.finalize()
    finally:
        multiprocessing.set_start_method(before, force=True)


def test_a_transformed_part_keeps_its_duplicates_known(comm):
    """A TransformDataset around a rank's part does not make duplicates count twice."""
    whole, truth = samples(2 * comm.size + 1)
    part = datasets.TransformDataset(scatter_dataset(whole, comm), lambda sample: sample)
    evaluator = Evaluator(ITERATORS["shuffled"](part, 2), Regressor())
    check(comm, create_multi_node_evaluator(evaluator, comm)(), truth)


def test_uneven_shards_of_any_origin(comm):
    """Datasets that were not scattered count by their sizes; one rank alone may have all."""
    whole, truth = samples(5 * comm.size)
    cuts = [0, *(rank * rank for rank in range(1, comm.size)), len(whole)]
    mine = whole[cuts[comm.rank] : cuts[comm.rank + 1]]
    evaluator = Evaluator(ITERATORS["serial"](mine, 3), Regressor())
    check(comm, create_multi_node_evaluator(evaluator, comm)(), truth)

    mine = whole[:] if comm.rank == comm.size - 1 else []
    evaluator = Evaluator(ITERATORS["shuffled"](mine, 3), Regressor(), progress_bar=True)
    check(comm, create_multi_node_evaluator(evaluator, comm)(), truth)


def test_no_samples_anywhere(comm):
    """Nothing to evaluate gives an empty result, as there is nothing to average."""
    evaluator = Evaluator(ITERATORS["serial"]([], 3), Regressor())
    assert create_multi_node_evaluator(evaluator, comm)() == {}


def test_only_some_ranks_report(comm):
    """Names are those that any rank reports; ranks that do not report one do not count for it."""

    class Tail(chainer.Chain):
        def __call__(self, *arrays):
            assert len(arrays) <= 2
            if comm.rank == comm.size - 1:
                chainer.report({"loss": 4.0}, self)

    dataset = np.zeros((4, 1)) if comm.rank == comm.size - 1 else create_empty_dataset([0] * 7)
    iterator = ITERATORS["serial"](dataset, 2)
    evaluator = Evaluator(iterator, Tail(), converter=lambda batch, _: tuple(batch))
    assert create_multi_node_evaluator(evaluator, comm)() == {"main/loss": 4.0}


def test_own_weights_are_kept(comm):
    """A value reported with its weight counts by that, as in Chainer; weight 0 does not count."""

    def count(t):
        present = (t % 3 == 0).sum()
        value = t[t % 3 == 0].mean() if present else 0.0
        total = chainer.Variable(np.asarray(t.sum()))
        chainer.report({"third": (value, present), "v": (total, np.array(1))})

    n = 5 * comm.size + 1
    part = scatter_dataset(np.arange(float(n)), comm, force_equal_length=False)
    model = Regressor()
    evaluator = Evaluator(ITERATORS["shuffled"](part, 2), model, eval_func=count)
    result = create_multi_node_evaluator(evaluator, comm)()
    batches = sum(comm.allgather_obj(-(-len(part) // 2)))
    truth = {"third": np.arange(0.0, n, 3).mean(), "v": n * (n - 1) / 2 / batches}
    check(comm, result, truth)
    assert not model.batches

    evaluator.eval_func = lambda _: chainer.report({"bad": (1.0, np.ones(2))})
    with pytest.raises(ValueError, match="weight reported with bad is not a scalar"):
        evaluator()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.int64, np.complex64, bool])
def test_sums_are_in_double_precision(comm, dtype):
    """Values of any dtype are averaged in float64, or complex128."""

    def report(x):
        chainer.report({"x": x.reshape(())})

    values = np.arange(3000 * comm.size).astype(dtype)
    part = scatter_dataset(values, comm)
    evaluator = Evaluator(ITERATORS["serial"](part, 1), Regressor(), eval_func=report)
    result = create_multi_node_evaluator(evaluator, comm)()["x"]
    wide = values.astype(np.complex128 if dtype is np.complex64 else np.float64)
    assert result.dtype == wide.dtype
    np.testing.assert_allclose(result, wide.mean(), rtol=1e-12)


def test_evaluators_options_work_as_before(comm):
    """Hook, function, converter, name, device and the trainer's prefix are Chainer's."""
    calls = []
    part = scatter_dataset([{"x": float(i)} for i in range(2 * comm.size)], comm)
    model = Regressor()

    def converter(batch, device):
        calls.append(("convert", len(batch), str(device)))
        return {"x": np.array([sample["x"] for sample in batch])}

    def evaluate(x):
        calls.append(("train", chainer.config.train, chainer.config.enable_backprop))
        chainer.report({"mean": x.mean()}, model)

    evaluator = Evaluator(
        ITERATORS["serial"](part, 2),
        model,
        converter,
        device=-1,
        eval_hook=lambda evaluator: calls.append(("hook", evaluator.name)),
        eval_func=evaluate,
    )
    evaluator.name = "test"
    create_multi_node_evaluator(evaluator, comm)
    reporter = chainer.Reporter()
    with reporter:
        result = evaluator()
    assert calls == [("hook", "test"), ("convert", 2, "-1"), ("train", False, False)]
    assert result == reporter.observation == {"test/main/mean": comm.size - 0.5}
    assert isinstance(evaluator, Evaluator)


def test_progress_bar_on_rank_0_only(comm, monkeypatch):
    """A progress bar of every rank on one terminal would be unreadable."""
    written = io.StringIO()
    monkeypatch.setattr("sys.stdout", written)
    part = scatter_dataset(samples(6 * comm.size)[0], comm)
    evaluator = Evaluator(ITERATORS["serial"](part, 2), Regressor(), progress_bar=True)
    evaluator = create_multi_node_evaluator(evaluator, comm)
    evaluator()
    assert ("validation [" in written.getvalue()) == (comm.rank == 0)


class OwnEvaluator(Evaluator):
    """Overrides `evaluate`, as Chainer's documentation shows it."""

    def evaluate(self):
        """Return the mean of the dataset, and an array."""
        iterator = self.get_iterator("main")
        iterator.reset()
        values = np.concatenate([np.asarray(batch) for batch in iterator])
        return {"mean": values.mean(), "array": np.array([1.0, values[0]])}


def test_an_overridden_evaluate_is_weighted(comm):
    """The means of a class with an `evaluate` of its own count by their ranks' samples."""
    n = 3 * comm.size - 1
    part = scatter_dataset(np.arange(float(n)), comm, force_equal_length=False)
    iterator = ITERATORS["serial"](part, 2)
    evaluator = create_multi_node_evaluator(OwnEvaluator(iterator, Regressor()), comm)
    result = evaluator()
    np.testing.assert_allclose(result["mean"], (n - 1) / 2, rtol=1e-14)
    firsts = comm.allgather_obj((part[0], len(part)))
    np.testing.assert_allclose(result["array"], [1, sum(f * k for f, k in firsts) / n])

    empty = part if comm.rank == comm.size - 1 else []
    alone = OwnEvaluator(ITERATORS["serial"](empty, 2), Regressor())
    expected = comm.bcast_obj(np.mean(part), root=comm.size - 1)
    assert create_multi_node_evaluator(alone, comm)()["mean"] == expected


class OwnIterator(iterators.SerialIterator):
    """An iterator whose order nobody knows."""

    def __next__(self):
        return super().__next__()[::-1]


class OwnDataset(chainer.dataset.DatasetMixin):
    """A user's dataset around another."""

    def __init__(self, base):
        self.base = base

    def __len__(self):
        return len(self.base)

    def get_example(self, i):
        """Return the i-th example from the end."""
        return self.base[len(self.base) - 1 - i]


@pytest.mark.parametrize(
    ("iterator_type", "dataset_type"),
    [(OwnIterator, lambda part: part), (iterators.SerialIterator, OwnDataset)],
    ids=["iterator", "dataset"],
)
def test_an_unknown_order_is_warned_of_once(iterator_type, dataset_type, comm):
    """Duplicates that cannot be told count, with one warning that says what to do."""
    whole, _ = samples(2 * comm.size + 1)
    part = scatter_dataset(whole, comm)
    iterator = iterator_type(dataset_type(part), 2, repeat=False, shuffle=False)
    evaluator = create_multi_node_evaluator(Evaluator(iterator, Regressor()), comm)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first, second = evaluator(), evaluator()
    duplicates = part.n_own < len(part)
    told = [each for each in caught if "force_equal_length=False" in str(each.message)]
    assert len(told) == duplicates
    everything = [*itertools.chain(*comm.allgather_obj([t for _, t in part]))]
    np.testing.assert_allclose(first["main/target"], np.mean(everything), rtol=1e-12)
    assert second == first


class BareIterator(chainer.dataset.Iterator):
    """An iterator without `reset` and dataset, as old user code has them."""

    def __init__(self, batches):
        self.batches = batches
        self.done = 0

    def __next__(self):
        if self.done == len(self.batches):
            raise StopIteration
        self.done += 1
        return self.batches[self.done - 1]


def test_iterators_without_reset_are_copied(comm):
    """Chainer's deprecated way of repeating an evaluation still works."""
    iterator = BareIterator([[(1.0, 2.0)], [(4.0, 6.0), (5.0, 7.0)]])
    evaluator = create_multi_node_evaluator(Evaluator(iterator, Regressor()), comm)
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match="does not have the reset method"):
            result = evaluator()
        check(comm, result, {"main/loss": 13 / 3, "main/target": 5.0})


def test_an_error_on_one_rank_is_raised_on_all(comm):
    """A model that fails on the last rank makes every rank raise, and none wait."""

    def fail(x, t):
        if comm.rank == comm.size - 1:
            raise ArithmeticError(f"the model failed at {x} and {t}")

    part = scatter_dataset(samples(3 * comm.size)[0], comm)
    evaluator = Evaluator(ITERATORS["serial"](part, 2), Regressor(), eval_func=fail)
    with pytest.raises(ArithmeticError, match="the model failed"):
        create_multi_node_evaluator(evaluator, comm)()


def test_patching_twice_changes_nothing(comm):
    """Creating it again, perhaps for another communicator, evaluates once and counts once."""
    whole, truth = samples(3 * comm.size + 1)
    evaluator = Evaluator(ITERATORS["serial"](scatter_dataset(whole, comm), 2), Regressor())
    for _ in range(2):
        evaluator = create_multi_node_evaluator(evaluator, comm)
    check(comm, evaluator(), truth)


def test_a_trainer_logs_the_mean(comm, tmp_path):
    """As a Trainer's extension it reports under the names that Chainer's Evaluator has."""
    whole, truth = samples(2 * comm.size + 1)
    part = scatter_dataset(whole, comm)
    model = Regressor()
    optimizer = chainer.optimizers.SGD().setup(model)
    updater = chainer.training.StandardUpdater(iterators.SerialIterator(part, 2), optimizer)
    trainer = chainer.training.Trainer(updater, (1, "epoch"), out=str(tmp_path))
    evaluator = Evaluator(ITERATORS["serial"](part, 2), model)
    trainer.extend(create_multi_node_evaluator(evaluator, comm))
    log = chainer.training.extensions.LogReport(trigger=(1, "epoch"))
    trainer.extend(log)
    trainer.run()
    for name, value in truth.items():
        np.testing.assert_allclose(log.log[-1][f"validation/{name}"], value, rtol=1e-12)

"""Summaries of all ranks' observations, against NumPy on all values."""

from __future__ import annotations

import pickle
import types

import chainer
import numpy as np
import pytest
from chainer.serializers import DictionarySerializer, NpzDeserializer
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.extensions import ObservationAggregator
from damage import Attack


def trainer_at(iteration, observation, epoch_length=5):
    """Return what an extension sees of a trainer."""
    updater = types.SimpleNamespace(iteration=iteration, epoch_detail=iteration / epoch_length)
    return types.SimpleNamespace(updater=updater, observation=observation)


@given(data=st.data(), period=st.integers(1, 4))
def test_the_mean_of_all_values(comm, data, period):
    """Whichever ranks observe in which iteration, the mean counts every value since the last."""
    values = st.one_of(st.none(), st.floats(-1e3, 1e3))
    rows = st.lists(values, min_size=comm.size, max_size=comm.size)
    observed = data.draw(st.lists(rows, min_size=8, max_size=8))
    aggregator = ObservationAggregator(
        comm, "loss", aggregated_key="mean", comm_trigger=(period, "iteration")
    )
    pending = []
    for i, row in enumerate(observed, start=1):
        own = row[comm.rank]
        trainer = trainer_at(i, {} if own is None else {"loss": own})
        aggregator(trainer)
        pending += [value for value in row if value is not None]
        if i % period == 0 and pending:
            np.testing.assert_allclose(trainer.observation["mean"], np.mean(pending), atol=1e-9)
            assert type(trainer.observation["mean"]) is float
        else:
            assert "mean" not in trainer.observation
        assert trainer.observation.get("loss") == own
        if i % period == 0:
            pending = []


KINDS = {
    "float": lambda x: x,
    "float32": np.float32,
    "float16 array": lambda x: np.array(x, np.float16),
    "int": int,
    "variable": lambda x: chainer.Variable(np.array(x, np.float32)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_values_of_any_kind_are_numbers(comm, kind):
    """An aggregator gets plain numbers, or Variables, in one list a rank; the observation is left alone."""
    value = KINDS[kind](comm.rank + 1.0)
    got = []

    def aggregate(everyone):
        if kind == "variable":
            assert {type(each) for row in everyone for each in row} == {chainer.Variable}
            everyone = [[each.array.item() for each in row] for row in everyone]
        got.extend(everyone)
        return {"sum": sum(map(sum, everyone))}

    aggregator = ObservationAggregator(
        comm, "x", comm_trigger=(2, "iteration"), aggregator=aggregate
    )
    first = trainer_at(1, {"x": value})
    aggregator(first)
    assert first.observation["x"] is value
    second = trainer_at(2, {"x": value})
    assert aggregator.compute_summary(second) == {"sum": comm.size * (comm.size + 1)}
    assert second.observation["x"] is value
    if comm.rank == 0:
        assert got == [[rank + 1] * 2 for rank in range(comm.size)]
        assert {type(number) for row in got for number in row} <= {float, int}
    else:
        assert got == []


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_the_mean_of_variables_is_a_variable(comm, shape):
    """Scripts for ChainerMN take ``.array`` of it; the graph that it came from is left behind."""
    x = chainer.Parameter(np.full(shape, comm.rank, np.float32))
    y = x * 2
    aggregator = ObservationAggregator(comm, "x", "mean")
    trainer = trainer_at(1, {"x": y})
    aggregator(trainer)
    mean = trainer.observation["mean"]
    assert type(mean) is chainer.Variable
    assert mean.dtype == np.float32
    assert mean.creator is None
    np.testing.assert_array_equal(mean.array, np.full(shape, comm.size - 1, np.float32))
    assert trainer.observation["x"] is y
    assert y.creator is not None
    trainer = trainer_at(2, {"x": 1.0})
    aggregator(trainer)
    assert type(trainer.observation["mean"]) is float


def test_the_mean_of_integer_variables_is_not_rounded(comm):
    """A number of right answers, say, is on average no integer."""
    trainer = trainer_at(1, {"x": chainer.Variable(np.array(comm.rank))})
    ObservationAggregator(comm, "x")(trainer)
    assert float(trainer.observation["x"].array) == (comm.size - 1) / 2


def test_arrays_and_weights(comm):
    """Arrays are averaged in double precision as they were then; weighted values by weight."""
    aggregator = ObservationAggregator(comm, "x", comm_trigger=(2, "iteration"))
    value = np.full((2, 3), comm.rank, np.float32)
    aggregator(trainer_at(1, {"x": value}))
    value += 1
    trainer = trainer_at(2, {"x": value})
    aggregator(trainer)
    assert trainer.observation["x"].dtype == np.float64
    np.testing.assert_array_equal(trainer.observation["x"], np.full((2, 3), comm.size / 2))
    assert (value == comm.rank + 1).all()

    aggregator = ObservationAggregator(comm, "x")
    trainer = trainer_at(1, {"x": (np.float32(comm.rank), comm.rank + 1)})
    aggregator(trainer)
    ranks = np.arange(comm.size)
    assert trainer.observation["x"] == np.average(ranks, weights=ranks + 1)


def test_values_without_weight_give_no_summary(comm):
    """A batch may have nothing that counts on any rank, such as only padding."""
    for value, dtype in ((0.5, float), (np.ones(2), np.ndarray)):
        trainer = trainer_at(1, {"x": (value, 0)})
        ObservationAggregator(comm, "x", "mean")(trainer)
        assert "mean" not in trainer.observation
        trainer = trainer_at(1, {"x": (value, int(comm.rank == comm.size - 1))})
        ObservationAggregator(comm, "x", "mean")(trainer)
        np.testing.assert_array_equal(trainer.observation["mean"], value)
        assert isinstance(trainer.observation["mean"], dtype)


def test_rank_0s_trigger_counts(comm):
    """Ranks whose epochs end in different iterations summarize together when rank 0's does."""
    aggregator = ObservationAggregator(comm, "x", comm_trigger=(1, "epoch"))
    summarized = []
    for i in range(1, 13):
        trainer = trainer_at(i, {"x": 1.0 * i + comm.rank}, epoch_length=4 + comm.rank)
        if aggregator.compute_summary(trainer) is not None:
            summarized.append(i)
    assert summarized == [4, 8, 12]


def test_nothing_observed_gives_no_summary(comm):
    """Without any value on any rank there is no summary, and no error (ChainerMN's rank 0 fails)."""
    trainer = trainer_at(1, {"other": 1})
    aggregator = ObservationAggregator(comm, "x")
    assert aggregator.compute_summary(trainer) is None
    aggregator(trainer)
    assert trainer.observation == {"other": 1}


def test_errors_are_raised_on_all(comm):
    """An aggregator that fails, or values that cannot be sent, raise on every rank; then it works."""
    last = comm.size - 1

    def aggregate(everyone):
        return everyone[999] if None in everyone[-1] else len(everyone)

    aggregator = ObservationAggregator(comm, "x", aggregator=aggregate)
    with pytest.raises(IndexError, match="list index"):
        aggregator(trainer_at(1, {"x": None}))
    if comm.size > 1:
        with pytest.raises(Exception, match="lambda"):
            aggregator(trainer_at(2, {"x": (lambda: 1) if comm.rank == last else 1}))
        aggregator.aggregator = lambda _: lambda: 1
        with pytest.raises(Exception, match="lambda"):
            aggregator(trainer_at(3, {"x": 1}))
        aggregator.aggregator = aggregate
    trainer = trainer_at(4, {"x": 1})
    aggregator(trainer)
    assert trainer.observation["x"] == comm.size


def test_a_resume_keeps_pending_values(comm):
    """Values that were observed before a snapshot count in the summary after it."""
    expected = np.mean([i + rank for i in range(1, 5) for rank in range(comm.size)])

    def make():
        return ObservationAggregator(comm, "x", "mean", comm_trigger=(4, "iteration"))

    aggregator = make()
    for i in (1, 2):
        aggregator(trainer_at(i, {"x": np.float32(i + comm.rank)}))
    serializer = DictionarySerializer()
    serializer.save(aggregator)
    aggregator = make()
    NpzDeserializer({key: np.asarray(v) for key, v in serializer.target.items()}).load(aggregator)
    for i in (3, 4):
        trainer = trainer_at(i, {"x": i + comm.rank})
        aggregator(trainer)
    assert trainer.observation["mean"] == expected
    with pytest.warns(UserWarning, match="no values of x in this snapshot"):
        NpzDeserializer({}).load(aggregator)


def test_in_a_trainer_log_report_sees_the_mean(comm, tmp_path):
    """Extensions that run later in the iteration, such as LogReport, log the summary."""
    model = chainer.links.Linear(1, 1, initialW=comm.rank + 1)
    optimizer = chainer.optimizers.SGD(0).setup(model)
    iterator = chainer.iterators.SerialIterator(np.ones((4, 1), np.float32), 2)

    def loss(x):
        chainer.report({"y": chainer.functions.mean(model(x))}, model)
        return chainer.functions.sum(model(x))

    updater = chainer.training.StandardUpdater(iterator, optimizer, loss_func=loss)
    trainer = chainer.training.Trainer(updater, (2, "epoch"), out=str(tmp_path))
    log = chainer.training.extensions.LogReport(trigger=(1, "epoch"))
    trainer.extend(log)
    trainer.extend(ObservationAggregator(comm, "main/y"))
    trainer.run()
    assert [entry["main/y"] for entry in log.log] == [(comm.size + 1) / 2] * 2


def test_snapshots_need_no_pickle(comm, tmp_path):
    """Values of any kind; those of earlier versions, if they are numbers; and nothing that could run code."""
    values = [1.5, (2, 3), np.arange(3), {"a": [None, np.float32(4)]}]
    aggregator = ObservationAggregator(comm, "x")
    aggregator.observation_history = values
    serializer = DictionarySerializer()
    serializer.save(aggregator)
    assert not any(np.asarray(each).dtype.hasobject for each in serializer.target.values())
    again = ObservationAggregator(comm, "x")
    loaded = {key: np.asarray(each) for key, each in serializer.target.items()}
    NpzDeserializer(loaded).load(again)
    assert repr(again.observation_history) == repr(values)

    def before(content):
        return NpzDeserializer({**loaded, "values": np.frombuffer(pickle.dumps(content), np.uint8)})

    before([1.5, (2, 3)]).load(again)
    assert again.observation_history == [1.5, (2, 3)]
    with pytest.raises(ValueError, match="could run any code"):
        before([Attack(tmp_path / "marker")]).load(again)
    assert not (tmp_path / "marker").exists()

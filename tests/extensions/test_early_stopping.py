"""Stopping together, against Chainer's trigger in one process that sees the mean."""

from __future__ import annotations

import warnings

import chainer
import numpy as np
import pytest
from chainer.training.triggers import EarlyStoppingTrigger, IntervalTrigger
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.extensions import MultiNodeEarlyStoppingTrigger


def make_trainer(stop_trigger, losses, out, n=6, value=None):
    """Return a trainer that observes the given losses, one an iteration, epochs of n / 2."""
    model = chainer.links.Linear(1, 1)
    iterator = chainer.iterators.SerialIterator(np.ones((n, 1), np.float32), 2, shuffle=False)

    def loss(x):
        nothing = chainer.functions.sum(0 * model(x))
        now = losses[updater.iteration % len(losses)]
        if now is not None:
            chainer.report({"loss": value(now) if value else now}, model)
        return nothing

    optimizer = chainer.optimizers.SGD().setup(model)
    updater = chainer.training.StandardUpdater(iterator, optimizer, loss_func=loss)
    return chainer.training.Trainer(updater, stop_trigger, out=str(out))


@pytest.fixture
def out(tmp_path):
    """Return a folder whose path hypothesis may use for all examples."""
    return tmp_path


@given(
    data=st.data(),
    patience=st.integers(1, 3),
    mode=st.sampled_from(["min", "max", "auto"]),
    check=st.sampled_from([(1, "epoch"), (2, "iteration"), (1, "iteration")]),
    as_trigger=st.sampled_from([lambda *args: args, IntervalTrigger]),
)
def test_it_stops_when_one_process_would(comm, out, data, patience, mode, check, as_trigger):
    """With ranks that see other losses, all stop where Chainer's trigger stops on the mean."""
    values = st.integers(-3, 3).map(lambda i: i * comm.size)  # so that all means are exact
    row = st.lists(values, min_size=comm.size, max_size=comm.size)
    losses = data.draw(st.lists(row, min_size=15, max_size=15))
    options = {"patience": patience, "mode": mode, "check_trigger": check}
    options["max_trigger"] = (15, "iteration")
    alone = make_trainer(
        EarlyStoppingTrigger(**options), [float(np.mean(each)) for each in losses], out
    )
    alone.run()
    options["check_trigger"] = as_trigger(*check)
    trigger = MultiNodeEarlyStoppingTrigger(comm, **options)
    together = make_trainer(
        trigger, [each[comm.rank] for each in losses], out, value=lambda x: np.array(x, np.float32)
    )
    together.run()
    assert together.updater.iteration == alone.updater.iteration
    assert trigger.get_training_length() == (15, "iteration")


def test_ranks_with_other_epochs_stop_together(comm, out):
    """Parts of different lengths end epochs in different iterations; rank 0's stop all."""
    trigger = MultiNodeEarlyStoppingTrigger(comm, patience=2, max_trigger=(5, "epoch"))
    trainer = make_trainer(trigger, [1.0], out, n=6 + 2 * comm.rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # other ranks' own triggers miss the mean
        trainer.run()
    assert trainer.updater.iteration == 9
    trigger = MultiNodeEarlyStoppingTrigger(comm, patience=99, max_trigger=(2, "epoch"))
    trainer = make_trainer(trigger, [1.0], out, n=8 - 2 * (comm.rank > 0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer.run()
    assert trainer.updater.iteration == 8


def test_a_value_only_one_rank_observes(comm, out):
    """A metric that one rank alone reports, now and then, stops all ranks."""
    losses = [None, None, 1.0] if comm.rank == comm.size - 1 else [None]
    trigger = MultiNodeEarlyStoppingTrigger(comm, patience=2, suffix="/mean")
    trainer = make_trainer(trigger, losses, out)
    trainer.run()
    assert trainer.updater.iteration == 9
    assert trainer.observation["main/loss/mean"] == 1


@pytest.mark.parametrize("check", [(1, "epoch"), (2, "iteration")])
@pytest.mark.parametrize("save_at", [3, 4, 5, 6, 8])
def test_a_resume_stops_where_it_would_have(comm, out, save_at, check):
    """Best mean, count and pending values are in a snapshot, also one taken just before a check."""
    losses = [9, 8, 7, 9, 9, 0, 9, 9, 9, 9, 9, 9, 1, 1]

    def make():
        trigger = MultiNodeEarlyStoppingTrigger(comm, check_trigger=check, patience=2)
        trainer = make_trainer(trigger, [loss + comm.rank for loss in losses], folder)
        return trainer, trigger

    folder = out / str(comm.rank)
    whole, expected = make()
    whole.extend(
        chainer.training.extensions.snapshot(filename="{.updater.iteration}"),
        trigger=(1, "iteration"),
    )
    whole.run()
    assert save_at < whole.updater.iteration < len(losses)
    resumed, trigger = make()
    resumed.extend(
        chainer.training.extensions.snapshot(filename="again"), trigger=(99, "iteration")
    )
    chainer.serializers.load_npz(str(folder / str(save_at)), resumed)
    resumed.run()
    assert resumed.updater.iteration == whole.updater.iteration
    assert (trigger.actual_trigger.best, trigger.actual_trigger.count) == (
        expected.actual_trigger.best,
        expected.actual_trigger.count,
    )


def test_snapshots_without_its_state(comm, out):
    """A snapshot of a trainer with another stop trigger loads; patience then starts anew."""
    with_trigger = make_trainer(MultiNodeEarlyStoppingTrigger(comm), [1.0], out)
    plain = make_trainer((1, "epoch"), [1.0], out)
    plain.run()
    file = out / "plain.npz"
    serializer = chainer.serializers.DictionarySerializer()
    plain.updater.serialize(serializer["updater"])
    serializer("_snapshot_elapsed_time", 0.0)
    chainer.serializers.save_npz(str(file), serializer.target)
    with pytest.warns(UserWarning, match="patience starts anew"):
        chainer.serializers.load_npz(str(file), with_trigger)
    assert with_trigger.updater.iteration == 3


def test_patients_is_patience(comm):
    """The old spelling of patience works, and both together are an error, as in Chainer."""
    assert MultiNodeEarlyStoppingTrigger(comm).actual_trigger.patience == 3
    assert MultiNodeEarlyStoppingTrigger(comm, patients=7).actual_trigger.patience == 7
    with pytest.raises(TypeError, match="patients"):
        MultiNodeEarlyStoppingTrigger(comm, patience=1, patients=1)

"""Snapshots of all ranks' trainers, against training that is not interrupted."""

from __future__ import annotations

import os
import time
import warnings
from pathlib import Path

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators, training
from chainer.training import extensions

from chainer_dist import (
    RankMismatchError,
    create_communicator,
    create_multi_node_optimizer,
    scatter_dataset,
)
from chainer_dist.extensions import multi_node_snapshot
from chainer_dist.iterators import DistributedIterator
from damage import DAMAGES, Attack, damage

DATA = [(np.array([i, i * i % 7], np.float32), i % 3) for i in range(24)]


@pytest.fixture
def out(comm, tmp_path):
    """Return one folder for all ranks."""
    return Path(comm.bcast_obj(str(tmp_path)))


def make_trainer(comm, out, stop=6, snapshot=None, sets=(0,), iterator=None):
    """Return a trainer; rank 0's has a log, which the others have not."""
    np.random.seed(0)
    model = L.Classifier(L.Linear(2, 3))
    optimizer = create_multi_node_optimizer(chainer.optimizers.Adam(0.01), comm).setup(model)
    if iterator is None:
        iterator = iterators.SerialIterator(scatter_dataset(DATA, comm), 2)
    updater = training.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (stop, "iteration"), out=str(out))
    if comm.rank == 0:
        trainer.extend(extensions.LogReport(trigger=(1, "iteration")))
    if snapshot is not None:
        trainer.extend(multi_node_snapshot(comm, snapshot, sets), trigger=(1, "iteration"))
    return trainer


def snapshot(**options):
    """Return a snapshot extension with a short file name."""
    return extensions.snapshot(filename="at_{.updater.iteration}", autoload=True, **options)


def state(trainer):
    """Return weights and Adam's state as one array."""
    model = trainer.updater.get_optimizer("main").target
    rows = [
        array.ravel()
        for _, param in sorted(model.namedparams())
        for array in [param.array, *map(np.asarray, param.update_rule.state.values())]
    ]
    return np.concatenate(rows)


def files(comm, out):
    """Return the names of all snapshots, after all ranks are done."""
    comm.mpi_comm.Barrier()
    found = {path.name for path in out.iterdir() if path.name.startswith("at_")}
    comm.mpi_comm.Barrier()
    return found


SETS = {  # sets for a number of ranks, and the ranks that save
    "all": lambda _: ([], {0}),
    "0": lambda size: ([0], {0, min(1, size - 1)}),
    "each": lambda size: (list(range(size)), {*range(size)}),
    "even and odd": lambda size: ([range(0, size, 2)], {0, min(1, size - 1)}),
}


@pytest.mark.parametrize("kind", SETS)
def test_a_resume_is_exact(comm, out, kind):
    """Whatever the replica sets, a resumed training ends where one without interruption does."""
    sets, masters = SETS[kind](comm.size)
    # Ranks of one set load one file, so they must have one order.
    whole = make_trainer(comm, out / "whole", iterator=DistributedIterator(DATA, 2, comm, seed=1))
    whole.run()
    first = make_trainer(comm, out, 3, snapshot(), sets, DistributedIterator(DATA, 2, comm, seed=1))
    first.run()
    assert files(comm, out) == {f"at_{i}.{rank}" for i in (1, 2, 3) for rank in masters}
    second = make_trainer(
        comm, out, 6, snapshot(), sets, DistributedIterator(DATA, 2, comm, seed=2)
    )
    second.run()
    assert second.updater.iteration == 6
    np.testing.assert_allclose(state(second), state(whole), rtol=1e-6)
    if comm.rank == 0:
        log = second.get_extension("LogReport").log
        assert [entry["iteration"] for entry in log] == [1, 2, 3, 4, 5, 6]


def test_more_and_fewer_ranks(comm, out):
    """What some ranks saved loads on more and on fewer ranks, and training goes on together."""
    if comm.size == 1:
        pytest.skip("one rank has no other numbers of ranks within")
    part = comm.split(int(comm.rank == 0), comm.rank)
    wide = make_trainer(comm, out / "wide", 3, snapshot())
    wide.run()
    if comm.rank == 0:
        narrow = make_trainer(part, out / "wide", 5, snapshot())
        narrow.run()
        assert narrow.updater.iteration == 5
        one = make_trainer(part, out / "one", 3, snapshot())
        one.run()
        np.save(out / "one.npy", state(one))
    comm.mpi_comm.Barrier()
    grown = make_trainer(comm, out / "one", 3, snapshot())
    grown.run()
    np.testing.assert_array_equal(state(grown), np.load(out / "one.npy"))
    grown = make_trainer(comm, out / "one", 5, snapshot())
    grown.run()
    same = comm.bcast_obj(state(grown))
    np.testing.assert_array_equal(state(grown), same)
    assert grown.updater.epoch == 0
    part.finalize()


def test_scattered_parts_of_other_lengths_begin_the_epoch_again(comm, out):
    """A shuffled part that is shorter now is iterated in a new order, from the epoch's beginning."""
    if comm.size == 1:
        pytest.skip("one rank has no other number of ranks within")
    part = comm.split(int(comm.rank == 0), comm.rank)
    if comm.rank == 0:
        make_trainer(part, out, 15, snapshot()).run()
    comm.mpi_comm.Barrier()
    trainer = make_trainer(comm, out, 15, snapshot())
    trainer.run()
    updater = trainer.updater
    assert (updater.iteration, updater.epoch, updater.epoch_detail) == (15, 1, 1.0)
    order = updater.get_iterator("main")._state.order
    assert sorted(order) == [*range(-(-24 // comm.size))]
    part.finalize()


def test_the_newest_that_all_sets_have(comm, out):
    """A set that was interrupted before its file was there takes all back to the one before."""
    if comm.size == 1:
        pytest.skip("one rank is one set")
    make_trainer(comm, out, 3, snapshot()).run()
    if comm.rank == 1:
        (out / "at_3.1").unlink()
    comm.mpi_comm.Barrier()
    trainer = make_trainer(comm, out, 2, snapshot())
    trainer.run()
    assert trainer.updater.iteration == 2
    comm.mpi_comm.Barrier()
    if comm.rank == 1:
        for path in out.glob("at_*.1"):
            path.unlink()
        (out / "at_9.1").write_bytes((out / "at_3.0").read_bytes())
    comm.mpi_comm.Barrier()
    with pytest.raises(RuntimeError, match="ranks 0, 1 have some"):
        make_trainer(comm, out, 2, snapshot()).run(show_loop_exception_msg=False)


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_takes_all_back_to_the_one_before(comm, out, how):
    """A file that is not whole on one rank is told of, and all ranks load the older snapshot."""
    make_trainer(comm, out, 3, snapshot()).run()
    comm.mpi_comm.Barrier()
    rank = min(1, comm.size - 1)
    if comm.rank == 0:
        path = out / f"at_3.{rank}"
        damage(path, how)
        stamp = time.time() + 9  # it stays the newest
        os.utime(path, (stamp, stamp))
    comm.mpi_comm.Barrier()
    trainer = make_trainer(comm, out, 2, snapshot())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.run()
    told = [str(each.message) for each in caught if "damaged" in str(each.message)]
    assert [text[: len("snapshot at_3.0")] for text in told] == (
        [f"snapshot at_3.{rank}"] if comm.rank == 0 else []
    )
    assert trainer.updater.iteration == 2


@pytest.mark.parametrize("how", ["pickle", "pipe", "link"])
def test_what_others_may_have_written(comm, out, how):
    """A pickle is refused on all ranks and does not run; a pipe and a link count as damaged."""
    make_trainer(comm, out, 3, snapshot()).run()
    comm.mpi_comm.Barrier()
    path, marker = out / f"at_3.{min(1, comm.size - 1)}", out / "marker"
    if comm.rank == 0:
        with np.load(path, allow_pickle=True) as arrays:
            values = dict(arrays)
        path.rename(out / "elsewhere")
        if how == "pickle":
            values["updater/iteration"] = np.array(Attack(marker), object)
            with path.open("wb") as file:
                np.savez(file, **values)
        elif how == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(out / "elsewhere")
        stamp = time.time() + 9  # it stays the newest
        os.utime(path, (stamp, stamp), follow_symlinks=False)
        os.utime(out / "elsewhere", (stamp, stamp))
    comm.mpi_comm.Barrier()
    trainer = make_trainer(comm, out, 2, snapshot())
    if how == "pickle":
        with pytest.raises(
            ValueError, match=r"updater/iteration was saved as a pickle.*allow_pickle"
        ):
            trainer.run(show_loop_exception_msg=False)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.run()
        assert trainer.updater.iteration == 2
    assert not marker.exists()


def test_a_full_disk_is_heard_of_by_all(comm, out):
    """If one set cannot write its file, every rank raises and none waits."""

    class Full(extensions.snapshot_writers.SimpleWriter):
        def __call__(self, filename, outdir, target):
            if filename == f"at_2.{min(1, comm.size - 1)}":
                raise OSError(28, "No space left on device")
            super().__call__(filename, outdir, target)

    trainer = make_trainer(comm, out, 3, snapshot(writer=Full()))
    with pytest.raises(Exception, match="No space left"):
        trainer.run(show_loop_exception_msg=False)
    assert trainer.updater.iteration == 2


def test_options_of_the_snapshot_work(comm, out):
    """n_retains, condition, writer, target and snapshot_on_error do what they do in Chainer."""
    writer = extensions.snapshot_writers.ThreadWriter()
    allowed = []
    options = {"n_retains": 2, "writer": writer, "snapshot_on_error": True}
    plain = snapshot(condition=lambda: len(allowed) < 5, **options)
    trainer = make_trainer(comm, out, 9, plain)

    def fail(trainer):
        allowed.append(trainer.updater.iteration)
        time.sleep(0.01)  # snapshots are sorted by time
        if trainer.updater.iteration == 7:
            raise ArithmeticError("failed")

    trainer.extend(fail, name="fail", trigger=(1, "iteration"))
    with pytest.raises(ArithmeticError, match="failed"):
        trainer.run(show_loop_exception_msg=False)
    masters = {0, min(1, comm.size - 1)}
    assert files(comm, out) == {f"at_{i}.{rank}" for i in (4, 7) for rank in masters}

    model = L.Linear(2, 3, initialW=comm.rank)
    only = extensions.snapshot_object(model, "at_end", autoload=True)
    make_trainer(comm, out / "model", 1, only, []).run()
    model.W.array[...] = 7
    again = extensions.snapshot_object(model, "at_end", autoload=True)
    make_trainer(comm, out / "model", 1, again, []).run()
    assert model.W.array.tolist() == [[0, 0]] * 3  # rank 0's, as the set is all ranks


def test_writers_with_a_queue_end_on_every_rank(comm, out):
    """Their thread begins with them, also on ranks that write nothing, and Python waits for it at its end."""
    writer = extensions.snapshot_writers.ThreadQueueWriter()
    try:
        make_trainer(comm, out, 3, snapshot(writer=writer), []).run()
        assert not writer._consumer.is_alive()
    finally:
        writer.finalize()
    assert files(comm, out) == {f"at_{i}.0" for i in (1, 2, 3)}


def test_defaults_are_those_of_the_snapshot(comm):
    """Trigger and priority are the wrapped snapshot's; a file name may be a function."""
    plain = extensions.snapshot(filename=lambda trainer: f"at_{trainer}")
    extension = multi_node_snapshot(comm, plain, [])
    assert (extension.trigger, extension.priority) == (plain.trigger, plain.priority)
    assert plain.filename("x") == f"at_x.{comm.rank}"
    assert extension.is_master == (comm.rank == 0)
    assert extension.replica_set == {*range(comm.size)}


def test_chainermns_sets():
    """Sets are read as ChainerMN's documentation shows them."""
    from chainer_dist.extensions._multi_node_snapshot import _parse_replica_sets

    for given, size, expected in [
        ([0], 4, [{0}, {1, 2, 3}]),
        ([0, 1], 4, [{0}, {1}, {2, 3}]),
        ([[0, 1], [2, 3]], 4, [{0, 1}, {2, 3}]),
        ([], 4, [{0, 1, 2, 3}]),
        ([range(0, 8, 2)], 8, [{0, 2, 4, 6}, {1, 3, 5, 7}]),
        ([[0], range(1, 1)], 1, [{0}]),
        ([np.int64(1), (i for i in [0])], 3, [{1}, {0}, {2}]),
    ]:
        assert _parse_replica_sets(given, size) == expected


def test_bad_arguments_raise_on_all(comm):
    """Sets that overlap, ranks there are not, no snapshot, or other sets on one rank are errors."""
    last = comm.size - 1

    def make(bad, given=None):
        plain = extensions.snapshot() if given is None else given
        return multi_node_snapshot(comm, plain, bad if comm.rank == last else [0])

    for bad, error, text in [
        ([0, 0], ValueError, "rank 0 in two sets"),
        ([[0], [comm.size]], ValueError, f"replica_sets has {comm.size}"),
        ([-1], ValueError, "replica_sets has -1"),
        (["0"], TypeError, "integer"),
        (None, TypeError, "iterable"),
    ]:
        with pytest.raises(error, match=text):
            make(bad)
    with pytest.raises(TypeError, match=r"takes what .*snapshot"):
        make([0], "snapshot" if comm.rank == last else None)
    with pytest.raises(ValueError, match="filename that is a string"):
        make([0], extensions.snapshot(filename=str, autoload=True))
    if comm.size > 2:
        with pytest.raises(RankMismatchError, match=rf"rank {last}: replica_sets is \[\[0, 1"):
            make([[0, 1]])


def test_chainermns_snapshot_loads(comm, out):
    """A snapshot that ChainerMN's extension took is loaded, file names and all."""
    import chainermn

    theirs = chainermn.create_communicator("naive")
    trainer = make_trainer(comm, out, 2)
    trainer.extend(
        chainermn.extensions.multi_node_snapshot(theirs, snapshot(), [0]), trigger=(2, "iteration")
    )
    trainer.run()
    comm.mpi_comm.Barrier()
    ours = make_trainer(create_communicator("naive"), out, 2, snapshot())
    ours.run()
    np.testing.assert_array_equal(state(ours), state(trainer))

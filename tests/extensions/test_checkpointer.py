"""Checkpoints of all ranks, against training that is not interrupted, and ChainerMN's files."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path

import chainer
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators, training
from chainer.training import extensions

from chainer_dist import RankMismatchError, create_multi_node_optimizer, scatter_dataset
from chainer_dist.extensions import create_multi_node_checkpointer
from chainer_dist.iterators import DistributedIterator
from chainer_dist.serialization.npz import write_npz
from damage import DAMAGES, Attack, damage

DATA = [(np.array([i, i * i % 7], np.float32), i % 3) for i in range(24)]


@pytest.fixture
def out(comm, tmp_path):
    """Return one folder for all ranks."""
    return Path(comm.bcast_obj(str(tmp_path)))


def make(name, comm, *args, **options):
    """Return a checkpointer, without the warning that it is deprecated."""
    with pytest.warns(DeprecationWarning, match="multi_node_snapshot"):
        return create_multi_node_checkpointer(name, comm, *args, **options)


def make_trainer(comm, out, stop, iterator=None):
    """Return a trainer; rank 0's has a log, which the others have not."""
    np.random.seed(comm.rank)
    model = L.Classifier(L.Linear(2, 3))
    optimizer = create_multi_node_optimizer(chainer.optimizers.Adam(0.01), comm).setup(model)
    if iterator is None:
        # In orders that follow from one another, as random states are in no checkpoint.
        part = scatter_dataset(DATA, comm)
        iterator = iterators.SerialIterator(part, 2, order_sampler=lambda o, _: np.roll(o, 1))
    updater = training.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, (stop, "iteration"), out=str(out))
    if comm.rank == 0:
        trainer.extend(extensions.LogReport(trigger=(1, "iteration")))
    return trainer


class Stop(Exception):  # noqa: N818 - it is no error
    """Interrupts a training."""


def interrupted(comm, out, stop, *, error=Stop, iterator=None, load=False):
    """Train, with checkpoints, up to an exception after an iteration."""
    trainer = make_trainer(comm, out, 999, iterator)

    def fail(trainer):
        if trainer.updater.iteration == stop:
            raise error

    checkpointer = make("run", comm)
    trainer.extend(checkpointer, trigger=(1, "iteration"))
    if load:
        checkpointer.maybe_load(trainer)
    trainer.extend(fail, name="fail", trigger=(1, "iteration"), priority=-200)
    with pytest.raises(error):
        trainer.run(show_loop_exception_msg=False)
    comm.mpi_comm.Barrier()
    return trainer


def resumed(comm, out, stop=0, iterator=None):
    """Train on, and keep the files."""
    trainer = make_trainer(comm, out, stop, iterator)
    checkpointer = make("run", comm)
    checkpointer.maybe_load(trainer, trainer.updater.get_optimizer("main"), str(out))
    if stop:
        trainer.run()
    comm.mpi_comm.Barrier()
    return trainer


def state(trainer):
    """Return weights and Adam's state as one array."""
    model = trainer.updater.get_optimizer("main").target
    rows = [
        array.ravel()
        for _, param in sorted(model.namedparams())
        for array in [param.array, *map(np.asarray, param.update_rule.state.values())]
    ]
    return np.concatenate(rows)


def files(comm, out, name="run"):
    """Return rank and iteration of all checkpoints, after all ranks are done."""
    comm.mpi_comm.Barrier()
    found = [path.name for path in out.iterdir() if path.name.startswith(f"{name}.")]
    comm.mpi_comm.Barrier()
    return {tuple(map(int, each[len(name) + 1 :].split("."))) for each in found}


@pytest.mark.parametrize("stop", [1, 6, 7])
def test_a_resume_is_exact(comm, out, stop):
    """No update is lost, no sample seen twice: a resumed training ends where one would have."""
    whole = interrupted(comm, out, stop)
    again = resumed(comm, out)
    assert again.updater.iteration == stop
    ours, theirs = (each.updater.get_iterator("main") for each in (again, whole))
    for _ in range(8):
        assert ours.epoch_detail == theirs.epoch_detail
        assert ours.previous_epoch_detail == theirs.previous_epoch_detail
        again.updater.update()
        whole.updater.update()
    np.testing.assert_array_equal(state(again), state(whole))
    if comm.rank == 0:
        log = again.get_extension("LogReport").log
        assert [entry["iteration"] for entry in log] == [*range(1, stop + 1)]


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, SystemExit])
def test_exceptions_keep_the_files_and_success_removes_them(comm, out, error):
    """However a training ends early its checkpoints stay; they go when it has ended well."""
    interrupted(comm, out, 3, error=error)
    everyone = {(rank, i) for rank in range(comm.size) for i in (1, 2, 3)}
    assert files(comm, out) == everyone
    trainer = make_trainer(comm, out, 5)
    checkpointer = make("run", comm)
    trainer.extend(checkpointer, trigger=(1, "iteration"))
    checkpointer.maybe_load(trainer)
    trainer.run()
    assert (trainer.updater.iteration, files(comm, out)) == (5, set())
    checkpointer.finalize()


def test_only_the_newest_are_kept(comm, out):
    """After every gc_interval saves those before the newest cp_interval are removed."""
    link = L.Linear(1, 1)
    checkpointer = make("a.b c", comm, cp_interval=2, gc_interval=3, path=out)
    there = []
    for i in range(1, 8):
        checkpointer.save(link, i * 10)
        found = files(comm, out, "a.b c")
        assert {rank for rank, _ in found} == {*range(comm.size)}
        assert len(found) % comm.size == 0
        there.append(sorted({iteration // 10 for _, iteration in found}))
    assert there == [
        [1],
        [1, 2],
        [2, 3],
        [2, 3, 4],
        [2, 3, 4, 5],
        [5, 6],
        [5, 6, 7],
    ]
    assert "7 checkpoints" in checkpointer.get_stats()
    again = make("a.b c", comm, cp_interval=1, gc_interval=1, path=out)
    assert "no checkpoint" in again.get_stats()
    again.maybe_load(link)
    again.save(link, 80)
    assert files(comm, out, "a.b c") == {(rank, 80) for rank in range(comm.size)}
    assert not [path for path in out.iterdir() if path.name.startswith(".")]


def test_incomplete_checkpoints_do_not_count(comm, out):
    """Of those that are to be kept after a resume, all are complete; older files are removed."""
    link = L.Linear(1, 1)
    first = make("run", comm, path=out)
    for i in (1, 2, 3):
        first.save(link, i)
    if comm.rank == comm.size - 1:
        (out / f"run.{comm.rank}.1").unlink()
    comm.mpi_comm.Barrier()
    checkpointer = make("run", comm, cp_interval=4, gc_interval=1, path=out)
    checkpointer.maybe_load(link)
    checkpointer.save(link, 4)
    assert files(comm, out) == {(rank, i) for rank in range(comm.size) for i in (2, 3, 4)}


def test_other_files_are_left_alone(comm, out):
    """Files of other runs and of ours by another name are neither loaded nor removed."""
    link = L.Linear(1, 1, initialW=1)
    others = ["a.0.10.npz", "a.x.0.11", "b.0.12", "a.0.012", "a.0.-1", "xa.0.13", "a.0"]
    if comm.rank == 0:
        for name in others:
            (out / name).write_bytes(b"something")
    checkpointer = make("a", comm, 1, 1, path=out)
    checkpointer.maybe_load(link)
    for i in (1, 2):
        checkpointer.save(link, i)
    checkpointer.finalize()
    comm.mpi_comm.Barrier()
    assert {path.name for path in out.iterdir()} == {*others}


@pytest.mark.parametrize("how", [*DAMAGES, "gone"])
def test_an_older_complete_checkpoint_is_loaded(comm, out, how):
    """A file of one rank that is damaged or missing takes all ranks back, and they are told."""
    rank = comm.size - 1
    interrupted(comm, out, 3)
    if comm.rank == 0:
        path = out / f"run.{rank}.3"
        if how == "gone":
            path.unlink()
        else:
            damage(path, how)
    comm.mpi_comm.Barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = resumed(comm, out)
    assert trainer.updater.iteration == 2
    told = [str(each.message) for each in caught if "damaged" in str(each.message)]
    assert [f"run.{rank}.3 is damaged" in text for text in told] == (
        [True] if comm.rank == 0 and how != "gone" else []
    )


def test_any_bit_that_flips_takes_all_back(comm, out):
    """Or nothing depends on it: never is there an error, nor anything else in the parameters."""
    if comm.size > 2:
        pytest.skip("two ranks tell as much")
    link, last = L.Linear(1, 1), comm.size - 1
    checkpointer = make("run", comm, path=out)
    for i in (1, 2):
        link.W.array[...] = i
        checkpointer.save(link, i)
    path = out / f"run.{last}.2"
    content = path.read_bytes()
    members = content.index(b"PK\x01\x02")  # from here on there are no checksums
    draw = np.random.RandomState(0)
    places = [*draw.randint(members, size=30), *range(members, len(content), 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << draw.randint(8)
            comm.mpi_comm.Barrier()
            if comm.rank == 0:
                path.write_bytes(damaged)
            comm.mpi_comm.Barrier()
            again = L.Linear(1, 1, initialW=9)
            make("run", comm, path=out).maybe_load(again)
            assert again.W.array in (1, 2)
            assert len({*comm.allgather_obj(again.W.array.item())}) == 1


@pytest.mark.parametrize("theirs", [False, True])
def test_extended_under_another_name(comm, out, theirs):
    """A Trainer renames its extensions; files that are ours, or ChainerMN's, are found all the same."""
    import chainermn

    def trained(checkpointer, stop):
        trainer = make_trainer(comm, out, stop)
        trainer.extend(checkpointer, name="other", trigger=(1, "iteration"))
        checkpointer.maybe_load(trainer)
        begun = trainer.updater.iteration
        checkpointer.finalize = lambda: None  # so that the files stay
        trainer.run()
        comm.mpi_comm.Barrier()
        return begun

    first = make("run", comm)
    if theirs:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            first = chainermn.create_multi_node_checkpointer(
                "run", chainermn.create_communicator("naive"), path=str(out)
            )
    assert trained(first, 3) == 0
    assert trained(make("run", comm), 5) == 3
    assert trained(make("run", comm), 5) == 5


def test_no_pickle_is_loaded(comm, out):
    """It is refused on every rank, unless asked for, and objects are not saved either."""
    marker = out / "marker"
    last = comm.size - 1
    link = L.Linear(1, 1)
    make("run", comm, path=out).save(link, 1)
    if comm.rank == last:
        values = chainer.serializers.npz.serialize(link)
        values["W"] = np.array(Attack(marker), object)
        with (out / f"run.{last}.1").open("r+b") as file:
            origin = np.load(file)["chainer_dist/origin"]
        write_npz(
            out / f"run.{last}.1", {**values, "chainer_dist/origin": origin}, allow_pickle=True
        )
    comm.mpi_comm.Barrier()
    with pytest.raises(ValueError, match=r"W was saved as a pickle.*allow_pickle=True"):
        make("run", comm, path=out).maybe_load(link)
    assert not marker.exists()
    comm.mpi_comm.Barrier()
    with pytest.raises(Exception, match=r"rank|float|array"):
        make("run", comm, path=out, allow_pickle=True).maybe_load(link)
    comm.mpi_comm.Barrier()
    assert marker.exists()


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_only_plain_files_are_read(comm, out, kind):
    """A pipe would wait for a writer, and a link leads elsewhere: both count as damaged."""
    interrupted(comm, out, 3)
    path = out / f"run.{comm.size - 1}.3"
    if comm.rank == 0:
        path.rename(out / "elsewhere")
        if kind == "pipe":
            os.mkfifo(path)
        else:
            path.symlink_to(out / "elsewhere")
    comm.mpi_comm.Barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert resumed(comm, out).updater.iteration == 2


def test_nothing_whole_is_an_error(comm, out):
    """If all files are damaged every rank says so, rather than to start anew without a word."""
    interrupted(comm, out, 2)
    for i in (1, 2):
        (out / f"run.{comm.rank}.{i}").write_bytes(b"PK something")
    comm.mpi_comm.Barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        with pytest.raises(RuntimeError, match=r"no checkpoint of run in .* can be read"):
            resumed(comm, out)


def test_one_surviving_file_is_enough(comm, out):
    """Where no checkpoint is complete, all ranks load the newest file that is left."""
    interrupted(comm, out, 3)
    if comm.rank > 0:
        for i in (1, 2, 3):
            (out / f"run.{comm.rank}.{i}").unlink()
    comm.mpi_comm.Barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        trainer = resumed(comm, out, 4)
    assert trainer.updater.iteration == 4
    everyone = comm.allgather_obj((state(trainer), trainer.updater.epoch_detail))
    assert {epochs for _, epochs in everyone} == {everyone[0][1]}
    for other, _ in everyone:
        np.testing.assert_array_equal(other, everyone[0][0])


@pytest.mark.parametrize("iterator", ["parts", "distributed"])
def test_more_and_fewer_ranks(comm, out, iterator):
    """Checkpoints of another number of ranks load; parts begin the epoch again."""
    if comm.size == 1:
        pytest.skip("one rank has no other number of ranks within")
    part = comm.split(int(comm.rank == 0), comm.rank)

    def batches(comm, seed):
        return DistributedIterator(DATA, 1, comm, seed=seed) if iterator == "distributed" else None

    first = interrupted(comm, out, 13, iterator=batches(comm, 1))
    one = out / "one"
    if comm.rank == 0:
        shutil.copytree(out, one)
        with pytest.warns(UserWarning, match=f"saved by {comm.size} ranks"):
            trainer = resumed(part, one, iterator=batches(part, 2))
        np.testing.assert_array_equal(state(trainer), state(first))
        assert trainer.updater.iteration == 13
        mine = trainer.updater.get_iterator("main")
        if iterator == "distributed":
            assert mine.epoch_detail == first.updater.epoch_detail
            assert mine.seed == 1
        else:
            assert mine.epoch_detail == mine.epoch == first.updater.epoch
        # Newer, and of one rank: what the other ranks left behind is no part of it.
        with pytest.warns(UserWarning, match=f"saved by {comm.size} ranks"):
            interrupted(part, one, 15, iterator=batches(part, 2), load=True)
    comm.mpi_comm.Barrier()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = resumed(comm, one, 17, iterator=batches(comm, 3))
    assert any("saved by 1 ranks" in str(each.message) for each in caught) == (comm.rank == 0)
    assert trainer.updater.iteration == 17
    np.testing.assert_array_equal(state(trainer), comm.bcast_obj(state(trainer)))
    part.finalize()


def test_files_of_two_jobs_are_not_one_checkpoint(comm, out):
    """Files of one iteration that two jobs wrote are not mixed."""
    if comm.size == 1:
        pytest.skip("one rank's file is a checkpoint")
    link = L.Linear(1, 1, initialW=1)
    checkpointer = make("run", comm, path=out)
    checkpointer.save(link, 1)
    checkpointer.save(link, 2)
    other = make("run", comm, path=out / "other")
    link.W.array[...] = 9
    other.save(link, 2)
    if comm.rank == 0:
        shutil.copy(out / "other" / "run.0.2", out / "run.0.2")
    link.W.array[...] = comm.rank
    comm.mpi_comm.Barrier()
    make("run", comm, path=out).maybe_load(link)
    assert link.W.array == 1


def test_separate_disks(comm, tmp_path):
    """Ranks that see their own files only resume; one that lost its disk takes another's file."""
    link = L.Linear(1, 1, initialW=comm.rank)
    own = tmp_path / "own"
    make("run", comm, path=own).save(link, 1)
    link.W.array[...] = 7
    make("run", comm).maybe_load(link, path=own)
    assert link.W.array == comm.rank
    if comm.size > 1:
        folder = own if comm.rank == comm.size - 1 else tmp_path / "new disk"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            make("run", comm).maybe_load(link, path=folder)
        assert link.W.array == comm.size - 1


def test_nothing_there_changes_nothing(comm, out):
    """Without files, or a folder, training starts from the beginning."""
    trainer = make_trainer(comm, out / "new", 2)
    checkpointer = make("run", comm)
    checkpointer.maybe_load(trainer)
    assert trainer.updater.iteration == 0
    assert not (out / "new").exists()
    assert checkpointer.path == out / "new"


def test_chainermns_files_are_loaded(comm, out):
    """Checkpoints that ChainerMN wrote are complete if all ranks' files are there."""
    import chainermn

    theirs = chainermn.create_communicator("naive")
    trainer = make_trainer(comm, out, 3)
    trainer.run()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        checkpointer = chainermn.create_multi_node_checkpointer("run", theirs, path=str(out))
    checkpointer.save(trainer, 2)
    checkpointer.save(trainer, 3)
    comm.mpi_comm.Barrier()
    if comm.rank == comm.size - 1 and comm.size > 1:
        (out / f"run.{comm.rank}.3").unlink()
    comm.mpi_comm.Barrier()
    ours = resumed(comm, out)
    np.testing.assert_array_equal(state(ours), state(trainer))
    assert not [each for each in files(comm, out) if each[1] > 3]


def test_errors_are_raised_on_all(comm, out):
    """What one rank cannot save or load, every rank raises; older files stay."""
    last = comm.size - 1

    class Broken(chainer.Link):
        def serialize(self, serializer):
            if comm.rank == last:
                raise ArithmeticError("cannot be serialized")
            super().serialize(serializer)

    checkpointer = make("run", comm, path=out)
    checkpointer.save(L.Linear(2, 3), 1)
    with pytest.raises(ArithmeticError, match="cannot be serialized"):
        checkpointer.save(Broken(), 2)
    with pytest.raises(ValueError, match="could not broadcast"):
        make("run", comm, path=out).maybe_load(L.Linear(*((2, 3) if comm.rank < last else (3, 2))))
    with pytest.raises(ValueError, match="has no path"):
        make("run", comm).save(L.Linear(1, 1), 1)
    with pytest.raises(ValueError, match="iteration is -1"):
        checkpointer.save(L.Linear(1, 1), -1)
    with pytest.raises(TypeError, match="float"):  # no resume would find its file
        checkpointer.save(L.Linear(1, 1), 2.0)
    with pytest.raises(AttributeError, match="out"):
        make("run", comm).maybe_load(L.Linear(1, 1))
    if comm.size > 1:
        with pytest.raises(RankMismatchError, match=f"rank {last}: iteration is 6"):
            checkpointer.save(L.Linear(1, 1), 5 + (comm.rank == last))
    assert {(rank, 1) for rank in range(comm.size)} <= files(comm, out)
    if comm.rank == last:
        (out / "file").write_text("not a folder")
    comm.mpi_comm.Barrier()
    with pytest.raises(OSError, match="file"):
        make("run", comm, path=out / "file").save(L.Linear(1, 1), 1)


def test_arguments_are_checked(comm):
    """Names that are no file names, and intervals that are no counts, are refused."""
    for name in ("", "a/b", "a\0"):
        with pytest.raises(ValueError, match="name is"):
            make(name, comm)
    with pytest.raises(TypeError, match="name is None"):
        make(None, comm)
    with pytest.raises(ValueError, match="cp_interval is 0"):
        make("run", comm, 0)
    with pytest.raises(ValueError, match="gc_interval is 0"):
        make("run", comm, 1, 0)
    with pytest.raises(TypeError, match="float"):
        make("run", comm, 1, 2.5)

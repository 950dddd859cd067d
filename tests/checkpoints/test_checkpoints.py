"""Checkpoints: against training that is not interrupted, and against every kind of damage."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import sys
import warnings
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators, training
from chainer.training import extensions

from chainer_dist import (
    RankMismatchError,
    create_communicator,
    create_multi_node_optimizer,
    create_multi_node_updater,
    scatter_dataset,
)
from chainer_dist._files import open_regular
from chainer_dist.checkpoints import Checkpoint, generations
from chainer_dist.iterators import DistributedIterator
from chainer_dist.serialization.npz import ArrayFile, write_npz
from damage import Attack

DATA = [(np.array([i, i * i % 7, 1], np.float32) / 24, np.int32(i % 3)) for i in range(24)]


@pytest.fixture
def out(comm, tmp_path):
    """Return one folder for all ranks."""
    folder = Path(comm.bcast_obj(str(tmp_path))) / "checkpoints"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(autouse=True)
def result(tmp_path, monkeypatch):
    """Let logs be written to a folder of the test."""
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def forkserver():
    """Start workers otherwise than by a fork, which MPI does not bear."""
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        yield
    finally:
        multiprocessing.set_start_method(before, force=True)


class Net(chainer.Chain):
    """Layers with dropout, and with statistics of each rank's own."""

    def __init__(self) -> None:
        """Create them; one finds out its shape by itself."""
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(None, 8)
            self.bn = L.BatchNormalization(8)
            self.l2 = L.Linear(8, 3)

    def forward(self, x):
        """Return scores."""
        return self.l2(F.dropout(self.bn(F.relu(self.l1(x)))))


ITERATORS = {
    "serial": lambda comm: iterators.SerialIterator(scatter_dataset(DATA, comm), 2),
    "own generator": lambda comm: iterators.SerialIterator(
        scatter_dataset(DATA, comm),
        3,
        order_sampler=iterators.ShuffleOrderSampler(np.random.RandomState(np.random.randint(1000))),
    ),
    "threads": lambda comm: iterators.MultithreadIterator(
        scatter_dataset(DATA, comm), 2, n_threads=2
    ),
    "processes": lambda comm: iterators.MultiprocessIterator(
        scatter_dataset(DATA, comm), 2, n_processes=1, shared_mem=1000
    ),
    "distributed": lambda comm: DistributedIterator(DATA, 2, comm),
}


def make_trainer(comm, stop, *, iterator="serial", seed=0, hook=None, updater=None):
    """Return a trainer that is random in all its parts; rank 0's has a log, which others have not."""
    np.random.seed(100 * seed + comm.rank)
    random.seed(100 * seed + comm.rank)
    model = L.Classifier(Net())
    optimizer = create_multi_node_optimizer(chainer.optimizers.Adam(0.01), comm).setup(model)
    if hook is not None:
        optimizer.add_hook(hook)
    batches = ITERATORS.get(iterator, iterator)(comm)
    made = training.StandardUpdater(batches, optimizer)
    if updater is not None:
        made = updater(made, comm)
    trainer = training.Trainer(made, (stop, "iteration"), out="result")
    trainer.extend(extensions.ExponentialShift("alpha", 0.9), trigger=(2, "iteration"))
    if comm.rank == 0:
        trainer.extend(extensions.LogReport(trigger=(1, "iteration"), filename=None))
    return trainer


def state(trainer):
    """Return parameters, statistics and Adam's state as one array."""
    optimizer = trainer.updater.get_optimizer("main")
    rows = [np.ravel(array) for _, array in sorted(chainer_arrays(optimizer.target).items())]
    for _, param in sorted(optimizer.target.namedparams()):
        rows += [np.ravel(each) for _, each in sorted((param.update_rule.state or {}).items())]
    return np.concatenate([*rows, [optimizer.t, optimizer.alpha]])


def without_statistics(trainer):
    """Return Adam's state alone: it is the same on all ranks, and there before training begins."""
    model = trainer.updater.get_optimizer("main").target
    return state(trainer)[sum(each.size for each in chainer_arrays(model).values()) : -1]


def chainer_arrays(link):
    """Return everything that a link saves."""
    return chainer.serializers.npz.serialize(link)


def run(comm, out, stop, *, trigger=(3, "iteration"), options=(), **how):
    """Train from the newest checkpoint on, and return the trainer."""
    trainer = make_trainer(comm, stop, **how)
    checkpoint = Checkpoint(comm, out, **dict(options))
    trainer.extend(checkpoint, trigger=trigger)
    trainer.begun_at = checkpoint.resume(trainer)
    trainer.run(show_loop_exception_msg=False)
    trainer.drawn = np.random.random(), random.random()
    return trainer


@pytest.mark.parametrize(
    ("kind", "iterator", "options"),
    [
        ("naive", "serial", {"asynchronous": False}),
        ("shared_memory", "serial", {}),
        ("shared_memory", "distributed", {"asynchronous": False}),
        ("naive", "own generator", {}),
        ("naive", "threads", {}),
        ("shared_memory", "processes", {}),
    ],
)
def test_a_resume_is_exact(comm, out, kind, iterator, options):
    """Parameters, optimizer, random numbers: to the bit those of a run that goes on."""
    ours = create_communicator(kind)
    how = {"iterator": iterator, "options": {"keep": 99, **options}}
    with forkserver():
        whole = run(ours, out, 12, **how)
        comm.mpi_comm.Barrier()
        for path in out.iterdir() if comm.rank == 0 else ():
            if int(path.name.split("-")[0]) > 6:
                shutil.rmtree(path)
        comm.mpi_comm.Barrier()
        again = run(ours, out, 12, seed=1, **how)
    assert again.begun_at == 6
    assert again.updater.get_optimizer("main").sharded == (kind == "shared_memory")
    np.testing.assert_array_equal(state(again), state(whole))
    assert again.drawn == whole.drawn
    assert again.updater.epoch_detail == whole.updater.epoch_detail
    if comm.rank == 0:
        ours_log, theirs = (each.get_extension("LogReport").log for each in (again, whole))
        assert [row["main/loss"] for row in ours_log] == [row["main/loss"] for row in theirs]
    ours.finalize()


def test_saving_changes_nothing(comm, out):
    """A run that was interrupted is one that never saved; noise in updates is the same on all ranks."""
    noise = chainer.optimizer_hooks.GradientNoise(0.1)
    whole = run(comm, out / "whole", 10, trigger=(99, "iteration"), hook=noise)
    run(comm, out / "parts", 8, hook=noise)
    again = run(comm, out / "parts", 10, seed=1, hook=noise)
    assert again.begun_at == 6
    np.testing.assert_array_equal(state(again), state(whole))
    assert again.drawn == whole.drawn


class Loop:
    """A loop of one's own, in float16 with dynamic loss scaling, that is saved as a dict."""

    def __init__(self, comm, seed) -> None:
        """Create everything."""
        np.random.seed(seed)
        with chainer.using_config("dtype", chainer.mixed16):
            self.model = L.Classifier(L.Linear(3, 3))
        optimizer = chainer.optimizers.MomentumSGD(0.1)
        optimizer.use_fp32_update()
        optimizer.loss_scaling(interval=2)
        self.optimizer = create_multi_node_optimizer(optimizer, comm).setup(self.model)
        self.iterator = iterators.SerialIterator(scatter_dataset(DATA, comm), 2)
        self.saved = {
            "model": self.model,
            "rest": {"optimizer": self.optimizer, "data": self.iterator},
        }

    def step(self):
        """Update once, from data with a random bit."""
        x, t = chainer.dataset.concat_examples(next(self.iterator))
        noise = np.random.normal(size=x.shape) + random.random()
        self.optimizer.update(self.model, (x + noise).astype(np.float16), t)

    @property
    def state(self):
        """Return parameters, their float32 twins, and the loss scale."""
        rules = [param.update_rule for param in self.model.params()]
        rows = [each.array.ravel().astype(np.float64) for each in self.model.params()]
        rows += [rule.fp32_param.array.ravel() for rule in rules if hasattr(rule, "fp32_param")]
        rows += [rule._fp32_param.array.ravel() for rule in rules]
        return np.concatenate([*rows, [self.optimizer._loss_scale]])


def test_loops_of_ones_own(comm, out):
    """A dict of a dict; float32 twins of float16 parameters and a dynamic loss scale too."""
    whole = Loop(comm, 1)
    random.seed(1)
    with Checkpoint(comm, out) as checkpoint:
        assert checkpoint.resume(whole.saved) == 0
        for i in range(1, 13):
            whole.step()
            if i in (4, 7):
                checkpoint.save(whole.saved, i)
    again = Loop(comm, 2)
    random.seed(2)
    with Checkpoint(comm, out) as checkpoint:
        assert checkpoint.resume(again.saved) == 7
        for _ in range(7, 12):
            again.step()
    assert again.optimizer._loss_scale > 1
    np.testing.assert_array_equal(again.state, whole.state)


def test_what_is_written_is_what_was_saved(comm, out):
    """Training goes on while a thread writes; that changes nothing in the file."""
    link = L.Linear(1000, 1000, initialW=comm.rank)
    with Checkpoint(comm, out) as checkpoint:
        checkpoint.save(link, 1)
        link.W.array[...] = 7
    Checkpoint(comm, out).resume(link)
    assert (link.W.array == comm.rank).all()


def test_what_is_the_same_on_all_ranks_is_written_once(comm, out):
    """Parameters and Adam's state are in one file; each rank's has what is its own."""
    trainer = run(comm, out, 3)
    names = {name for name, _ in trainer.updater.get_optimizer("main").target.namedparams()}
    comm.mpi_comm.Barrier()
    (generation,) = out.iterdir()
    assert {path.name for path in generation.iterdir()} == {
        "manifest.json",
        "common.npz",
        *(f"rank-{rank}.npz" for rank in range(comm.size)),
    }
    common, own = (np.load(generation / name) for name in ("common.npz", f"rank-{comm.rank}.npz"))
    assert {f"updater/model:main{name}" for name in names} <= set(common)
    assert {f"updater/optimizer:main{name}/m" for name in names} <= set(common)
    assert not set(common) & set(own)
    assert "updater/model:main/predictor/bn/avg_mean" in own
    common.close()
    own.close()


def resume_elsewhere(part, out, **how):
    """Resume on another number of ranks; return the trainer before it goes on, and the warnings."""
    trainer = make_trainer(part, 99, seed=5, **how)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert Checkpoint(part, out).resume(trainer) == 9
    texts = [str(each.message) for each in caught if "was saved by" in str(each.message)]
    return trainer, texts


@pytest.mark.parametrize("iterator", ["serial", "distributed"])
def test_more_and_fewer_ranks(comm, out, iterator):
    """Model and optimizer are what they were; distributed iterators go on, parts begin again."""
    if comm.size == 1:
        pytest.skip("one rank has no other number of ranks within")
    part = comm.split(int(comm.rank == 0), comm.rank)
    by_all = run(comm, out / "all", 9, iterator=iterator)
    folder = out / f"part-{int(comm.rank == 0)}"
    by_part = run(part, folder, 9, iterator=iterator)
    expected = comm.bcast_obj((without_statistics(by_part), by_part.updater.epoch_detail), root=1)
    for target, source, (saved, detail) in (
        (part, "all", (without_statistics(by_all), by_all.updater.epoch_detail)),
        (comm, "part-0", expected),
    ):
        trainer, texts = resume_elsewhere(target, out / source, iterator=iterator)
        assert bool(texts) == (target.rank == 0)
        np.testing.assert_array_equal(without_statistics(trainer), saved)
        if iterator == "distributed":
            assert trainer.updater.epoch_detail == detail
        else:
            assert trainer.updater.epoch_detail == trainer.updater.epoch == int(detail)
        draws = target.allgather_obj((np.random.random(), random.random()))
        assert len(set(draws)) == target.size
        trainer.updater.update()
        everyone = target.allgather_obj(without_statistics(trainer))
        for each in everyone:
            np.testing.assert_array_equal(each, everyone[0])
    part.finalize()


def test_each_sample_once_on_another_number_of_ranks(comm, out):
    """A distributed iterator that half of the ranks go on with gives what is left of the epoch."""
    if comm.size == 1:
        pytest.skip("one rank has no other number of ranks within")
    iterator = DistributedIterator(np.arange(24), 1, comm)
    with Checkpoint(comm, out) as checkpoint:
        seen = [each for _ in range(3) for each in next(iterator)]
        checkpoint.save({"data": iterator}, 3)
    seen = [each for theirs in comm.allgather_obj(seen) for each in theirs]
    part = comm.split(comm.rank % 2, comm.rank)
    again = DistributedIterator(np.arange(24), 1, part)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Checkpoint(part, out).resume({"data": again})
    left = []
    while again.epoch == 0:
        left += [each for theirs in part.allgather_obj(next(again)) for each in theirs]
    assert {*seen, *left[: 24 - len(seen)]} == set(range(24))
    part.finalize()


def test_ranks_with_different_amounts_of_data(comm, out):
    """A multi-node updater goes on in the middle of an epoch in which some ranks stand by."""
    part = DATA[comm.rank :][: 4 + 6 * (comm.rank % 2)]

    def train(folder, stop, seed=0):
        how = {"updater": create_multi_node_updater, "seed": seed}
        how["iterator"] = lambda _: iterators.SerialIterator(part, 2)
        return run(comm, folder, stop, trigger=(4, "iteration"), **how)

    whole = train(out / "whole", 9)
    train(out / "parts", 7)
    again = train(out / "parts", 9, seed=1)
    assert again.begun_at == 4
    np.testing.assert_array_equal(state(again), state(whole))


def test_models_with_parts_on_other_ranks(comm, out):
    """What is another parameter on each rank is loaded on as many ranks only."""
    if comm.size == 1:
        pytest.skip("one rank has no other number of ranks within")
    link = L.Linear(2, 2, initialW=comm.rank)
    twin = L.Linear(2, 2, initialW=5)
    part = comm.split(int(comm.rank == 0), comm.rank)
    for folder, each in (("parts", link), ("twins", twin)):
        with Checkpoint(comm, out / folder) as checkpoint:
            checkpoint.save({"link": each}, 1)
        Checkpoint(comm, out / folder).resume({"link": each})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if folder == "parts":
                with pytest.raises(RuntimeError, match=r"link/W was another one on rank 1"):
                    Checkpoint(part, out / folder).resume({"link": each})
            else:
                each.W.array[...] = 0
                Checkpoint(part, out / folder).resume({"link": each})
                assert (each.W.array == 5).all()
    part.finalize()


# Damage


@pytest.fixture
def two(comm, out):
    """Return the paths of two checkpoints, of a link whose numbers say which one it is."""
    link = L.Linear(40, 100)
    with Checkpoint(comm, out) as checkpoint:
        for i in (1, 2):
            link.W.array[...] = 10 * i + comm.rank
            checkpoint.save(link, i)
    comm.mpi_comm.Barrier()
    return sorted(out.iterdir())


def resume_link(comm, out):
    """Return the iteration, the number that was loaded, and what was said."""
    link = L.Linear(40, 100)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        iteration = Checkpoint(comm, out).resume(link)
    numbers = set(link.W.array.ravel().tolist())
    assert numbers == {10 * iteration + comm.rank}
    return iteration, [str(each.message) for each in caught]


def test_truncation_anywhere_is_noticed(comm, two, out):
    """Each file of the newest one, cut at every 4 KiB: all ranks go back to the one before."""
    newest = two[-1]
    names = ["common.npz", "manifest.json", "rank-0.npz", f"rank-{comm.size - 1}.npz"]
    for name in dict.fromkeys(names):
        path = newest / name
        content = path.read_bytes()
        for size in range(0, len(content), 4096):
            comm.mpi_comm.Barrier()
            if comm.rank == 0:
                path.write_bytes(content[:size])
            comm.mpi_comm.Barrier()
            iteration, texts = resume_link(comm, out)
            assert iteration == 1
            assert all(f"{name} has {size} bytes" in text or "manifest" in text for text in texts)
            assert [name in text and newest.name in text for text in texts] == (
                [True] if comm.rank == 0 else []
            )
        comm.mpi_comm.Barrier()
        if comm.rank == 0:
            path.write_bytes(content)
    comm.mpi_comm.Barrier()
    assert resume_link(comm, out) == (2, [])


@pytest.mark.parametrize("how", ["flipped", "missing", "other", "longer"])
def test_damage_is_noticed(comm, two, out, how):
    """Single bits, missing files, files of another checkpoint, and what was appended."""
    for name in ("manifest.json", "common.npz", "rank-0.npz"):
        path = two[-1] / name
        content = path.read_bytes()
        comm.mpi_comm.Barrier()
        if comm.rank == 0:
            if how == "flipped":
                damaged = bytearray(content)
                damaged[len(damaged) // 2] ^= 4
                path.write_bytes(damaged)
            elif how == "missing":
                path.unlink()
            elif how == "longer":
                path.write_bytes(content + b"x")
            else:
                shutil.copy(two[0] / name, path)
        comm.mpi_comm.Barrier()
        same = name == "common.npz" and how == "other"  # there is nothing in it
        iteration, texts = resume_link(comm, out)
        assert iteration == (2 if same else 1)
        assert [name in text for text in texts] == ([True] if comm.rank == 0 and not same else [])
        comm.mpi_comm.Barrier()
        if comm.rank == 0:
            path.write_bytes(content)


def test_nothing_whole_is_an_error(comm, two, out):
    """If all are damaged every rank says so, rather than to start anew without a word."""
    if comm.rank == 0:
        for path in two:
            (path / "rank-0.npz").write_bytes(b"something")
    comm.mpi_comm.Barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(RuntimeError, match=r"no checkpoint in .* can be read, of 2"):
            resume_link(comm, out)


def test_what_was_damaged_goes_when_there_is_a_new_one(comm, two, out):
    """So do leftovers of jobs that were killed; files of others stay."""
    if comm.rank == 0:
        (two[1] / "rank-0.npz").unlink()
        shutil.copytree(two[1], out / "77-0123456789abcdef.tmp")
        (out / "notes").mkdir()
    comm.mpi_comm.Barrier()
    link = L.Linear(40, 100)
    with Checkpoint(comm, out) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert checkpoint.resume(link) == 1
        checkpoint.save(link, 2)
    comm.mpi_comm.Barrier()
    names = sorted(path.name.split("-")[0] for path in out.iterdir())
    assert names == ["1", "2", "notes"]
    assert resume_is_at(comm, out, 2)


def resume_is_at(comm, out, iteration):
    """Tell whether the newest whole checkpoint is that of an iteration."""
    comm.mpi_comm.Barrier()
    return Checkpoint(comm, out).resume(L.Linear(40, 100)) == iteration


@pytest.mark.parametrize("asynchronous", [False, True])
def test_only_the_newest_are_kept(comm, out, asynchronous):
    """Older ones go when a newer one is complete; the same iteration may be saved again."""
    link = L.Linear(40, 100)
    with Checkpoint(comm, out, keep=2, asynchronous=asynchronous) as checkpoint:
        for i in (1, 2, 3, 3, 4):
            checkpoint.save(link, i)
            comm.mpi_comm.Barrier()
            there = [path for path in out.iterdir() if path.suffix != ".tmp"]
            assert len(there) <= 2
            comm.mpi_comm.Barrier()
    comm.mpi_comm.Barrier()
    assert sorted(path.name.split("-")[0] for path in out.iterdir()) == ["3", "4"]


# What cannot be written


def limit_file_size(size):
    """Let files of this process become no larger, as on a full disk; return what undoes it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.mpi_skip
@pytest.mark.parametrize("kind", ["a full disk", "what cannot be saved"])
def test_an_error_is_all_that_is_said(kind, tmp_path, monkeypatch):
    """Nothing of "Exception ignored in ZipFile.__del__" follows when the garbage is collected."""
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)
    values = {"x": np.zeros(1 << 17)}
    undo = limit_file_size(1 << 18)
    if kind == "what cannot be saved":
        undo()
        values["y"] = np.array([lambda: 0], object)
    try:
        with pytest.raises((OSError, AttributeError, pickle.PicklingError)):
            write_npz(tmp_path / "x.npz", values, allow_pickle=True)
    finally:
        undo()
    gc.collect()
    assert ignored == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("on_error", ["raise", "warn"])
def test_a_full_disk(comm, out, on_error, asynchronous):
    """All ranks raise, or rank 0 warns and training goes on; the older checkpoint stays."""
    link = L.Linear(400, 400)  # 640 KB
    last = comm.size - 1
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Checkpoint(comm, out, on_error=on_error, asynchronous=asynchronous) as checkpoint:
            checkpoint.save(link, 1)
            checkpoint.close()
            undo = limit_file_size(1 << 18) if comm.rank == last else lambda: None
            try:
                with contextlib.ExitStack() as stack:
                    if on_error == "raise":
                        text = (
                            rf"rank {last}: .*too large.*iteration 1$" if last else "iteration 1$"
                        )
                        stack.enter_context(pytest.raises(OSError, match=text))
                    checkpoint.save(link, 2)
                    checkpoint.close()
            finally:
                undo()
            comm.mpi_comm.Barrier()
            assert [path.name.split("-")[0] for path in out.iterdir()] == ["1"]
            assert len(caught) == (1 if on_error == "warn" and comm.rank == 0 else 0)
            comm.mpi_comm.Barrier()
            checkpoint.save(link, 3)
    comm.mpi_comm.Barrier()
    assert Checkpoint(comm, out).resume(L.Linear(400, 400)) == 3


@pytest.mark.parametrize("when", ["at first", "later"])
def test_a_directory_that_cannot_be(comm, out, when):
    """A file in its place: an error on all ranks, or a warning, and training goes on."""
    link = L.Linear(2, 2)
    checkpoint = Checkpoint(comm, out / "file" / "checkpoints")
    if when == "later":
        checkpoint.save(link, 1)
        checkpoint.close()
        comm.mpi_comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(out / "file")
    if comm.rank == 0:
        (out / "file").write_text("in the way")
    comm.mpi_comm.Barrier()
    with pytest.raises(OSError, match=r"rank 0: .*file" if comm.size > 1 else "file"):
        checkpoint.save(link, 2)
    careless = Checkpoint(comm, out / "file" / "checkpoints", on_error="warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert careless.resume(link) == 0
        careless.save(link, 2)
        careless.close()
    assert len(caught) == (2 if comm.rank == 0 else 0)


def test_directories_that_are_not_shared(comm, tmp_path, monkeypatch):
    """Ranks that see directories of their own are told so, with and without checkpoints there."""
    if comm.size == 1:
        pytest.skip("one rank shares nothing")
    monkeypatch.setattr("chainer_dist.checkpoints.archive._SECONDS_TO_SEE", 0.1)
    link = L.Linear(2, 2)
    own = tmp_path / f"of rank {comm.rank}"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"rank 1 does not see in .* what rank 0 sees"):
            Checkpoint(comm, own).resume(link)
        alone = comm.split(comm.rank, 0)
        with Checkpoint(alone, own) as checkpoint:
            checkpoint.resume(link)
            checkpoint.save(link, 1)
        alone.finalize()


# What others may have written


def forge(path, change, change_content=None):
    """Change a checkpoint as somebody would who can compute checksums."""
    for name, values in change.items():
        generations.write_file(path / name, values, allow_pickle=True)
    content = json.loads((path / "manifest.json").read_bytes())["content"]
    for name in change:
        data = (path / name).read_bytes()
        content["files"][name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    content.update(change_content or {})
    text = json.dumps({"content": content, "sha256": generations._digest(content)})
    (path / "manifest.json").write_text(text)


def arrays_of(path):
    """Return the arrays of a file of a checkpoint."""
    with open_regular(path) as file:
        return dict(ArrayFile(file))


def test_no_pickle_is_loaded(comm, two, out, tmp_path):
    """A forged file is refused on every rank, with a word on what would load it, and does not run."""
    marker = Path(comm.bcast_obj(str(tmp_path))) / "marker"
    last = comm.size - 1
    if comm.rank == 0:
        values = {**arrays_of(two[1] / f"rank-{last}.npz"), "W": np.array(Attack(marker), object)}
        forge(two[1], {f"rank-{last}.npz": values})
    comm.mpi_comm.Barrier()
    with pytest.raises(RuntimeError, match=r"is not loaded: W was saved as a pickle.*allow_pickle"):
        Checkpoint(comm, out).resume(L.Linear(40, 100))
    assert not marker.exists()
    comm.mpi_comm.Barrier()
    with pytest.raises(RuntimeError, match="does not fit"):
        Checkpoint(comm, out, allow_pickle=True).resume(L.Linear(40, 100))
    comm.mpi_comm.Barrier()
    assert marker.exists()


def test_objects_are_saved_if_asked_for(comm, out):
    """Otherwise they are refused when they are saved, on every rank, by name."""

    class Words(chainer.Link):
        def __init__(self, words):
            super().__init__()
            self.words = words
            self.register_persistent("words")

    link = Words(np.array([{"a": comm.rank}, "b"], object))
    with pytest.raises(ValueError, match=r"words is an array of obj"):
        Checkpoint(comm, out).save({"link": link}, 1)
    with Checkpoint(comm, out, allow_pickle=True) as checkpoint:
        checkpoint.save({"link": link}, 1)
    again = Words(np.array([None, None]))
    with pytest.raises(RuntimeError, match="link/words was saved as a pickle"):
        Checkpoint(comm, out).resume({"link": again})
    Checkpoint(comm, out, allow_pickle=True).resume({"link": again})
    assert again.words.tolist() == [{"a": comm.rank}, "b"]


@pytest.mark.parametrize(
    "how",
    [
        "a name outside",
        "a name too many",
        "a pipe",
        "a pipe as manifest",
        "a link",
        "a folder elsewhere",
        "many ranks",
    ],
)
def test_only_plain_files_within_are_read(comm, two, out, tmp_path, how):
    """What leads elsewhere, or would wait for ever, is left out like what is damaged."""
    newest = two[-1]
    name = f"rank-{comm.size - 1}.npz"
    if comm.rank == 0:
        if how == "a pipe":
            (newest / name).unlink()
            os.mkfifo(newest / name)
        elif how == "a pipe as manifest":
            (newest / "manifest.json").unlink()
            os.mkfifo(newest / "manifest.json")
        elif how == "a link":
            (newest / name).rename(tmp_path / name)
            (newest / name).symlink_to(tmp_path / name)
        elif how == "a folder elsewhere":
            newest.rename(tmp_path / newest.name)
            newest.symlink_to(tmp_path / newest.name)
        else:
            content = json.loads((newest / "manifest.json").read_bytes())["content"]
            files = content["files"]
            if how == "many ranks":
                forge(newest, {}, {"ranks": 10**12})
            else:
                files["../x.npz" if how == "a name outside" else "x.npz"] = files[name]
                forge(newest, {}, {"files": files})
    comm.mpi_comm.Barrier()
    iteration, texts = resume_link(comm, out)
    assert iteration == 1
    assert len(texts) == (1 if comm.rank == 0 and how != "a folder elsewhere" else 0)


def test_files_of_the_version_before(comm, out):
    """They had None as a pickle, which is recognized, and did not say what they are of."""
    trainer = run(comm, out, 3)
    comm.mpi_comm.Barrier()
    (path,) = out.iterdir()
    if comm.rank == 0:
        files = {}
        for name in ("common.npz", *(f"rank-{rank}.npz" for rank in range(comm.size))):
            values = arrays_of(path / name)
            ours = ("+description", "+scalars", "+attributes")
            files[name] = {key: each for key, each in values.items() if not key.startswith(ours)}
            files[name]["updater/nothing"] = np.asarray(None)
        forge(path, files, {"format": 1})
    comm.mpi_comm.Barrier()
    again = make_trainer(comm, 99, seed=7)
    again.extend(extensions.InverseShift("eta", 0.1, 1))  # which earlier versions could not do with
    assert Checkpoint(comm, out).resume(again) == 3
    np.testing.assert_array_equal(state(again)[:-1], state(trainer)[:-1])


# What cannot be asked for


def test_errors_are_raised_on_all(comm, out):
    """Whichever rank is wrong, all raise, and say what."""
    last = comm.size - 1

    class Broken(chainer.Link):
        def serialize(self, serializer):
            if comm.rank == last:
                raise ArithmeticError("cannot be serialized")
            super().serialize(serializer)

    link = L.Linear(2, 3)
    for options, kind, text in [
        ({"keep": 0}, ValueError, "keep is 0, expected 1 or more"),
        ({"keep": 1.5}, TypeError, "float"),
        ({"on_error": "ignore"}, ValueError, "on_error is 'ignore'"),
    ]:
        with pytest.raises(kind, match=text):
            Checkpoint(comm, out, **(options if comm.rank == last else {}))
    if comm.size > 1:
        with pytest.raises(RankMismatchError, match=r"rank 1: keep is 2, expected 1 as on rank 0"):
            Checkpoint(comm, out, keep=1 + min(comm.rank, 1))
    checkpoint = Checkpoint(comm, out, asynchronous=False)
    for target, iteration, kind, text in [
        (Broken(), 1, ArithmeticError, "cannot be serialized"),
        ({"n": 3 if comm.rank == last else link}, 1, TypeError, "n has no serialize"),
        ({"a/b": link}, 1, TypeError, "without slash"),
        (3, 1, TypeError, "anything else with serialize"),
        (link, -1 if comm.rank == last else 1, ValueError, "iteration is -1"),
        (link, "1", TypeError, "iteration is '1', expected an integer"),
    ]:
        with pytest.raises(kind, match=text):
            checkpoint.save(target, iteration)
    if comm.size > 1:
        with pytest.raises(RankMismatchError, match=r"rank 1: iteration is 1, expected 0"):
            checkpoint.save(link, comm.rank)
    checkpoint.save(link, 5)
    with pytest.raises(ValueError, match=r"iteration is 4, and .* has a checkpoint of iteration 5"):
        checkpoint.save(link, 4)
    other = L.Linear(*((2, 3) if comm.rank < last else (1, 3)))
    with pytest.raises(RuntimeError, match=r"W was saved as \(3, 2\), and is \(3, 1\) now"):
        Checkpoint(comm, out).resume(other)
    other = link if comm.rank < last else {"other": link}
    with pytest.raises(
        RuntimeError, match=f"rank {last}: .*no 'other/[Wb]'" if last else "it has no 'other"
    ):
        Checkpoint(comm, out).resume(other)


def test_checkpoints_that_nobody_asked_for(comm, out):
    """Where there are some, training does not start anew without a word."""
    run(comm, out, 6)
    trainer = make_trainer(comm, 9)
    trainer.extend(Checkpoint(comm, out))
    with pytest.raises(RuntimeError, match=r"has checkpoints, up to 6-.*call resume\(\)"):
        trainer.run()
    with pytest.raises(RuntimeError, match=r"call resume\(\)"):
        Checkpoint(comm, out).save(trainer.updater.get_optimizer("main"), 7)


# Triggers, and those who watch


class TimeOfThisRank:
    """Fires at another time on each rank."""

    def __init__(self, comm) -> None:
        """Keep the rank."""
        self.rank = comm.rank

    def __call__(self, trainer):
        """Fire often."""
        return trainer.updater.iteration % (4 + self.rank) == 0


@pytest.mark.parametrize("how", ["unequal epochs", "time"])
def test_triggers_that_differ(comm, out, how, monkeypatch):
    """Where ranks' triggers fire in different iterations, all save in the same one."""
    monkeypatch.setattr("chainer_dist.checkpoints.meetings._MOST_STEPS", 3)
    part = DATA[: 6 + 3 * comm.rank]
    trainer = run(
        comm,
        out,
        30,
        trigger=(1, "epoch") if how == "unequal epochs" else TimeOfThisRank(comm),
        iterator=lambda _: iterators.SerialIterator(part, 2),
        options={"keep": 99},
    )
    assert trainer.updater.iteration == 30
    comm.mpi_comm.Barrier()
    saved = sorted(int(path.name.split("-")[0]) for path in out.iterdir())
    if how == "unequal epochs" and comm.size == 1:
        assert saved == [*range(3, 31, 3)]
    else:
        assert 4 < len(saved) < 11


def test_progress_is_told(comm, out, monkeypatch):
    """The file that the launcher names has the iteration of the newest complete checkpoint."""
    monkeypatch.setenv("CHAINER_DIST_PROGRESS", str(out / "progress"))
    with Checkpoint(comm, out / "checkpoints") as checkpoint:
        for i in (3, 12):
            checkpoint.save(L.Linear(1, 1), i)
    comm.mpi_comm.Barrier()
    assert (out / "progress").read_text() == "12"
    comm.mpi_comm.Barrier()
    manifest = json.loads(next((out / "checkpoints").glob("12-*/manifest.json")).read_bytes())
    assert manifest["content"]["ranks"] == comm.size
    assert {"chainer_dist", "chainer", "numpy", "python"} <= set(manifest["content"]["versions"])
    monkeypatch.setenv("CHAINER_DIST_PROGRESS", str(out / "again"))
    with Checkpoint(comm, out / "checkpoints") as checkpoint:
        checkpoint.resume(L.Linear(1, 1))
    comm.mpi_comm.Barrier()
    assert (out / "again").read_text() == "12"


def test_an_exception_on_all_ranks(comm, out, capfd):
    """Chainer tells extensions of it, by a method of a name that no option may have."""

    def fail(_):
        raise ArithmeticError("planted")

    trainer = make_trainer(comm, 9)
    checkpoint = Checkpoint(comm, out, on_error="raise")
    trainer.extend(checkpoint, trigger=(1, "iteration"))
    trainer.extend(fail, name="fail", trigger=(3, "iteration"))
    checkpoint.resume(trainer)
    with pytest.raises(ArithmeticError, match="planted"):
        trainer.run(show_loop_exception_msg=False)
    assert "Exception in error handler" not in capfd.readouterr().err

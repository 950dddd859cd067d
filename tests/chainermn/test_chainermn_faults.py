"""What ChainerMN gets wrong, one test each, beside ChainerMN itself where that ends well.

Its own behaviour is asserted too, so that a test in which both do the same fails.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators, optimizers, training
from chainer.training import extensions

import chainer_dist
import mpi_job

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def theirs(comm):
    """Return ChainerMN, and its naive communicator over the same ranks."""
    chainermn = importlib.import_module("chainermn")
    naive = chainermn.create_communicator("naive", mpi_comm=comm.mpi_comm)
    return types.SimpleNamespace(mn=chainermn, comm=naive)


@pytest.fixture
def several(comm):
    """Skip where there is one rank only, which cannot disagree with itself."""
    if comm.size == 1:
        pytest.skip("shows between ranks only")


def one_parameter(shape, dtype=np.float32):
    """Return a link with one parameter of zeros."""
    link = chainer.Link()
    with link.init_scope():
        link.W = chainer.Parameter(np.zeros(shape, dtype))
    return link


@pytest.mark.usefixtures("several")
def test_1_gradients_that_are_not_contiguous(comm, theirs):
    """They are averaged where they are. ChainerMN averages a copy."""
    right = []
    for communicator in (comm, theirs.comm):
        link = one_parameter((3, 4))
        link.W.grad = np.full((4, 3), 1 + comm.rank, np.float32).T
        communicator.multi_node_mean_grad(link)
        right.append(bool((link.W.grad == (comm.size + 1) / 2).all()))
    assert comm.allgather_obj(right) == [[True, False]] * comm.size


@pytest.mark.usefixtures("several")
def test_2_batches_as_they_are(comm, theirs):
    """Labels keep their dtype and positions their value. ChainerMN casts both."""
    dataset = [(np.zeros(2, np.float32), np.float32(0.7))] * 4
    labels = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        iterator = package.iterators.create_multi_node_iterator(
            iterators.SerialIterator(dataset, 2, shuffle=False), communicator
        )
        labels.append(float(next(iterator)[0][1]))
    ours, others = zip(*comm.allgather_obj(labels))
    assert ours == (float(np.float32(0.7)),) * comm.size
    assert others[1:] == (0.0,) * (comm.size - 1)


def test_3_batch_normalization_at_a_large_mean(comm, theirs):
    """The output's standard deviation is 1. ChainerMN subtracts squares that are almost equal."""
    x = (1e4 + np.random.RandomState(comm.rank).randn(64, 3)).astype(np.float32)
    stds = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        y = package.links.MultiNodeBatchNormalization(3, communicator)(x).array
        stds.append(float(np.concatenate(comm.allgather(y)).std(dtype=np.float64)))
    assert stds[0] == pytest.approx(1, abs=1e-2)
    assert stds[1] != pytest.approx(1, abs=0.1)


@pytest.mark.usefixtures("several")
def test_4_every_sample_counts_once_in_a_score(comm, theirs):
    """Uneven shards do not bias it. ChainerMN averages the ranks' averages."""
    mine = np.full((1 + 3 * comm.rank, 1), comm.rank, np.float32)
    scores = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        target = chainer.Link()

        def report(x, target=target):
            chainer.report({"score": F.mean(x)}, target)

        evaluator = package.create_multi_node_evaluator(
            extensions.Evaluator(
                iterators.SerialIterator(mine, 8, repeat=False, shuffle=False),
                target,
                eval_func=report,
            ),
            communicator,
        )
        scores.append(float(evaluator()["main/score"]))
    sizes = [1 + 3 * rank for rank in range(comm.size)]
    assert scores[0] == pytest.approx(np.average(range(comm.size), weights=sizes))
    assert scores[1] != pytest.approx(scores[0])


def test_5_the_first_update_counts(comm, theirs):
    """ChainerMN spends it on a broadcast."""
    steps = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        link = one_parameter(3)
        optimizer = package.create_multi_node_optimizer(optimizers.SGD(1.0), communicator)
        optimizer.setup(link)
        optimizer.update(lambda link=link: F.sum(link.W))
        steps.append(link.W.array.tolist())
    assert steps == [[-1] * 3, [0] * 3]


def test_6_an_order_that_was_given_is_kept(comm, theirs):
    """An unshuffled iterator stays unshuffled. ChainerMN shuffles it."""
    orders = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        iterator = package.iterators.create_synchronized_iterator(
            iterators.SerialIterator(list(range(50)), 50, shuffle=False), communicator
        )
        orders.append(next(iterator))
    assert orders[0] == list(range(50))
    assert orders[1] != list(range(50))


def test_7_float16(comm):
    """It is gathered and scattered as it is. ChainerMN ends the process inside MPI."""
    x = np.full(3, comm.rank, np.float16)
    everyone = [np.full(3, rank, np.float16) for rank in range(comm.size)]
    for got in (comm.allgather(x), comm.alltoall([x] * comm.size)):
        assert [each.dtype for each in got] == [np.float16] * comm.size
        np.testing.assert_array_equal(got, everyone)
    np.testing.assert_array_equal(comm.scatter(everyone if comm.rank == 0 else None), x)
    gathered = comm.gather(x)
    if comm.rank == 0:
        np.testing.assert_array_equal(gathered, everyone)


def test_8_integer_persistents(comm, theirs):
    """They are left alone, as ChainerMN's documentation says. It fails on them."""
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        link = chainer.Link()
        link.add_persistent("count", np.array([comm.rank, 7]))
        link.add_persistent("mean", np.full(2, float(comm.rank)))
        average = package.extensions.AllreducePersistent(link, communicator)
        if package is chainer_dist:
            average()
            assert link.count.tolist() == [comm.rank, 7]
            assert link.mean.tolist() == [(comm.size - 1) / 2] * 2
        else:
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                average()


@pytest.mark.usefixtures("several")
def test_9_models_that_change_on_some_ranks(comm):
    """All ranks make them equal together. ChainerMN mixes a broadcast with an allreduce."""
    model = chainer.ChainList(L.Linear(3, 2), L.Linear(None, 2))
    optimizer = chainer_dist.create_multi_node_optimizer(optimizers.SGD(), comm).setup(model)
    x = np.ones((1, 3), np.float32)

    def loss(both):
        return F.sum(model[0](x)) + (F.sum(model[1](x)) if both else 0)

    optimizer.update(loss, both=False)
    optimizer.update(loss, both=comm.rank == 1)
    mine = {name: param.array.tobytes() for name, param in model.namedparams()}
    assert comm.allgather_obj(mine) == [mine] * comm.size


def test_10_none_is_an_object(comm):
    """It can be broadcast. ChainerMN fails on the root alone, and the other ranks hang."""
    assert comm.bcast_obj(None if comm.rank == 0 else "anything") is None


@pytest.mark.usefixtures("several")
def test_11_backward_goes_on_behind_a_broadcast(comm, theirs):
    """What a rank other than root passes is its delegate variable. ChainerMN loses it."""
    reached = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        x = chainer.Variable(np.ones(2, np.float32))
        y = package.functions.bcast(communicator, x * 2)
        F.sum(y).backward()
        reached.append(x.grad is not None)
    assert comm.allgather_obj(reached) == [[True, True]] + [[True, False]] * (comm.size - 1)


@pytest.mark.mpi_skip
def test_12_an_exception_ends_the_job():
    """On any rank, without an environment variable. Under ChainerMN the others wait forever."""
    code = "import {} as mn; from mpi4py import MPI; comm = MPI.COMM_WORLD\n"
    code += "if comm.rank == 1: raise ValueError('on rank 1')\ncomm.Barrier()"
    ours = mpi_job.run([sys.executable, "-c", code.format("chainer_dist")], 2, timeout=60)
    assert ours.status not in (0, None)
    others = mpi_job.run(
        [sys.executable, "-W", "ignore", "-c", code.format("chainermn")], 2, timeout=8
    )
    assert others.status is None  # stopped by the time limit


def train_with_checkpoints(package, communicator, folder, stop_at=None, **options):
    """Train for six iterations, or into an exception."""
    link = one_parameter(2)
    optimizer = optimizers.SGD().setup(link)
    iterator = iterators.SerialIterator([np.ones(2, np.float32)] * 4, 2)
    updater = training.updaters.StandardUpdater(
        iterator, optimizer, loss_func=lambda x: F.sum(link.W * F.sum(x, axis=0))
    )
    trainer = training.Trainer(updater, (6, "iteration"), out=str(folder))
    checkpointer = package.create_multi_node_checkpointer(
        comm=communicator, path=str(folder), **options
    )
    trainer.extend(checkpointer, trigger=(1, "iteration"))

    def stop(trainer):
        if trainer.updater.iteration == stop_at:
            raise KeyError

    trainer.extend(stop, trigger=(1, "iteration"), priority=-1)
    with contextlib.suppress(KeyError):
        trainer.run(show_loop_exception_msg=False)


def test_13_checkpoints_survive_an_exception(comm, theirs, tmp_path):
    """They are what one resumes from. ChainerMN deletes them on the way out."""
    left = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        folder = tmp_path / package.__name__
        train_with_checkpoints(package, communicator, folder, stop_at=4, name="run")
        left.append(len([path for path in folder.iterdir() if path.is_file()]))
    assert left[0] > 0
    assert left[1] == 0


def test_14_resuming(comm, theirs, tmp_path):
    """Any name can be resumed from, and by another number of ranks."""
    resumed = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        folder = tmp_path / package.__name__
        folder.mkdir()
        name = "lr0.1"
        link = one_parameter(2)
        saver = package.create_multi_node_checkpointer(name, communicator, path=str(folder))
        link.W.array[...] = 5
        saver.save(link, 3)
        link.W.array[...] = 0
        loader = package.create_multi_node_checkpointer(name, communicator, path=str(folder))
        with contextlib.suppress(TypeError):
            loader.maybe_load(link)
        resumed.append(link.W.array.tolist())
    assert resumed == [[5, 5], [0, 0]]


class Sample:
    """A sample that counts how many of its kind a rank has received."""

    received = 0

    def __init__(self, number):
        self.number = number

    def __setstate__(self, state):
        type(self).received += 1
        self.__dict__.update(state)


@pytest.mark.usefixtures("several")
def test_15_a_rank_receives_its_part_of_a_dataset(comm, theirs):
    """And nothing more. ChainerMN sends the whole dataset to every rank."""
    received = []
    for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm)):
        Sample.received = 0
        dataset = [Sample(number) for number in range(24)] if comm.rank == 0 else None
        part = package.scatter_dataset(dataset, communicator)
        assert len(part) == 24 // comm.size
        received.append(Sample.received)
    everyone = comm.allgather_obj(received)
    assert all(ours <= 24 // comm.size for ours, _ in everyone)
    assert all(others == 24 for _, others in everyone[1:])


class Counting:
    """A communicator of mpi4py that counts its reductions."""

    def __init__(self, mpi_comm):
        self.mpi_comm, self.calls = mpi_comm, 0

    def __getattr__(self, name):
        if name == "Allreduce":
            self.calls += 1
        return getattr(self.mpi_comm, name)


def test_16_gradients_in_one_call(comm, theirs):
    """Many parameters are one reduction. ChainerMN on CPUs makes a call for each."""
    calls = []
    flat = chainer_dist.create_communicator("flat")
    for communicator in (flat, theirs.comm):
        links = chainer.ChainList(*[one_parameter(3) for _ in range(30)])
        links.cleargrads()
        for param in links.params():
            param.grad = np.full(3, comm.rank, np.float32)
        counting = Counting(communicator.mpi_comm)
        attribute = "_mpi_comm" if communicator is flat else "mpi_comm"
        setattr(communicator, attribute, counting)
        communicator.multi_node_mean_grad(links)
        setattr(communicator, attribute, counting.mpi_comm)
        calls.append(counting.calls)
    compares = comm.size > 1  # the first of ours compares the ranks' models
    assert calls == [1 + compares, 30]
    flat.finalize()


def test_17_batch_normalization_over_other_axes(comm, theirs):
    """Its axes are kept when it is made to span ranks. ChainerMN drops them."""
    axes = [
        getattr(
            package.links.create_mnbn_model(
                L.BatchNormalization(axis=(0, 1), size=3), communicator
            ),
            "axis",
            None,
        )
        for package, communicator in ((chainer_dist, comm), (theirs.mn, theirs.comm))
    ]
    assert axes == [(0, 1), None]

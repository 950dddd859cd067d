"""Ranks that meet in different agreements all raise the same error, which names them."""

from __future__ import annotations

import re
import types

import chainer
import chainer.functions as F
import chainer.links as L
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

import chainer_dist
from chainer_dist import RankMismatchError
from chainer_dist.checkpoints.meetings import Rounds
from chainer_dist.collectives.agreement import agree, check_same, digest
from chainer_dist.collectives.extremes import MOST_NUMBERS, extremes
from chainer_dist.collectives.failures import together
from chainer_dist.collectives.operation import WAITING, Kind
from chainer_dist.datasets import shard_array
from chainer_dist.extensions import ObservationAggregator
from chainer_dist.links import MultiNodeBatchNormalization

KIND = Kind("comparison of a test", WAITING)
X, T = np.ones((2, 3), np.float32), np.zeros(2, np.int32)


def do_together(comm):
    """Find out whether a rank has an error."""
    with together(comm):
        pass


def fail_together(comm):
    """Have an error, and let the others know."""
    with together(comm):
        raise OSError("a file is missing")


def compare_ten(comm):
    """Compare as many numbers as an update does."""
    agree(comm, *map(digest, range(10)))


def compare_one(comm):
    """Compare one number."""
    check_same(comm, [("the dataset", "1")])


def take_maxima(comm):
    """Do what a checkpoint's trigger does in some iterations."""
    Rounds(comm).step(1, 2, 3)


ERRORS, ONE, TEN = (
    "comparison of errors (1 number)",
    "agreement (1 number)",
    "agreement (10 numbers)",
)
MAXIMA = "round of checkpoints (4 numbers)"

# What rank 1 does, what the others do, and how both are described.
DIFFERENT = {
    "errors, ten numbers": (do_together, compare_ten, ERRORS, TEN),
    "ten numbers, errors": (compare_ten, do_together, TEN, ERRORS),
    "an error, ten numbers": (fail_together, compare_ten, ERRORS, TEN),
    "errors, one number": (do_together, compare_one, ERRORS, ONE),
    "one number, ten numbers": (compare_one, compare_ten, ONE, TEN),
    "maxima, ten numbers": (take_maxima, compare_ten, MAXIMA, TEN),
    "maxima, errors": (take_maxima, do_together, MAXIMA, ERRORS),
}


@pytest.fixture(scope="module", params=["naive", "shared_memory"])
def pair(request):
    """A communicator; that of shared memory has had its first exchange, and compares without messages."""
    with chainer_dist.create_communicator(request.param) as comm:
        comm.mean_arrays([np.ones(3, np.float32)])
        yield comm


def only_with_others(comm):
    """Skip on one rank."""
    if comm.size == 1:
        pytest.skip("one rank agrees with itself")


@pytest.mark.parametrize("kind", DIFFERENT)
def test_ranks_in_different_agreements(pair, kind):
    """All raise the same, which names the rank, both agreements and both lines; nothing is left over."""
    only_with_others(pair)
    one, other, its_text, text = DIFFERENT[kind]
    with pytest.raises(RankMismatchError) as caught:
        one(pair) if pair.rank == 1 else other(pair)
    message = str(caught.value)
    assert re.match(
        rf"rank 1: operation \d+ is {re.escape(its_text)}, at {re.escape(__file__)}:", message
    )
    assert f"expected {text}, at {__file__}:" in message
    assert set(pair.allgather_obj(message)) == {message}


def observe(comm, path):
    """Summarize an observation of all ranks."""
    del path
    aggregate = ObservationAggregator(comm, "loss")
    updater = types.SimpleNamespace(iteration=1, epoch_detail=1.0, is_new_epoch=True)
    aggregate(types.SimpleNamespace(updater=updater, observation={"loss": 1.0}))


def shard(comm, path):
    """Open a file of which each rank has some rows."""
    shard_array(path, comm)


@pytest.mark.parametrize("act", [observe, shard])
def test_one_rank_in_an_update(act, tmp_path):
    """Rank 0 has left the loop of updates that the others are in, as with fewer batches."""
    comm = chainer_dist.create_communicator("naive")
    only_with_others(comm)
    np.save(tmp_path / "x.npy", X)
    model = L.Linear(3, 2)
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), comm)
    optimizer.setup(model)
    optimizer.update(lambda: F.softmax_cross_entropy(model(X), T))

    def program():
        if comm.rank == 0:
            act(comm, tmp_path / "x.npy")
        else:
            optimizer.update(lambda: F.softmax_cross_entropy(model(X), T))

    with pytest.raises(RankMismatchError, match=r"^rank 1: operation \d+ is ") as caught:
        program()
    assert str(caught.value).count(__file__) == 2


def normalize(comm):
    """Compute means and variances of all ranks' samples."""
    with chainer.using_config("train", value=True):
        MultiNodeBatchNormalization(2, comm)(np.ones((3, 2), np.float32))


def stand_by(comm):
    """Take part in the updates of others, as a rank without data does."""
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), comm)
    optimizer.actual_optimizer.setup(L.Linear(3, 2))
    chainer_dist.Join(optimizer).stand_by()


# Operations that begin with a message of MPI, whose size or kind is that of no comparison; and one that compares.
OPERATIONS = {
    "batch normalization": normalize,
    "meeting of joined ranks": stand_by,
    "bcast_obj": lambda comm: comm.bcast_obj(1),
    "gather_obj": lambda comm: comm.gather_obj(1),
    "allgather_obj": lambda comm: comm.allgather_obj(1),
    "scatter_obj": lambda comm: comm.scatter_obj([1] * comm.size),
    "allreduce_obj": lambda comm: comm.allreduce_obj(1),
    "alltoall": lambda comm: comm.alltoall([np.ones(1)] * comm.size),
    "agreement": compare_one,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_one_rank_in_an_operation_of_mpi(name):
    """Where comparing takes no message, all raise the same, which names both operations and both lines."""
    comm = chainer_dist.create_communicator("shared_memory")
    only_with_others(comm)
    comm.mean_arrays([np.ones(3, np.float32)])
    if not comm.compares_freely:
        pytest.skip("ranks on several nodes would need a message")
    other = "bcast_obj" if name == "agreement" else "agreement"
    with pytest.raises(RankMismatchError) as caught:
        OPERATIONS[name if comm.rank == 1 else other](comm)
    message = str(caught.value)
    its_text, _, text = message.partition("; expected ")
    assert its_text.startswith("rank 1: operation ")
    assert name in its_text
    assert other in text
    assert message.count(__file__) == 2
    assert set(comm.allgather_obj(message)) == {message}


NUMBERS = st.integers(-(2**63) + 1, 2**63 - 1)


@hypothesis.given(
    st.lists(st.lists(NUMBERS, min_size=4, max_size=4), min_size=1, max_size=MOST_NUMBERS),
    st.lists(st.booleans(), min_size=MOST_NUMBERS, max_size=MOST_NUMBERS),
)
def test_extremes(pair, columns, are_same):
    """They are those of all ranks, whatever the numbers are, and which of them are the same on all."""
    columns = [one[:1] * 4 if same else one for one, same in zip(columns, are_same)]
    most, least = extremes(pair, KIND, *[column[pair.rank] for column in columns])
    assert list(most) == [max(column[: pair.size]) for column in columns]
    assert list(least) == [min(column[: pair.size]) for column in columns]


def test_many_in_a_row(pair):
    """A rank that is ahead does not overwrite numbers that others have still to read."""
    for number in range(300):
        odd = number % 7 == 0 and pair.size > 1
        assert agree(pair, number + odd * pair.rank, number) == (not odd, True)


def test_too_many_numbers(pair):
    """More than there is room for are refused before anything is sent."""
    with pytest.raises(ValueError, match=f"expected {MOST_NUMBERS} or fewer"):
        agree(pair, *range(MOST_NUMBERS + 1))


def test_a_message_arrives_meanwhile(pair):
    """A rank that waits for others in a comparison goes on sending what they wait for."""
    only_with_others(pair)
    numbers = np.arange(1 << 22)
    request = None
    if pair.rank == 0:
        request = pair.mpi_comm.Isend(numbers, 1)
    elif pair.rank == 1:
        received = np.empty_like(numbers)
        pair.mpi_comm.Recv(received, 0)
        np.testing.assert_array_equal(received, numbers)
    assert agree(pair, 3) == (True,)
    if request is not None:
        request.Wait()

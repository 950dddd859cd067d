"""Small comparisons, by an allreduce or through shared memory, and ranks that come to different ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import chainer_dist
from chainer_dist.collectives.agreement import agree, check_same
from chainer_dist.collectives.failures import raise_together
from chainer_dist.collectives.group import ROOM
from chainer_dist.collectives.operation import WAITING, Kind
from chainer_dist.errors import RankMismatchError

KIND, OTHER = Kind("comparison of a test", WAITING), Kind("comparison of another one", WAITING)
NUMBERS = st.integers(-(2**63) + 1, 2**63 - 1)


@pytest.fixture(scope="module", params=["naive", "shared_memory"])
def comm(request):
    """A communicator, that of shared memory after its first exchange."""
    with chainer_dist.create_communicator(request.param) as comm:
        comm.mean_arrays([np.ones(3, np.float32)])
        yield comm


@given(
    rows=st.lists(st.lists(NUMBERS, min_size=4, max_size=4), max_size=ROOM - 2),
    changed=st.lists(st.booleans(), min_size=ROOM, max_size=ROOM),
)
def test_each_number_by_itself(comm, rows, changed):
    """Whatever the numbers, and however many: true where all ranks have the same."""
    columns = [row if own else row[:1] * 4 for row, own in zip(rows, changed)]
    found = comm.compare_numbers(KIND, [column[comm.rank] for column in columns])
    assert found == tuple(len({*column[: comm.size]}) == 1 for column in columns)


def test_many_in_a_row(comm):
    """A rank that is ahead does not overwrite what others have still to read."""
    for number in range(300):
        odd = number % 7 == 0 and comm.size > 1
        assert agree(comm, number + odd * comm.rank, number) == (not odd, True)


def test_too_many(comm):
    """More numbers than there is room for are refused at once."""
    with pytest.raises(ValueError, match=f"expected {ROOM - 2} or fewer"):
        comm.compare_numbers(KIND, [0] * (ROOM - 1))


def test_different_comparisons(comm):
    """Ranks that come to different ones are told so, and go on afterwards."""
    if comm.size == 1:
        return
    last = comm.rank == comm.size - 1
    with pytest.raises(
        RankMismatchError,
        match=f"rank {comm.size - 1}: it has come to the {OTHER.name}, expected the {KIND.name} as on rank 0",
    ):
        comm.compare_numbers(OTHER if last else KIND, [1] * (3 if last else 2))
    come = (
        (lambda: check_same(comm, [("x", "1")])) if last else (lambda: raise_together(comm, None))
    )
    with pytest.raises(RankMismatchError, match=f"rank {comm.size - 1}: it has come to the"):
        come()
    with pytest.raises(RankMismatchError, match="each of which begins with the agreement"):
        agree(comm, *[1] * (1 + last))
    assert agree(comm, 5) == (True,)


def test_a_message_arrives_meanwhile(comm):
    """A rank that waits for others in a comparison goes on sending what they wait for."""
    if comm.size == 1:
        return
    numbers = np.arange(1 << 22)
    request = None
    if comm.rank == 0:
        request = comm.mpi_comm.Isend(numbers, 1)
    elif comm.rank == 1:
        received = np.empty_like(numbers)
        comm.mpi_comm.Recv(received, 0)
        np.testing.assert_array_equal(received, numbers)
    assert agree(comm, 3) == (True,)
    if request is not None:
        request.Wait()

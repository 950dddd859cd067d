"""Python objects between ranks."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

OBJECTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


class BadSum:
    """An object that cannot be added."""

    def __add__(self, other):
        raise ArithmeticError("no sum")


@given(obj=OBJECTS)
def test_objects_arrive_equal(comm, obj):
    """Any picklable object, None too, arrives on every rank by every way."""
    mine, root = (comm.rank, obj), comm.size - 1
    everyone = [(rank, obj) for rank in range(comm.size)]
    assert comm.allgather_obj(mine) == everyone
    gathered = comm.gather_obj(mine, root=root)
    assert gathered == (everyone if comm.rank == root else None)
    sent = obj if comm.rank == root else "ignored"
    received = comm.bcast_obj(sent, root=root)
    assert received == obj
    assert comm.rank != root or received is obj
    assert comm.scatter_obj(everyone if comm.rank == root else None, root=root) == mine
    if comm.size > 1:
        comm.send_obj(mine, (comm.rank + 1) % comm.size)
        left = (comm.rank - 1) % comm.size
        assert comm.recv_obj(left) == (left, obj)


def test_tags_select_messages(comm):
    """recv_obj takes the message of the tag it asks for."""
    if comm.size == 1:
        return
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    comm.send_obj("first", right, tag=1)
    comm.send_obj("second", right, tag=2)
    assert comm.recv_obj(left, tag=2) == "second"
    assert comm.recv_obj(left, tag=1) == "first"


def test_collectives_do_not_take_pending_messages(comm):
    """A message under way to rank 0 is not mistaken for part of a reduction."""
    if comm.rank == comm.size - 1 and comm.size > 1:
        comm.send_obj("pending", 0)
    assert comm.allreduce_obj(1) == comm.size
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))
    if comm.rank == 0 and comm.size > 1:
        assert comm.recv_obj(comm.size - 1) == "pending"


def test_allreduce_obj_adds_in_order_of_rank(comm):
    """Lists concatenate in the order of rank, and the callers' own objects stay as they were."""
    mine = [comm.rank]
    assert comm.allreduce_obj(mine) == list(range(comm.size))
    assert mine == [comm.rank]
    total = comm.allreduce_obj(np.full(3, comm.rank))
    np.testing.assert_array_equal(total, np.full(3, sum(range(comm.size))))


def test_large_buffers_are_shared_with_nobody(comm):
    """What arrives out of band is writable, and writing to it changes no other rank's."""
    x = np.full(1 << 18, float(comm.rank))
    received = comm.bcast_obj({"x": x})
    if comm.rank != 0:
        received["x"] += 1 + comm.rank
    assert comm.allgather_obj(float(received["x"][0])) == [0.0] + [
        1.0 + rank for rank in range(1, comm.size)
    ]


@pytest.mark.parametrize("wrong", ["first", "last"])
@pytest.mark.parametrize("operation", ["bcast", "gather", "allgather", "scatter", "allreduce"])
def test_an_object_that_cannot_be_pickled(comm, operation, wrong):
    """The error of one rank is raised wherever its object was expected, and nobody hangs."""
    culprit = 0 if wrong == "first" else comm.size - 1
    obj = threading.Lock() if comm.rank == culprit else 1
    calls = {
        "bcast": lambda: comm.bcast_obj(obj, root=culprit),
        "gather": lambda: comm.gather_obj(obj, root=0),
        "allgather": lambda: comm.allgather_obj(obj),
        "scatter": lambda: comm.scatter_obj([obj] * comm.size, root=culprit),
        "allreduce": lambda: comm.allreduce_obj(obj),
    }
    if operation == "gather" and comm.rank not in (0, culprit):
        calls[operation]()
    else:
        match = f"rank {culprit}: cannot pickle" if comm.size > 1 else "cannot pickle"
        with pytest.raises(TypeError, match=match):
            calls[operation]()
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))


def test_all_ranks_begin_to_send(comm):
    """No rank waits for its receiver, however large the objects: all send, then all receive."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    requests = [
        comm.isend_obj({"x": np.full(300_000, comm.rank + i)}, right, tag=i) for i in (1, 2)
    ]
    for i in (2, 1):
        np.testing.assert_array_equal(comm.recv_obj(left, tag=i)["x"], np.full(300_000, left + i))
    for request in requests:
        request.wait()


@pytest.mark.parametrize("method", ["send_obj", "isend_obj"])
def test_sending_what_cannot_be_pickled(comm, method):
    """Sender and receiver both raise."""
    if comm.size == 1:
        return
    if comm.rank == 0:
        with pytest.raises(TypeError, match="rank 0: cannot pickle"):
            getattr(comm, method)(threading.Lock(), 1)
    if comm.rank == 1:
        with pytest.raises(TypeError, match="rank 0: cannot pickle"):
            comm.recv_obj(0)


def test_objects_that_cannot_be_added(comm):
    """A failing ``+`` raises on every rank."""
    if comm.size == 1:
        return
    with pytest.raises(ArithmeticError, match="no sum"):
        comm.allreduce_obj(BadSum())


@pytest.mark.parametrize("objs", [None, [], "ab" * 8])
def test_scatter_obj_needs_one_object_a_rank(comm, objs):
    """A sequence of another length than the communicator raises on every rank."""
    with pytest.raises(ValueError, match=f"needs {comm.size} objects"):
        comm.scatter_obj(objs if comm.rank == 0 else None)

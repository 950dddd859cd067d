"""Python objects between ranks."""

from __future__ import annotations

import json
import pickle
import subprocess
import tempfile
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.collectives import agreement, failures

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


OPERATIONS = {
    "bcast": lambda comm, obj, root: comm.bcast_obj(obj, root=root),
    "gather": lambda comm, obj, _: comm.gather_obj(obj, root=0),
    "allgather": lambda comm, obj, _: comm.allgather_obj(obj),
    "scatter": lambda comm, obj, root: comm.scatter_obj([obj] * comm.size, root=root),
    "allreduce": lambda comm, obj, _: comm.allreduce_obj(obj),
}


@pytest.mark.parametrize("wrong", ["first", "last"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_object_that_cannot_be_pickled(comm, operation, wrong):
    """The error of one rank is raised on all, and nobody hangs."""
    culprit = 0 if wrong == "first" else comm.size - 1
    obj = threading.Lock() if comm.rank == culprit else 1
    match = f"rank {culprit}: cannot pickle" if comm.size > 1 else "cannot pickle"
    with pytest.raises(TypeError, match=match):
        OPERATIONS[operation](comm, obj, culprit)
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))


class TwoArgumentsError(LookupError):
    """One that cannot be made of a text alone."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class MuteError(ArithmeticError):
    """One that has no text."""

    def __str__(self):
        raise RuntimeError("no text")

    __repr__ = __str__


class ForgetfulError(BufferError):
    """One that says the same whatever it is made of."""

    def __str__(self):
        return "always the same"


class UnpicklableError(OSError):
    """One whose instances cannot be pickled, nor copied."""

    def __reduce_ex__(self, protocol):
        raise pickle.PicklingError("never")


def strange_errors():
    """Return errors that are hard to tell of, each with the class and the text that arrive."""

    class Text(str):
        """A text of a class that nobody else knows."""

        __slots__ = ()

    class LocalError(KeyError):
        def __str__(self):
            return Text("its reason")

    class LockedError(Exception):
        def __init__(self, text):
            super().__init__(text, threading.Lock())
            self.file = tempfile.TemporaryFile()  # noqa: SIM115

        def __str__(self):
            return self.args[0]

    class LocalExit(SystemExit):
        pass

    class LocalBaseError(BaseException):
        pass

    return {
        "plain": (ValueError("why"), ValueError, "why"),
        "of a module": (json.JSONDecodeError("why", "doc", 2), ValueError, "JSONDecodeError: why"),
        "exit": (SystemExit("why"), SystemExit, "why"),
        "interrupt": (KeyboardInterrupt("why"), KeyboardInterrupt, "why"),
        "local": (LocalError("x"), KeyError, "LocalError: its reason"),
        "with a lock": (LockedError("why"), RuntimeError, "LockedError: why"),
        "local exit": (LocalExit(3), SystemExit, "LocalExit: exit with status 3"),
        "local base": (LocalBaseError("why"), RuntimeError, "LocalBaseError: why"),
        "two arguments": (TwoArgumentsError(1, 2), LookupError, "TwoArgumentsError: 1 and 2"),
        "two arguments of a library": (
            subprocess.CalledProcessError(3, "true"),
            subprocess.SubprocessError,
            "CalledProcessError: .* status 3",
        ),
        "mute": (MuteError("x"), ArithmeticError, r"MuteError: \(no text: .* raises RuntimeError"),
        "forgetful": (ForgetfulError("x"), BufferError, "ForgetfulError: always the same"),
        "unpicklable": (UnpicklableError("why"), UnpicklableError, "why"),
    }


class Raising:
    """An object that raises when it is pickled, or when it is unpickled on some rank."""

    def __init__(self, error, *, sends=False, where=()):
        self.error, self.sends, self.where = error, sends, where

    def __reduce__(self):
        if not self.sends:
            raise self.error
        return revive, (self.where,)

    def __add__(self, other):
        return self


_here = None  # this rank, and the error that it is to raise


def revive(where):
    """Return such an object, or raise what this rank is to raise."""
    rank, error = _here
    if rank in where:
        raise error
    return Raising(None, sends=True, where=where)


@pytest.mark.parametrize("case", strange_errors())
def test_errors_of_any_class(comm, case):
    """Class, or the nearest that can be had, and text reach every rank; the cause stays where it was.

    What is no Exception is raised itself where it was: it is to end this rank.
    """
    error, kind, text = strange_errors()[case]
    culprit = comm.size - 1
    mine = error if comm.rank == culprit else None
    if comm.size == 1:
        with pytest.raises(type(error)) as caught:
            failures.raise_together(comm, mine)
        assert caught.value is error
        return
    is_itself = mine is not None and not isinstance(error, Exception)
    match = None if is_itself else f"rank {culprit}: {text}"
    kind = type(error) if is_itself else kind
    for attempt in (
        lambda: failures.raise_together(comm, mine),
        lambda: comm.allgather_obj(Raising(error) if mine else 1),
        lambda: comm.bcast_obj(Raising(error) if mine else None, root=culprit),
    ):
        with pytest.raises(kind, match=match) as caught:
            attempt()
        assert type(caught.value) is kind
        assert (caught.value if is_itself else caught.value.__cause__) is mine
    if comm.rank == culprit:
        with pytest.raises(kind, match=match):
            comm.send_obj(Raising(error), 0)
    if comm.rank == 0:
        with pytest.raises(kind, match=f"rank {culprit}: {text}"):
            comm.recv_obj(culprit)
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))


@pytest.mark.parametrize("case", strange_errors())
def test_an_error_made_anew_of_its_class(case):
    """What is raised in the place of another error, with more words, is of its class or the nearest."""
    error, kind, text = strange_errors()[case]
    with pytest.raises((type(error), kind), match="more words"):
        raise failures.rebuild_error(type(error), f"more words: {text}") from error


@pytest.mark.parametrize("wrong", ["first", "last"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_object_that_one_rank_cannot_unpickle(comm, operation, wrong, monkeypatch):
    """All ranks raise what that one has met, and nobody hangs."""
    receivers = {"gather": [0], "bcast": range(1, comm.size)}.get(operation, range(comm.size))
    if not receivers:
        pytest.skip("nobody receives anything")
    culprit = receivers[0 if wrong == "first" else -1]
    mine = ValueError("cannot revive")
    monkeypatch.setattr(f"{__name__}._here", (comm.rank, mine))
    obj = Raising(None, sends=True, where=[culprit])
    with pytest.raises(ValueError, match="cannot revive") as caught:
        OPERATIONS[operation](comm, obj, 0)
    if comm.size > 1:
        assert str(caught.value).startswith("rank ")
        assert f"rank {culprit}: " in str(caught.value)
        assert caught.value.__cause__ is (mine if comm.rank == culprit else None)
    assert comm.allgather_obj(comm.rank) == list(range(comm.size))


@pytest.mark.parametrize("rank", ["0", MuteError, Raising(None), 10**9, -1, None])
def test_something_that_is_no_rank(comm, rank):
    """It is refused on every rank, whatever it is, also if one rank only has it."""
    if rank is MuteError:
        rank = MuteError()
    with pytest.raises(ValueError, match=r"root is .*, expected a rank"):
        agreement.agreed_rank(comm, rank if comm.rank == 0 else 0, "root")


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

"""What a rank is doing: numbered alike on all ranks, nested, described, and cheap."""

from __future__ import annotations

import inspect
import threading
import time

import chainer
import numpy as np
import pytest

import chainer_dist
import chainer_dist.watch
from chainer_dist import RankMismatchError
from chainer_dist.collectives import operation
from chainer_dist.collectives.operation import Kind, Observer, Operation, collective


class Recorder(Observer):
    """Keeps what ends."""

    def __init__(self):
        self.seen = []

    def left(self, operation, end):
        """See :meth:`Observer.left`."""
        assert end >= operation.begun
        self.seen.append(
            (operation.describe(), operation.number, operation.depth, operation.kind.category)
        )


@pytest.fixture
def recorder():
    """Return a recorder of the test's operations."""
    found = Recorder()
    operation.observers.append(found)
    yield found
    operation.observers.remove(found)


def outermost(recorder):
    """Return descriptions and numbers of operations that are not within others."""
    return [(text, number) for text, number, depth, _ in recorder.seen if depth == 0]


def test_every_collective_has_a_number(any_comm, recorder):
    """It is that of the call, the same on every rank, however many calls are within one."""
    size, x = any_comm.size, np.zeros((3, 4), np.float32)
    first = any_comm.operation_log.number + 1
    any_comm.bcast(x, root=size - 1)
    any_comm.gather(x)
    any_comm.allgather(x)
    any_comm.alltoall([x] * size)
    any_comm.scatter([x] * size)
    any_comm.allreduce(x, op="max")
    any_comm.bcast_obj("text", root=size - 1)
    any_comm.gather_obj(1)
    any_comm.allgather_obj(None)
    any_comm.scatter_obj([1] * size)
    any_comm.allreduce_obj(2.5)
    any_comm.mean_arrays([x, x.copy()])
    any_comm.bcast_data(chainer.Link())
    any_comm.multi_node_mean_grad(chainer.Link(), zero_fill=True)
    any_comm.split(0, any_comm.rank).finalize()
    root = f", root={size - 1}" if size > 1 else ""
    texts = [
        f"bcast(x=(3, 4) float32{root})",
        "gather(x=(3, 4) float32)",
        "allgather(x=(3, 4) float32)",
        f"alltoall(xs={size} arrays)",
        f"scatter(xs={size} arrays)",
        "allreduce(x=(3, 4) float32, op='max')",
        f"bcast_obj(obj='text'{root})",
        "gather_obj(obj=1)",
        "allgather_obj(obj=None)",
        f"scatter_obj(objs={size} objects)",
        "allreduce_obj(obj=2.5)",
        "mean_arrays(arrays=2 arrays)",
        "bcast_data",
        "multi_node_mean_grad(zero_fill=True)",
        f"split(color=0, key={any_comm.rank})",
    ]
    assert outermost(recorder)[:-1] == [(text, first + index) for index, text in enumerate(texts)]
    assert outermost(recorder)[-1] == ("finalize", 1)  # of the communicator that split made
    number = any_comm.operation_log.number
    assert set(any_comm.allgather_obj(number)) == {first + len(texts) - 1}
    recent = list(any_comm.operation_log.recent)[-len(texts) - 1 : -1]
    assert [name for _, name in recent] == [text.partition("(")[0] for text in texts]


def test_messages_have_no_number(comm, recorder):
    """Ranks do not send and receive in step, so messages count for nothing."""
    if comm.size == 1:
        pytest.skip("messages need another rank")
    before = comm.operation_log.number
    if comm.rank == 0:
        comm.send(np.zeros(2), dest=1, tag=3)
        comm.send_obj("x", 1)
    elif comm.rank == 1:
        comm.recv(source=0, tag=3)
        comm.recv_obj(0)
    wanted = {
        0: [("send(data=(2,) float64, dest=1, tag=3)", 0), ("send_obj(obj='x', dest=1)", 0)],
        1: [("recv(source=0, tag=3)", 0), ("recv_obj(source=0)", 0)],
    }
    assert outermost(recorder) == wanted.get(comm.rank, [])
    assert comm.operation_log.number == before


def test_an_operation_within_one_of_another_communicator_counts(comm):
    """Numbers are per communicator."""
    part = comm.split(0, comm.rank)
    outer, inner = comm.operation_log.number, part.operation_log.number

    @collective()
    def both(comm):
        part.allgather_obj(1)
        comm.allgather_obj(1)
        part.allgather_obj(1)

    both(comm)
    assert (comm.operation_log.number, part.operation_log.number) == (outer + 1, inner + 2)
    part.finalize()


def test_an_update_has_stages(any_comm, recorder):
    """Two comparisons in which ranks wait, forward and backward between them, exchange, and update."""
    model = chainer.links.Linear(3, 2)
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), any_comm)
    optimizer.setup(model)
    x = np.ones((2, 3), np.float32)
    optimizer.update(lambda: chainer.functions.sum(model(x)))
    recorder.seen.clear()
    optimizer.update(lambda: chainer.functions.sum(model(x)))
    names = [(text, category) for text, _, depth, category in recorder.seen if depth == 1]
    assert names[:4] == [
        ("comparison of parameters", "waiting"),
        ("forward", "forward"),
        ("backward", "backward"),
        ("comparison of gradients", "waiting"),
    ]
    if any_comm.size > 1:
        assert {category for _, category in names[4:]} == {"exchange"}
    text, _, depth, category = recorder.seen[-1]
    assert (text, depth, category) == ("update", 0, "update")
    numbers = [number for _, number, _, _ in recorder.seen if number]
    assert len(set(map(tuple, any_comm.allgather_obj(numbers)))) == 1


def test_what_is_broadcast_is_said(comm, recorder):
    """Of parameters each by its name."""
    comm.bcast_data(chainer.links.Linear(3, 2))
    said = [text for text, _, depth, _ in recorder.seen if depth == 1]
    assert said[-2:] == ["broadcast of /W", "broadcast of /b"]


def test_an_error_ends_an_operation(comm):
    """It is counted, and no operation is left."""
    before = comm.operation_log.number
    with pytest.raises(RankMismatchError if comm.size > 1 else TypeError):
        comm.allreduce("text" if comm.rank == 0 else np.zeros(2))
    assert comm.operation_log.number == before + 1
    assert not operation.stacks()


def test_a_call_with_wrong_arguments(comm):
    """It fails as it would without being watched, and can be described all the same."""
    seen = []

    @collective("root")
    def called(comm, root=0):
        seen.append((comm, root))

    with pytest.raises(TypeError, match="unexpected keyword argument 'rood'"):
        called(comm, rood=1)
    kind = Kind("called", "exchange", signature=inspect.signature(called))
    with Operation(kind, comm, (1, 2, 3)) as found:
        assert found.arguments() == {}
        assert found.describe() == "called"
    assert not seen


def test_threads_have_operations_of_their_own(comm):
    """Another thread can see them, and their source lines."""
    inside, leave = threading.Event(), threading.Event()

    def work():
        with (
            Operation(Kind("work", "update", waits=False)),
            Operation(Kind("more of", "exchange"), comm, within="it"),
        ):
            inside.set()
            leave.wait(60)

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(60)
    with Operation(Kind("main", "update", waits=False)):
        found = {
            ident: [each.describe() for each in stack]
            for ident, stack in operation.stacks().items()
        }
    leave.set()
    thread.join()
    assert found[thread.ident] == ["work", "more of it"]
    assert found[threading.get_ident()] == ["main"]
    assert not operation.stacks()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (np.zeros((2, 0), np.float16), "(2, 0) float16"),
        (np.float32(1), "() float32"),
        ([np.zeros(1)] * 3, "3 arrays"),
        ((1, "a"), "2 objects"),
        (None, "None"),
        (-1.5, "-1.5"),
        ("x" * 100, f"'{'x' * 59}..."),
        (object(), ""),
        ({1: 2}, ""),
    ],
)
def test_values_in_a_few_words(value, text):
    """Arrays by shape and dtype, never by what is in them."""
    assert operation.brief(value) == text


def test_signatures_stay():
    """What is watched has the parameters and the documentation that it had."""
    method = chainer_dist.CommunicatorBase.allreduce
    assert list(inspect.signature(method).parameters) == ["self", "x", "op"]
    assert "Combine the arrays" in method.__doc__


def test_an_operation_costs_microseconds(comm):
    """Entering and leaving one takes less than 20 microseconds even on a busy machine."""

    @collective("root")
    def nothing(comm, root=0):
        pass

    best = float("inf")
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(500):
            nothing(comm, 1)
        best = min(best, (time.perf_counter() - started) / 500)
    assert best < 20e-6

"""Messages that gradients flow back through, against the same computation in one process."""

from __future__ import annotations

import sys
import textwrap

import chainer
import chainer.functions as F
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mpi_job
from chainer_dist import functions
from chainer_dist.functions import gradient_messages


@pytest.fixture
def comm(comm):
    """Skip where there is nobody to send to."""
    if comm.size == 1:
        pytest.skip("one rank has nobody to send to")
    return comm


def data(rank, shape=(3, 2), dtype=np.float64):
    """Return what a rank has, known to every rank."""
    return np.asarray(np.random.RandomState(rank).uniform(0.5, 1.5, shape)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(3, 2), (), (0, 4), (100000,)])
def test_values_and_gradients(comm, dtype, shape):
    """A ring of ranks: each gets its neighbour's variable, and the gradient of its own."""
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    x = chainer.Variable(data(comm.rank, shape, dtype))
    delegate = functions.send(x, comm, right)
    y = functions.recv(comm, left, delegate_variable=delegate)
    assert y.dtype == dtype
    np.testing.assert_array_equal(y.array, data(left, shape, dtype))
    F.sum(F.cast(y, np.float64) * (comm.rank + 2)).backward()
    assert x.grad.dtype == dtype
    np.testing.assert_array_equal(x.grad, np.full(shape, right + 2))


@pytest.mark.parametrize("container", [tuple, list])
@pytest.mark.parametrize("force_tuple", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_tuples(comm, container, force_tuple, n):
    """Several variables travel in one message; a single one is a tuple if forced."""
    xs = [chainer.Variable(data(i, (2, i + 1))) for i in range(n)]
    if comm.rank == 0:
        functions.send(container(xs), comm, 1, tag=3).backward()
        for i, x in enumerate(xs):
            np.testing.assert_array_equal(x.grad, np.full(x.shape, i + 1.0))
    elif comm.rank == 1:
        ys = functions.recv(comm, 0, tag=3, force_tuple=force_tuple)
        assert isinstance(ys, tuple) == (force_tuple or n > 1)
        ys = ys if isinstance(ys, tuple) else (ys,)
        sum(F.sum(y) * (i + 1) for i, y in enumerate(ys)).backward()


def test_variables_that_the_receiver_does_not_use(comm):
    """They get zeros."""
    xs = tuple(chainer.Variable(data(i)) for i in range(3))
    if comm.rank == 0:
        functions.send(xs, comm, 1).backward()
        np.testing.assert_array_equal([x.grad.sum() for x in xs], [0, 6, 0])
    elif comm.rank == 1:
        F.sum(functions.recv(comm, 0)[1]).backward()


@pytest.mark.parametrize("plain", [True, False])
def test_inputs_that_need_no_gradient(comm, plain):
    """Arrays and variables without gradient can be sent; backward leaves nobody waiting."""
    if comm.rank == 0:
        w = chainer.Variable(data(1))
        x = data(0) if plain else chainer.Variable(data(0), requires_grad=False)
        functions.send((x, w), comm, 1).backward()
        np.testing.assert_array_equal(w.grad, data(0))
    elif comm.rank == 1:
        x, w = functions.recv(comm, 0)
        F.sum(x * w).backward()


def test_integers_travel_without_gradients(comm):
    """Alone or beside floats, in both passes."""
    ids = np.arange(4, dtype=np.int32)
    if comm.rank == 0:
        x = chainer.Variable(data(0, (4, 2)))
        first = functions.send(ids, comm, 1)
        (second,) = functions.pseudo_connect(first, functions.send((x, ids), comm, 1))
        second.backward()
        np.testing.assert_array_equal(x.grad, np.arange(4.0)[:, None] + np.zeros((4, 2)))
    elif comm.rank == 1:
        np.testing.assert_array_equal(functions.recv(comm, 0).array, ids)
        x, got = functions.recv(comm, 0)
        assert got.dtype == np.int32
        F.sum(x * got.array[:, None].astype(np.float64)).backward()


@given(order=st.permutations(range(4)), separately=st.booleans(), data_=st.data())
def test_each_message_gets_its_own_gradient(comm, order, separately, data_):
    """However the receiver's graph is built, and in whatever order its losses are taken."""
    depths = data_.draw(st.lists(st.integers(0, 3), min_size=4, max_size=4))
    if comm.rank == 0:
        xs = [chainer.Variable(data(i)) for i in range(4)]
        delegates = [functions.send(x, comm, 1) for x in xs]
        joined = delegates[0]
        for each in delegates[1:]:
            (joined,) = functions.pseudo_connect(each, joined)
        joined.backward()
        for i, x in enumerate(xs):
            np.testing.assert_array_equal(x.grad, np.full(x.shape, i + 1.0))
    elif comm.rank == 1:
        losses = []
        for i in range(4):
            y = functions.recv(comm, 0)
            for _ in range(depths[i]):
                y = y * 1.0
            losses.append(F.sum(y) * (i + 1))
        losses = [losses[i] for i in order]
        for loss in losses if separately else [sum(losses)]:
            loss.backward()


@pytest.mark.parametrize("n_bytes", [1 << 10, 1 << 22])
def test_exchanges_that_do_not_depend_on_one_another(comm, n_bytes):
    """Ranks that send before they receive, several times and much, wait for nobody for ever."""
    if comm.rank > 1:
        return
    other = 1 - comm.rank
    w = chainer.Variable(data(comm.rank, (n_bytes // 8,)))
    total, delegates = 0, []
    for i in range(3):
        h = w * (i + 1.0)
        for _ in range(i * comm.rank):  # graphs of different depth
            h = h * 1.0
        delegates.append(functions.send(h, comm, other))
        total += F.sum(functions.recv(comm, other) ** 2)
    for each in delegates:
        (total,) = functions.pseudo_connect(each, total)
    total.backward()
    np.testing.assert_allclose(w.grad, sum(2 * (i + 1) ** 2 for i in range(3)) * w.array)


def test_there_and_back(comm):
    """A model whose first and last layers are on rank 0 and the middle on rank 1."""
    x, w = data(5), [chainer.Parameter(data(i, (2, 2))) for i in range(3)]
    if comm.rank == 0:
        delegate = functions.send(F.tanh(F.matmul(x, w[0])), comm, 1)
        h = functions.recv(comm, 1, delegate_variable=delegate)
        F.sum(F.matmul(h, w[2]) ** 2).backward()
    elif comm.rank == 1:
        h = functions.recv(comm, 0)
        functions.send(F.tanh(F.matmul(h, w[1])), comm, 0).backward()
    grads = [p.grad for p in w]
    alone = [chainer.Parameter(p.array) for p in w]
    h = F.tanh(F.matmul(F.tanh(F.matmul(x, alone[0])), alone[1]))
    F.sum(F.matmul(h, alone[2]) ** 2).backward()
    for i in {0: (0, 2), 1: (1,)}.get(comm.rank, ()):
        np.testing.assert_allclose(grads[i], alone[i].grad, rtol=1e-12)


def test_what_is_sent_is_what_it_was(comm):
    """Writing to an array after it was sent changes nothing for the receiver, in both passes."""
    n = 1 << 20
    if comm.rank == 0:
        x = chainer.Variable(np.ones(n))
        delegate = functions.send(x, comm, 1)
        x.array[...] = 2
        comm.send_obj("written", 1, tag=9)
        delegate.backward()
        np.testing.assert_array_equal(x.grad, np.full(n, 3.0))
    elif comm.rank == 1:
        assert comm.recv_obj(0, tag=9) == "written"
        y = functions.recv(comm, 0)
        np.testing.assert_array_equal(y.array, np.ones(n))
        b = chainer.Parameter(np.zeros(n))
        z = y + b  # y and b have one and the same array as their gradients
        z.grad = np.full(n, 3.0)
        z.backward()
        b.grad *= 10  # as an optimizer's hook does


def test_send_does_not_wait_until_there_is_no_room(comm, monkeypatch):
    """A sender runs ahead by a limited number of bytes, and by any single message."""
    monkeypatch.setattr(gradient_messages, "ROOM", 1 << 22)
    if comm.rank == 0:
        with chainer.no_backprop_mode():
            functions.send(data(0, (1 << 20,)), comm, 1)  # 8 MiB
            ahead = comm.size  # the receiver has not been asked to receive yet
            comm.send_obj(ahead, 1, tag=9)
            for i in range(3):
                functions.send(data(i, (1 << 20,)), comm, 1)
    elif comm.rank == 1:
        assert comm.recv_obj(0, tag=9) == comm.size
        for i in (0, 0, 1, 2):
            np.testing.assert_array_equal(functions.recv(comm, 0).array, data(i, (1 << 20,)))


def test_with_plain_messages(comm):
    """What the communicator's send and recv do fits the functions'."""
    if comm.rank == 0:
        comm.send(data(0), 1, 4)
        comm.send((data(0), data(1)), 1, 4)
        with chainer.no_backprop_mode():
            functions.send(data(2), comm, 1, tag=5)
            functions.send((data(2), data(3)), comm, 1, tag=5)
    elif comm.rank == 1:
        y = functions.recv(comm, 0, tag=4)
        np.testing.assert_array_equal(y.array, data(0))
        F.sum(y).backward()
        assert [x.shape for x in functions.recv(comm, 0, tag=4)] == [(3, 2), (3, 2)]
        np.testing.assert_array_equal(comm.recv(0, 5), data(2))
        np.testing.assert_array_equal(comm.recv(0, 5)[1], data(3))


def test_backward_twice(comm):
    """Each backward exchanges gradients again, and they add up."""
    if comm.rank == 0:
        x = chainer.Variable(data(0))
        delegate = functions.send(x, comm, 1)
        delegate.backward()
        delegate.backward()
        np.testing.assert_array_equal(x.grad, np.full(x.shape, 2.0))
    elif comm.rank == 1:
        loss = F.sum(functions.recv(comm, 0))
        loss.backward()
        loss.backward()


def test_a_receiver_without_backprop_mode(comm):
    """The sender's backward raises instead of waiting."""
    if comm.rank == 0:
        x = chainer.Variable(data(0))
        with pytest.raises(
            RuntimeError, match=r"rank 1: there is no gradient.*mode is off on rank 1"
        ):
            functions.send(x, comm, 1).backward()
    elif comm.rank == 1:
        with chainer.no_backprop_mode():
            functions.recv(comm, 0)


def test_a_failure_in_backward_reaches_those_who_wait(comm):
    """A rank that cannot get its gradient tells the ranks that wait for one from it."""
    if comm.size < 3:
        pytest.skip("needs three ranks")
    message = "rank 2: there is no gradient"
    if comm.rank == 0:
        with pytest.raises(RuntimeError, match=f"rank 1: {message}"):
            functions.send(chainer.Variable(data(0)), comm, 1).backward()
    elif comm.rank == 1:
        with pytest.raises(RuntimeError, match=message):
            functions.send(functions.recv(comm, 0) * 2, comm, 2).backward()
    elif comm.rank == 2:
        with chainer.no_backprop_mode():
            functions.recv(comm, 1)


def test_double_backprop_raises(comm):
    """The first gradient is right; differentiating it again is an error, not a wrong value."""
    if comm.rank == 0:
        x = chainer.Variable(data(0))
        (grad,) = chainer.grad([functions.send(x * x, comm, 1)], [x], enable_double_backprop=True)
        np.testing.assert_allclose(grad.array, 4 * data(0) ** 3)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            F.sum(grad**2).backward()
    elif comm.rank == 1:
        F.sum(functions.recv(comm, 0) ** 2).backward()


def test_chainer_grad_with_a_delegate(comm):
    """The receiver asks for the delegate's gradient to send that of what it received."""
    if comm.rank == 0:
        x = chainer.Variable(data(0))
        (grad,) = chainer.grad([functions.send(x, comm, 1)], [x])
        np.testing.assert_array_equal(grad.array, 2 * data(0))
    elif comm.rank == 1:
        start = chainer.Variable(np.empty(0, np.float32))
        y = functions.recv(comm, 0, delegate_variable=start)
        chainer.grad([F.sum(y**2)], [start])


def test_over_a_communicator_that_was_split_off(comm):
    """Its highest tag is that of the world, of which Open MPI tells the world alone."""
    if comm.size == 1:
        pytest.skip("needs two ranks")
    with comm.split(0, comm.rank) as part:
        x = chainer.Variable(np.full(3, 2.0, np.float32))
        if part.rank == 0:
            functions.send(x, part, 1, tag=5).backward()
            np.testing.assert_array_equal(x.grad, [4, 4, 4])
        elif part.rank == 1:
            y = functions.recv(part, 0, tag=5)
            F.sum(y * y).backward()


def test_a_rank_that_is_no_peer(comm):
    """Own rank, no rank, bad tags: refused where they are passed."""
    x = data(0)
    for rank in (comm.rank, -1, comm.size):
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            functions.send(x, comm, rank)
        with pytest.raises(ValueError, match=f"rank is {rank}"):
            functions.recv(comm, rank)
    peer = (comm.rank + 1) % comm.size
    for tag in (-1, 1 << 40):
        with pytest.raises(ValueError, match=f"tag is {tag}"):
            functions.send(x, comm, peer, tag=tag)
    with pytest.raises(TypeError):
        functions.recv(comm, None)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("text", TypeError, "got str"),
        ([], ValueError, "nothing to send"),
        ((np.zeros(2), None), TypeError, "got NoneType"),
        (np.array([None]), TypeError, "an array of object"),
    ],
)
def test_bad_input_raises_on_both_sides(comm, bad, error, message):
    """The receiver does not wait for what cannot be sent, and both can go on."""
    if comm.rank == 0:
        with pytest.raises(error, match=message):
            functions.send(bad, comm, 1)
        functions.send(chainer.Variable(data(0)), comm, 1).backward()
    elif comm.rank == 1:
        with pytest.raises(error, match=f"rank 0: .*{message}"):
            functions.recv(comm, 0)
        F.sum(functions.recv(comm, 0)).backward()


@pytest.mark.mpi_skip
def test_the_end_of_a_rank_waits_for_its_messages(tmp_path):
    """A rank may end right after it sent: the message arrives all the same."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import time
        import chainer, numpy as np
        from chainer_dist import create_communicator, functions

        comm = create_communicator("naive")
        with chainer.no_backprop_mode():
            if comm.rank == 0:
                functions.send(np.full(1 << 21, 7.0), comm, 1)
            else:
                time.sleep(0.5)
                assert (functions.recv(comm, 0).array == 7).all()
                print("received")
        """)
    )
    job = mpi_job.run([sys.executable, str(script)], 2, timeout=50)
    assert (job.status, job.output.count("received")) == (0, 1), job.output


def test_pseudo_connect():
    """Values and gradients pass through; the delegate gets zeros; always a tuple."""
    delegate, x = chainer.Variable(np.float32([1, 2])), chainer.Variable(data(0))
    (y,) = functions.pseudo_connect(delegate, x)
    F.sum(y * 3).backward()
    np.testing.assert_array_equal(y.array, x.array)
    np.testing.assert_array_equal(x.grad, np.full(x.shape, 3.0))
    np.testing.assert_array_equal(delegate.grad, [0, 0])
    y, z = functions.pseudo_connect(None, x, data(1))
    np.testing.assert_array_equal(z.array, data(1))
    F.sum(y).backward()
    np.testing.assert_array_equal(x.grad, np.full(x.shape, 4.0))

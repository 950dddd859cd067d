"""Arrays and objects beyond 2 GiB. Takes 10 GiB of memory and minutes, so only when asked for.

python tests/run.py --ranks 2 --timeout 900 -- -m large --mpi-limit 600
"""

from __future__ import annotations

import chainer
import numpy as np
import pytest

SIZE = (1 << 31) + 11  # more than an int counts

pytestmark = pytest.mark.large


@pytest.fixture
def big():
    """Return an array of int8 that is zero but for its ends and its middle."""
    x = np.zeros(SIZE, np.int8)
    x[[0, SIZE // 2, -1]] = 1, 2, 3
    return x


def assert_big(x, factor=1):
    """Check the places where a wrong count or offset would show."""
    assert x.shape == (SIZE,)
    places = [0, 1, SIZE // 2 - 1, SIZE // 2, SIZE - 2, SIZE - 1]
    assert x[places].tolist() == [factor * value for value in (1, 0, 0, 2, 0, 3)]


def test_moving_arrays(comm, big):
    """Every way in which arrays move takes more than 2^31 elements."""
    last, small = comm.size - 1, np.zeros(1, np.int8)
    assert_big(comm.bcast(big if comm.rank == 0 else None))
    gathered = comm.gather(big if comm.rank == last else small)
    if comm.rank == 0:
        assert_big(gathered[last])
    del gathered
    received = comm.scatter([small] * last + [big] if comm.rank == 0 else None)
    if comm.rank == last:
        assert_big(received)
    received = comm.alltoall([small] * last + [big if comm.rank == 0 else small])
    if comm.rank == last:
        assert_big(received[0])
    del received
    if comm.size > 1:
        if comm.rank == 0:
            comm.send(big, last, 1)
        if comm.rank == last:
            assert_big(comm.recv(0, 1))


def test_reducing_arrays(comm, big):
    """A sum of more than 2^31 elements."""
    assert_big(comm.allreduce(big), comm.size)


def test_objects(comm, big):
    """Objects whose pickles are large, within the pickle and beside it."""
    assert_big(comm.bcast_obj({"x": big} if comm.rank == 0 else None)["x"])
    lengths = comm.gather_obj(bytes(SIZE) if comm.rank == comm.size - 1 else b"")
    if comm.rank == 0:
        assert len(lengths[-1]) == SIZE


def test_parameters(comm, big):
    """A model with a parameter that large is made equal."""
    model = chainer.Link()
    with model.init_scope():
        model.p = chainer.Parameter(big if comm.rank == 0 else np.zeros_like(big))
    comm.bcast_data(model)
    assert_big(model.p.array)

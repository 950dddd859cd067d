"""Fixtures shared by all tests, and the plugins that keep ranks in step and count."""

from __future__ import annotations

import hypothesis
import pytest

pytest_plugins = ["mpi_agreement", "result_file"]

# All ranks draw the same examples, however fast each of them is.
hypothesis.settings.register_profile(
    "ranks",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=25,
    report_multiple_bugs=False,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("ranks")


def pytest_generate_tests(metafunc):
    """Run a test that takes ``any_comm`` with every communicator that averages."""
    if "any_comm" in metafunc.fixturenames:
        from chainer_dist.communicators import names

        kinds = [name for name in names() if name != "dummy"]
        metafunc.parametrize("any_comm", kinds, indirect=True)


@pytest.fixture
def comm():
    """Return a new naive communicator over all ranks."""
    from chainer_dist import create_communicator

    communicator = create_communicator("naive")
    yield communicator
    communicator.finalize()


@pytest.fixture
def any_comm(request):
    """Return a new communicator of each kind that averages, over all ranks."""
    from chainer_dist import create_communicator

    communicator = create_communicator(request.param)
    yield communicator
    communicator.finalize()


# Which node a rank is taken to be on.
NODES = {
    "one node": lambda _: 0,
    "a node each": lambda rank: rank,
    "odd and even": lambda rank: rank % 2,
    "one and the rest": lambda rank: min(rank, 1),
}


@pytest.fixture(params=NODES)
def grouped(request):
    """Return a shared_memory communicator whose real ranks are taken to be on several nodes."""
    from chainer_dist import create_communicator

    communicator = create_communicator("shared_memory")
    color = NODES[request.param]
    communicator._node_comm.Free()
    communicator._node_comm = communicator.mpi_comm.Split(
        color(communicator.rank), communicator.rank
    )
    communicator._inter_rank = color(communicator.rank)
    communicator._inter_size = len({color(rank) for rank in range(communicator.size)})
    yield communicator
    communicator.finalize()

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

"""Fixtures shared by all tests, and the plugins that keep ranks in step and count."""

from __future__ import annotations

import gc
import importlib.util
import os
import zlib

import hypothesis
import pytest

from chainer_dist.communicators import names

pytest_plugins = ["fault_table", "result_file", "mpi_agreement"]

# As MPICH and Open MPI tell it. More ranks than the two cores of a small machine take many times as long.
RANKS = int(os.environ.get("PMI_SIZE") or os.environ.get("OMPI_COMM_WORLD_SIZE") or 1)

# All ranks draw the same examples, however fast each of them is.
hypothesis.settings.register_profile(
    "ranks",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=15 if RANKS < 3 else 6,
    report_multiple_bugs=False,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("ranks")


def pytest_addoption(parser):
    """Add a way to ask for all cases of all tests, or for fewer."""
    parser.addoption(
        "--cases-of",
        type=int,
        default=RANKS,
        metavar="RANKS",
        help="run the cases that this number of ranks has, of which 3 and 4 share them (1 or 2: all)",
    )


def pytest_collection_modifyitems(config, items):
    """Leave out, and count as deselected, what needs torch or MLflow where it is not installed.

    So are tests for one process on several ranks, and on 3 and on 4 ranks the cases of the other number.
    """
    cases_of = config.getoption("--cases-of")
    missing = [name for name in ("torch", "mlflow") if not importlib.util.find_spec(name)]
    if RANKS > 1:
        missing.append("mpi_skip")
    left_out = [
        item
        for item in items
        if any(map(item.get_closest_marker, missing)) or not is_for(cases_of, item)
    ]
    config.hook.pytest_deselected(items=left_out)
    left_out = set(left_out)
    items[:] = [item for item in items if item not in left_out]


def is_for(ranks, item):
    """Return whether a number of ranks has a case of a test; one process and 2 ranks have all, 3 and 4 share them.

    Every case is for one of these two, and both have every value of each of several parameters. Both have all cases
    where they differ most: on several nodes, and of each kind of communicator.
    """
    if ranks not in {3, 4}:
        return True
    indices = dict(item.callspec.indices) if hasattr(item, "callspec") else {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        for name in names[1:]:  # they change with the first one
            indices.pop(name.strip(), None)
    if indices.keys() <= {"any_comm"} or any(layout in item.name for layout in NODES):
        return True
    # Which of them has the first value is another one for each test.
    return (sum(indices.values()) + zlib.crc32(item.originalname.encode())) % 2 == ranks % 2


def pytest_collection_finish():
    """Let the garbage collector never look at what stays until the end: thousands of tests, and all modules."""
    gc.collect()
    gc.freeze()


# All but those that do the same on one node, of which grouped_kinds takes care, and one that does nothing.
_NOT_BY_THEMSELVES = {"single_node", "hierarchical", "two_dimensional", "dummy"}
KINDS = [name for name in names() if name not in _NOT_BY_THEMSELVES]
KINDS_THAT_KNOW_NODES = ["shared_memory", "hierarchical", "two_dimensional"]


@pytest.fixture
def float64():
    """Compute in float64, where only a wrong result differs by more than rounding."""
    import chainer
    import numpy as np

    with chainer.using_config("dtype", np.float64):
        yield


@pytest.fixture
def one_thread():
    """Compute in one thread: several that wait for one another take long where cores are busy."""
    import threadpoolctl

    with threadpoolctl.threadpool_limits(1):
        yield


@pytest.fixture
def comm():
    """Return a new naive communicator over all ranks."""
    from chainer_dist import create_communicator

    communicator = create_communicator("naive")
    yield communicator
    communicator.finalize()


@pytest.fixture(params=KINDS)
def any_comm(request):
    """Return a new communicator of each kind that packs in its own way, over all ranks."""
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
# Those that differ: the first and the rest of two ranks are the odd and the even one.
LAYOUTS = [
    *{tuple(map(node, range(RANKS))): name for name, node in reversed(NODES.items())}.values()
]


def on_nodes(kind, layout):
    """Return a communicator whose real ranks are taken to be on several nodes."""
    from chainer_dist import create_communicator

    communicator = create_communicator(kind)
    color = NODES[layout]
    communicator._node_comm.Free()
    communicator._node_comm = communicator.mpi_comm.Split(
        color(communicator.rank), communicator.rank
    )
    communicator._inter_rank = color(communicator.rank)
    communicator._inter_size = len({color(rank) for rank in range(communicator.size)})
    return communicator


@pytest.fixture
def nodes():
    """Return a shared_memory communicator with its ranks on two nodes."""
    communicator = on_nodes("shared_memory", "odd and even")
    yield communicator
    communicator.finalize()


@pytest.fixture
def small_blocks(monkeypatch):
    """Let small models take many blocks, and parameters end anywhere in one."""
    from chainer_dist.communicators.shared_memory import slots

    monkeypatch.setattr(slots, "BLOCK_BYTES", 1024)


@pytest.fixture(params=LAYOUTS)
def grouped(request):
    """Return a shared_memory communicator whose real ranks are taken to be on several nodes."""
    communicator = on_nodes("shared_memory", request.param)
    yield communicator
    communicator.finalize()


@pytest.fixture(
    params=[(kind, layout) for kind in KINDS_THAT_KNOW_NODES for layout in LAYOUTS], ids="-".join
)
def grouped_kinds(request):
    """Return a communicator of each kind that knows nodes, with its ranks on several of them."""
    communicator = on_nodes(*request.param)
    yield communicator
    communicator.finalize()

"""Steps are recorded as they are, and replayed by two models of a network that agree where they should."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.scaling import predict, schedule, simulate
from chainer_dist.scaling.schedule import Schedule
from chainer_dist.scaling.simulate import DESIGNS, Cluster, Network

STEP = Schedule(
    workload="made up",
    batch=1,
    ranks=1,
    forward=0.1,
    backward=0.2,
    final=[(0.05 * i, 10_000_000) for i in range(1, 5)],
    update=0.3,
    node_update=0.15,
)
NETWORK = Network(bandwidth=1e9, latency=1e-4)
LATENCIES = 2 * NETWORK.latency

needs_simgrid = pytest.mark.simgrid


def test_recording(comm):
    """Every gradient of the model is there once, within backward, in the order of time."""
    found = schedule.record("transformer", 2)
    assert found.ranks == comm.size
    assert found.nbytes == 530_314 * 4
    moments = [moment for moment, _ in found.final]
    assert moments == sorted(moments)
    assert 0 < moments[0] <= moments[-1] <= found.backward
    assert min(found.forward, found.update, found.node_update) > 0


@pytest.mark.parametrize(
    ("design", "seconds"),
    [
        (
            "naive",
            0.3 + 4 * (0.01 + LATENCIES) + 0.3,
        ),  # two nodes send all of a tensor once, in parts
        ("flat", 0.3 + 0.04 + LATENCIES + 0.3),
        ("multi-leader", 0.3 + 0.04 + LATENCIES + 0.15),
        ("overlap", 0.3 + 0.01 + LATENCIES + 0.15),  # the others are through before
        ("float16", 0.3 + 0.005 + LATENCIES + 0.15),
    ],
)
def test_two_nodes_by_hand(design, seconds):
    """Of so simple a step the time can be told without a model."""
    cluster = Cluster(2, 1, NETWORK)
    assert simulate.closed_form(STEP, cluster, DESIGNS[design]) == pytest.approx(seconds)


def test_one_node_exchanges_nothing():
    """Without a network there is computation and the update."""
    for design in DESIGNS.values():
        want = STEP.compute + (STEP.node_update if design.by_node else STEP.update)
        assert simulate.closed_form(STEP, Cluster(1, 4, NETWORK), design) == pytest.approx(want)


@given(
    final=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**8)), min_size=1, max_size=60).map(
        sorted
    ),
    design=st.sampled_from(sorted(DESIGNS)),
)
def test_messages_are_all_of_the_gradients(final, design):
    """None is lost, doubled or sent before it is there."""
    how = DESIGNS[design]
    step = STEP._replace(final=final, backward=1.0)
    messages = simulate._messages(step, how)
    total = sum(nbytes for _, nbytes in final)
    assert sum(each.nbytes for each in messages) == pytest.approx(total * how.width)
    assert [each.ready for each in messages] == sorted(each.ready for each in messages)
    sent = 0.0
    for each in messages:
        sent += each.nbytes / how.width
        there = sum(size for moment, size in final if step.forward + moment <= each.ready)
        assert sent <= there * (1 + 1e-9)


@needs_simgrid
@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("nodes", "ranks", "design"), [*itertools.product((2, 8, 16), (1, 2), DESIGNS)]
)
def test_the_models_agree(nodes, ranks, design):
    """Where messages do not meet on the network, simulation and closed form come to the same."""
    cluster = Cluster(nodes, ranks, NETWORK)
    simulated = simulate.simulate(STEP, cluster, DESIGNS[design])
    closed = simulate.closed_form(STEP, cluster, DESIGNS[design])
    assert simulated == pytest.approx(closed, rel=0.05)


@needs_simgrid
@pytest.mark.mpi_skip
def test_a_straggler_and_a_shared_link():
    """All wait for the slowest, and what all share is slower than links of their own."""
    how = DESIGNS["multi-leader"]
    plain, slow, shared = (
        simulate.simulate(STEP, Cluster(8, 1, NETWORK, straggler, uplink), how)
        for straggler, uplink in ((1.0, 0), (1.5, 0), (1.0, 2))
    )
    assert slow == pytest.approx(plain + 0.5 * STEP.compute, rel=0.01)
    assert shared > plain + 0.04


@pytest.mark.mpi_skip
def test_without_simgrid(monkeypatch):
    """It is said what is missing, and how to get it."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="apt install libsimgrid-dev"):
        simulate.simulate(STEP, Cluster(2, 1, NETWORK), DESIGNS["flat"])


@pytest.mark.mpi_skip
def test_large_clusters_in_closed_form():
    """What would take minutes to simulate is marked, and the table says from where efficiency is low."""
    cluster = Cluster(1024, 4, Network(1e9, 1e-3))
    found = predict.predict(
        STEP, STEP._replace(final=STEP.final * 100), cluster, "a network", "naive"
    )
    assert found.seconds is None
    text = predict.table([found])
    assert "4096" in text
    assert "~   below 85.2% from 4096 ranks" in text

"""Steps are recorded as they are, and replayed by two models of a network that agree where they should."""

from __future__ import annotations

import csv
import itertools
import json
import time

import chainer
import numpy as np
import pytest
from conftest import on_nodes
from hypothesis import given
from hypothesis import strategies as st

import chainer_dist
from chainer_dist.collectives import operation
from chainer_dist.communicators.shared_memory import slots
from chainer_dist.optimizers import consensus
from chainer_dist.scaling import answers, predict, predicted, schedule, simulate, validation
from chainer_dist.scaling.closed_form import closed_form, costs
from chainer_dist.scaling.cluster import Cluster, Network, scores
from chainer_dist.scaling.design import DESIGNS, messages_of
from chainer_dist.scaling.predict import REPORT, Scenario
from chainer_dist.scaling.schedule import Schedule

STEP = Schedule(
    workload="made up",
    batch=1,
    ranks=1,
    forward=0.1,
    backward=0.2,
    final=[(0.05 * i, 10_000_000) for i in range(1, 5)],
    update=0.3,
    node_update=0.15,
    alone=0.6,
)
NETWORK = Network(bandwidth=1e9, latency=1e-4)
LATENCIES = 2 * NETWORK.latency
COMPARISON = NETWORK.latency

needs_simgrid = pytest.mark.simgrid


def test_its_help_can_be_printed(comm, capsys):
    """Names of clusters have per cent signs, which argparse takes for something to fill in."""
    del comm
    with pytest.raises(SystemExit) as left:
        predict.main(["--help"])
    assert left.value.code == 0
    assert REPORT[6].name in " ".join(capsys.readouterr().out.split())


def test_recording(comm):
    """Every gradient of the model is there once, within backward, in the order of time."""
    found = schedule.record("transformer", 2)
    assert found.ranks == comm.size
    assert found.nbytes == 530_314 * 4
    moments = [moment for moment, _ in found.final]
    assert moments == sorted(moments)
    assert 0 < moments[0] <= moments[-1] <= found.backward
    assert min(found.forward, found.update, found.node_update) > 0
    assert found.alone > 0
    if comm.size == 1:
        assert found.alone == found.compute + found.update


# Blocks of 1 MiB, of which eight are under way at a time; 24 messages of a step that overlaps.
@pytest.mark.parametrize(
    ("design", "seconds"),
    [
        # Two nodes send all of a tensor once, in parts.
        ("naive", 0.3 + 4 * (0.01 + LATENCIES) + 0.3),
        ("flat", 0.3 + 0.04 + LATENCIES + 0.3),
        # In one message each, of as many blocks as are under way.
        ("multi-leader", 0.3 + 0.04 + 5 * NETWORK.latency + 2 * COMPARISON + 0.15),
        # All but the last tensor are through before backward is over.
        ("overlap", 0.3 + 0.01 + 7 * NETWORK.latency + 3 * COMPARISON + 0.15),
        ("float16", 0.3 + 0.005 + 7 * NETWORK.latency + 3 * COMPARISON + 0.15),
    ],
)
def test_two_nodes_by_hand(design, seconds):
    """Of so simple a step the time can be told without a model."""
    cluster = Cluster(2, 1, NETWORK)
    found = closed_form(STEP, cluster, DESIGNS[design])
    assert found == pytest.approx(seconds, rel=1e-4)


@pytest.mark.parametrize(("nodes", "latencies"), [(3, 2), (4, 2), (8, 2), (16, 8)])
def test_more_nodes_by_hand(nodes, latencies):
    """Up to eight send each other their parts, in two steps; more halve and double."""
    found = closed_form(STEP, Cluster(nodes, 1, NETWORK), DESIGNS["multi-leader"])
    comparisons = 2 * {3: 3, 4: 2, 8: 3, 16: 4}[nodes] * NETWORK.latency
    sent = 2 * 0.04 * (nodes - 1) / nodes
    want = 0.3 + sent + 5 * latencies * NETWORK.latency + comparisons + 0.15
    assert found == pytest.approx(want, rel=1e-4)


def test_one_node_exchanges_nothing():
    """Without a network there is computation and the update."""
    for design in DESIGNS.values():
        want = STEP.compute + (STEP.node_update if design.by_node else STEP.update)
        assert closed_form(STEP, Cluster(1, 4, NETWORK), design) == pytest.approx(want)


@given(
    final=st.lists(st.tuples(st.floats(0, 1), st.integers(1, 10**8)), min_size=1, max_size=60).map(
        sorted
    ),
    design=st.sampled_from(sorted(DESIGNS)),
    ranks=st.sampled_from([1, 4, 64]),
)
def test_messages_are_all_of_the_gradients(final, design, ranks):
    """None is lost, doubled or sent before it is there."""
    how = DESIGNS[design]
    step = STEP._replace(final=final, backward=1.0)
    messages = messages_of(step, Cluster(2, ranks, NETWORK), how)
    total = sum(nbytes for _, nbytes in final)
    rounding = len(messages)
    assert sum(each.nbytes for each in messages) == pytest.approx(total * how.width, abs=rounding)
    assert [each.ready for each in messages] == sorted(each.ready for each in messages)
    sent = 0.0
    for each in messages:
        sent += each.nbytes / how.width
        there = sum(size for moment, size in final if step.forward + moment <= each.ready)
        assert sent <= there + rounding / how.width


@needs_simgrid
@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    ("nodes", "ranks", "design"), [*itertools.product((2, 8, 16), (1, 2), DESIGNS)]
)
def test_the_models_agree(nodes, ranks, design):
    """Where messages do not meet on the network, simulation and closed form come to the same."""
    cluster = Cluster(nodes, ranks, NETWORK)
    simulated = simulate.simulate(STEP, cluster, DESIGNS[design])
    closed = closed_form(STEP, cluster, DESIGNS[design])
    assert simulated == pytest.approx(closed, rel=0.05)


@needs_simgrid
@pytest.mark.mpi_skip
@pytest.mark.parametrize(
    "how",
    [
        {"straggler": 1.5},
        {"jitter": 0.1},
        {"oversubscription": 4.0},
        {"straggler": 1.3, "jitter": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("design", ["naive", "multi-leader", "overlap"])
def test_the_models_agree_on_what_is_not_ideal(how, design):
    """On ranks that are slower, ranks that vary, and on links that are shared."""
    cluster = Cluster(8, 2, NETWORK, **how)
    simulated = simulate.simulate(STEP, cluster, DESIGNS[design])
    assert simulated == pytest.approx(closed_form(STEP, cluster, DESIGNS[design]), rel=0.05)


@pytest.mark.parametrize("design", DESIGNS)
def test_what_is_not_ideal_costs_what_it_must(design):
    """All wait for the slowest rank, and a link that is four times slower takes four times as long."""
    how = DESIGNS[design]

    def seconds(nodes=8, ranks=2, **more):
        return closed_form(STEP, Cluster(nodes, ranks, NETWORK, **more), how)

    plain = seconds()
    assert seconds(straggler=1.5) >= plain + 0.49 * STEP.forward
    if not how.overlaps:
        assert seconds(straggler=1.5) == pytest.approx(plain + 0.5 * STEP.compute)
        bytes_sent = 2 * STEP.nbytes * 7 / 8
        slower = seconds(oversubscription=4.0) - plain
        assert slower == pytest.approx(3 * bytes_sent / NETWORK.bandwidth, rel=1e-3)
        # What the largest of 16 normally distributed numbers is on average, from tables.
        assert seconds(jitter=0.1) == pytest.approx(plain + 0.1 * 1.766 * STEP.compute, rel=5e-3)
    assert seconds(jitter=0.1) > seconds(jitter=0.05) > plain


def test_ranks_that_vary():
    """They are as the order statistics of a normal distribution: mean, deviation and largest."""
    for nodes, ranks in ((4, 1), (16, 4), (1024, 4)):
        factors = simulate._slowness(Cluster(nodes, ranks, NETWORK, jitter=0.05))
        assert len(factors) == nodes * ranks
    factors = np.array(factors[4:])  # the first node is never faster than it was recorded
    assert factors.mean() == pytest.approx(1, abs=1e-3)
    assert factors.std() == pytest.approx(0.05, rel=0.01)
    drawn = np.random.RandomState(0).standard_normal((200, 4096)).max(axis=1).mean()
    largest = max(scores(Cluster(1024, 4, NETWORK, jitter=1.0)))
    assert largest == pytest.approx(drawn, rel=0.02)


@pytest.mark.parametrize("design", DESIGNS)
def test_costs(design):
    """Each is what a step would be shorter by; a network without costs makes it one of a single node."""
    how = DESIGNS[design]
    cluster = Cluster(16, 4, NETWORK, straggler=1.2)
    found = costs(STEP, cluster, how)
    assert found["waiting"] > 0
    assert found["latency"] > 0
    assert found["bandwidth"] > 0
    assert (found["comparisons"] > 0) == (how.comparisons > 0)
    alone = closed_form(STEP, Cluster(1, 4, NETWORK), how)
    step = closed_form(STEP, cluster, how)
    ideal = closed_form(STEP, Cluster(16, 4, Network(float("inf"), 0.0)), how)
    assert ideal == pytest.approx(alone)
    if not how.overlaps:  # then they add up
        parts = sum(found[name] for name in ("latency", "bandwidth", "waiting"))
        assert step - parts == pytest.approx(alone)


def test_nodes_of_many_ranks_wait_for_each_block():
    """There is memory for fewer blocks under way; so latency counts more often, as the code has it."""
    slow = Network(1e9, 1e-2)
    few, many = (
        closed_form(STEP, Cluster(4, ranks, slow), DESIGNS["multi-leader"]) for ranks in (4, 64)
    )
    assert slots.sums_in_flight(64) == 1 < slots.sums_in_flight(4)
    assert many > few + 20 * slow.latency


# The names of operations in which ranks compare numbers.
KINDS = ("agreement", consensus.PARAMETERS.name, consensus.GRADIENTS.name)


def test_comparisons_are_those_of_the_code():
    """A settled step has as many small allreduces as the model counts, with and without overlap."""
    rng = np.random.RandomState(chainer_dist.create_communicator("naive").rank)
    x, t = rng.rand(4, 3).astype(np.float32), rng.randint(0, 2, 4).astype(np.int32)
    for design, overlap in (("overlap", True), ("multi-leader", False)):
        comm = on_nodes("shared_memory", "a node each")
        model = chainer.links.Classifier(chainer.links.Linear(3, 2))
        optimizer = chainer_dist.create_multi_node_optimizer(
            chainer.optimizers.Adam(), comm, overlap=overlap
        ).setup(model)
        counter = Counter()
        for _ in range(4):
            optimizer.update(model, x, t)
        operation.observers.append(counter)
        try:
            optimizer.update(model, x, t)
        finally:
            operation.observers.remove(counter)
        is_overlapped = design == "overlap" and comm.size > 1
        assert optimizer.overlapped == is_overlapped
        want = DESIGNS[design if is_overlapped else "multi-leader"].comparisons
        assert sum(counter.names.count(kind) for kind in KINDS) == want
        comm.finalize()


class Counter(operation.Observer):
    """Takes down the names of operations."""

    def __init__(self):
        """Begin with none."""
        self.names = []

    def left(self, found, end):  # noqa: ARG002 - the interface
        """See :meth:`operation.Observer.left`."""
        self.names.append(found.kind.name)


@pytest.mark.mpi_skip
def test_without_simgrid(monkeypatch):
    """It is said what is missing, and how to get it."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="apt install libsimgrid-dev"):
        simulate.simulate(STEP, Cluster(2, 1, NETWORK), DESIGNS["flat"])


WORKLOAD = """
import numpy as np
import chainer.links as L

def make(batch, rank):
    rng = np.random.RandomState(rank)
    return L.Classifier(L.Linear(4, 3)), (rng.rand(batch, 4).astype("f"), np.zeros(batch, "i"))
"""

SLOW = Scenario("a network", "1 Gbit/s Ethernet", 4)


def on(nodes, design, step=STEP, **more):
    """Return a prediction in closed form."""
    return predict.predict(step, SLOW._replace(**more), nodes, design, actions=0)


def test_large_clusters_in_closed_form():
    """What would take minutes to simulate is marked, and the table says from where efficiency is low."""
    found = [on(nodes, "naive") for nodes in (1, 2, 1024)]
    assert [each.seconds for each in found] == [None] * 3
    text = predict.table(found)
    assert "4096" in text
    assert "100.0~" in text
    assert "below 85.2% from 8 ranks" in text
    assert predict.table(found[:1]).count("not below 85.2%") == 1


def test_from_where_on_a_design_is_no_longer_efficient():
    """It is the size from which on it stays below, not one at which it is for once."""
    row = [
        on(1, "naive")._replace(ranks=2**power, efficiency=efficiency)
        for power, efficiency in enumerate([1.1, 0.8, 0.86, 0.85, 0.7])
    ]
    assert answers.first_below(row) == 8
    assert answers.first_below(row[:3]) is None
    assert answers.first_below(row[3:]) == 8


def test_answers_are_those_of_the_numbers():
    """Every question is answered for every workload and design."""
    predictions = [
        on(nodes, design, network=network, name=network)
        for network in ("1 Gbit/s Ethernet", "10 Gbit/s Ethernet")
        for nodes in (1, 32, 1024)
        for design in DESIGNS
    ]
    found = answers.answers({"made up": [STEP]}, predictions)
    sizes, workers, speeds, breaks, grows = found.values()
    assert [line.split(":")[0] for line in sizes] == [f"made up, {name}" for name in DESIGNS]
    assert sizes[0].startswith("made up, naive: 128 ranks (1 Gbit/s Ethernet")
    assert "made up, float16: nowhere up to 4,096 ranks" in sizes
    times = 128 * predictions[len(DESIGNS)].efficiency
    assert f"naive {times:.0f} (" in workers[0]
    assert len(workers) == len(speeds) == 2
    assert all(name in line for name in DESIGNS for line in workers + speeds)
    assert len(breaks) == len(DESIGNS)
    assert breaks[0].startswith("made up, naive: bandwidth ")
    assert any("4 tensors" in line for line in grows)


def test_a_faster_processor_makes_the_network_count():
    """On one ten times as fast computation takes a tenth; what then is efficient is less."""
    step = STEP.faster(10)
    assert step.compute == pytest.approx(STEP.compute / 10)
    assert step.nbytes == STEP.nbytes
    assert step.final[-1][0] <= step.backward * (1 + 1e-9)
    for design in DESIGNS:
        assert on(32, design, step).efficiency < on(32, design).efficiency


@pytest.mark.mpi_skip
def test_the_command(tmp_path, monkeypatch, capsys):
    """It leaves JSON and CSV where the page finds them; without SimGrid it says that nothing was simulated."""
    monkeypatch.setattr(predict.shutil, "which", lambda _: None)
    (tmp_path / "own.py").write_text(WORKLOAD)
    arguments = ["--report", "--workloads", f"{tmp_path}/own.py:make", "--out", str(tmp_path)]
    assert predict.main(arguments) == 0
    shown = capsys.readouterr().out
    assert "there is no smpirun" in shown
    assert "What breaks first on 4,096 ranks?" in shown
    content = json.loads((tmp_path / predict.FILE).read_text())
    assert {each["ranks"] for each in content["predictions"]} >= {4, 128, 4096}
    assert {each["scenario"] for each in content["predictions"]} == {
        each.name for each in predict.REPORT
    }
    with (tmp_path / "predictions.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(content["predictions"])
    assert float(lines[0]["efficiency"]) == content["predictions"][0]["efficiency"]

    pytest.importorskip("matplotlib")
    page = predicted.section(tmp_path)
    assert "Nothing was simulated" in page
    assert page.count("<svg") == 4
    for words in (
        "What breaks first",
        "chainer-dist predict --report",
        "within 15%",
        "ranks vary by",
    ):
        assert words in page


@pytest.mark.mpi_skip
def test_a_folder_that_cannot_be_made(tmp_path, monkeypatch, capsys):
    """It is told before anything is recorded."""
    monkeypatch.setattr(predict, "record", None)
    (tmp_path / "file").touch()
    assert predict.main(["--out", str(tmp_path / "file")]) == 1
    assert "File exists" in capsys.readouterr().err


@pytest.mark.mpi_skip
def test_a_page_without_predictions(tmp_path):
    """Nothing is made up; and a file that is none of ours is told."""
    assert predicted.section(tmp_path) == ""
    (tmp_path / predict.FILE).write_text('{"schedules": []}')
    with pytest.raises(ValueError, match=r"predictions\.json has no predictions"):
        predicted.section(tmp_path)


def test_errors_of_predictions():
    """They are against what was measured, and counted in both directions."""
    one = validation.Comparison(2, "1gbit", "cnn", "chainer_dist", 0.9, 0.9, 1.0)
    assert one.error == pytest.approx(-0.1)
    text = validation.summary([one, one._replace(predicted=1.2), one._replace(predicted=1.15)])
    assert text == "2 of 3 predictions within 15%, the median error 15%, the largest 20%"
    machine, comparisons = validation.read()
    assert machine["processor"]
    assert comparisons


def test_one_rank_works_while_the_others_sleep(comm):
    """Rank 0 alone does it, and all know how long that took."""
    done = []
    seconds = schedule._sleeping(comm.mpi_comm, lambda: done.append(time.sleep(0.02)))
    assert len(done) == (comm.rank == 0)
    assert set(comm.allgather_obj(seconds)) == {seconds}
    assert seconds >= 0.02

"""Replays a recorded step on a cluster that is not here: with SimGrid's SMPI, and in closed form.

In SMPI (Degomme et al., IEEE TPDS 2017) a trace is replayed on a model of the network in which
messages that share a link share its bandwidth. Designs that exchange after backward are a process for each
rank. Where gradients are exchanged by one rank for all of a node (the ranks of a node each exchange a
slice, which on the network is the same as one rank that exchanges everything), a node is two processes: one
computes and tells the other of each gradient that is final; that one exchanges it, and tells of the means.
So computation and exchange go on at the same time, and meet where they depend on each other.

What is taken as free: the exchange within a node of designs in which all ranks exchange everything (that of
the others was recorded), and what processors do for the network, as far as a ping-pong does not show it.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chainer_dist.communicators.shared_memory.between_nodes import MOST_NODES
from chainer_dist.communicators.shared_memory.slots import BLOCK_BYTES, sums_in_flight

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

    from chainer_dist.scaling.schedule import Schedule

__all__ = [
    "DESIGNS",
    "MISSING",
    "NETWORKS",
    "Cluster",
    "Design",
    "Network",
    "closed_form",
    "costs",
    "n_actions",
    "simulate",
]

MISSING = "there is no smpirun: install SimGrid (Debian and Ubuntu: apt install libsimgrid-dev)"

_SPEED = 1e9  # of a simulated core, in operations a second: a nanosecond each
_TOKEN = 1  # bytes of a message that only tells of something
_MESSAGES = 24  # of an overlapped step; more only where the code waits for more one after the other
_SHORT = 2048  # bytes that MPICH sums up by recursive doubling: in half as many rounds
_PAIR = 2  # nodes that send each other everything
_COMPARISON = 128  # bytes that ranks sum up to find out whether they agree


class Network(NamedTuple):
    """What joins nodes: bytes a second of a node's link, and seconds from one node to another.

    As ping-pongs between processes give them, not as they are printed on the box.
    """

    bandwidth: float
    latency: float


NETWORKS = {
    "1 Gbit/s Ethernet": Network(0.117e9, 50e-6),
    "10 Gbit/s Ethernet": Network(1.17e9, 30e-6),
    "100 Gbit/s Ethernet": Network(11.5e9, 10e-6),
    "InfiniBand HDR": Network(24e9, 1.5e-6),
}


class Cluster(NamedTuple):
    """Where a step is replayed.

    Attributes:
        nodes: How many.
        ranks: Of each node.
        network: That joins them.
        straggler: How many times as long as on the others a step's computation takes on the first node.
        jitter: The standard deviation of the time that ranks compute, each for itself and in each step
            anew, as a part of that time. Normally distributed.
        oversubscription: How many times as fast the nodes' links are, together, as the one that they share;
            1 if none is shared.
    """

    nodes: int
    ranks: int
    network: Network
    straggler: float = 1.0
    jitter: float = 0.0
    oversubscription: float = 1.0


class Design(NamedTuple):
    """How gradients are exchanged, and parameters updated.

    Attributes:
        by_tensor: Each gradient in messages of its own; otherwise packed.
        overlaps: While backward computes others.
        width: Bytes sent for one byte of a gradient.
        by_node: Ranks of a node exchange each a slice, and update each a slice; otherwise all ranks of all
            nodes exchange, and update, everything.
        comparisons: In how many small allreduces of a step all ranks find out whether they agree.
    """

    by_tensor: bool
    overlaps: bool
    width: float
    by_node: bool
    comparisons: int


DESIGNS = {
    "naive": Design(by_tensor=True, overlaps=False, width=1.0, by_node=False, comparisons=0),
    "flat": Design(by_tensor=False, overlaps=False, width=1.0, by_node=False, comparisons=0),
    "multi-leader": Design(by_tensor=False, overlaps=False, width=1.0, by_node=True, comparisons=2),
    "overlap": Design(by_tensor=False, overlaps=True, width=1.0, by_node=True, comparisons=3),
    "float16": Design(by_tensor=False, overlaps=True, width=0.5, by_node=True, comparisons=3),
}


class _Message(NamedTuple):
    """Something to exchange: when it is there, in seconds from the beginning of the step, and its bytes."""

    ready: float
    nbytes: int


def _messages(schedule: Schedule, cluster: Cluster, design: Design) -> list[_Message]:
    """Return what is exchanged in a step, in its order, one after the other."""
    final = [_Message(schedule.forward + moment, size) for moment, size in schedule.final]
    if not design.overlaps:
        final = [each._replace(ready=schedule.compute) for each in final]
    if not design.by_tensor:
        final = list(_joined(final, _together(schedule.nbytes, cluster, design)))
    return [each._replace(nbytes=round(each.nbytes * design.width)) for each in final]


def _together(nbytes: int, cluster: Cluster, design: Design) -> int:
    """Return bytes of gradients that are exchanged together.

    Ranks of a node exchange blocks, of which several are on their way at a time; here as many are one
    message. Of a step that overlaps there are some more, so as not to lose when each gradient is there.
    """
    if not design.by_node:
        return max(nbytes, 1)
    together = BLOCK_BYTES * sums_in_flight(cluster.ranks)
    return max(min(together, nbytes // _MESSAGES), BLOCK_BYTES) if design.overlaps else together


def _joined(final: list[_Message], together: int) -> Iterator[_Message]:
    """Join and cut messages to some of so many bytes each."""
    nbytes = 0
    for each in final:
        nbytes += each.nbytes
        while nbytes >= together:
            yield _Message(each.ready, together)
            nbytes -= together
    if nbytes:
        yield _Message(final[-1].ready, nbytes)


def _after(schedule: Schedule, design: Design) -> float:
    """Return the seconds of what a rank does besides computation and exchange between nodes."""
    return schedule.node_update if design.by_node else schedule.update


def closed_form(schedule: Schedule, cluster: Cluster, design: Design) -> float:
    """Return the seconds of a step by the model of Hockney (1994): latency and bandwidth alone. Local.

    An allreduce of n bytes among p nodes, a power of two, takes ``2 log2(p)`` latencies and
    ``2 n (p - 1) / p`` bytes of a link, a short one half as many latencies and ``log2(p) n`` bytes of each
    rank that exchanges; among another number of nodes ``2`` latencies and ``2 n`` bytes more. A direct sum
    takes as many bytes and 2 latencies, between two nodes 1. Messages do not meet on the network.
    """
    slowest = max(cluster.straggler, 1 + cluster.jitter * max(_scores(cluster)))
    comparison = _allreduce_seconds(cluster, design, _COMPARISON)
    before = comparison * max(design.comparisons - 1, 0)  # between forward and backward
    end = before
    for ready, nbytes in _messages(schedule, cluster, design):
        end = max(end, before + ready * slowest) + _exchange(cluster, design, nbytes)
    end = max(end, before + schedule.compute * slowest)
    return end + comparison * min(design.comparisons, 1) + _after(schedule, design)


def _is_direct(nodes: int, design: Design) -> bool:
    """Tell whether nodes send each other their parts of a message, as in ``DirectSum``."""
    return design.by_node and 1 < nodes <= MOST_NODES


def _direct_steps(nodes: int, nbytes: float) -> list[float]:
    """Return what each node sends to each other one in each step of a direct sum, in bytes."""
    return [nbytes] if nodes == _PAIR else [nbytes / nodes] * 2


def _exchange(cluster: Cluster, design: Design, nbytes: float) -> float:
    """Return the seconds that gradients take to be summed up, in closed form."""
    nodes, network = cluster.nodes, cluster.network
    if not _is_direct(nodes, design):
        return _allreduce_seconds(cluster, design, nbytes)
    bandwidth = network.bandwidth / cluster.oversubscription
    sent = _direct_steps(nodes, nbytes)
    return sum(network.latency + (nodes - 1) * each / bandwidth for each in sent)


def _allreduce_seconds(cluster: Cluster, design: Design, nbytes: float) -> float:
    """Return the seconds of an allreduce in closed form; what passes within a node takes none."""
    if cluster.nodes == 1:
        return 0.0
    latency, bandwidth = cluster.network.latency, cluster.network.bandwidth
    bandwidth /= cluster.oversubscription
    rounds = cluster.nodes.bit_length() - 1
    senders = 1 if design.by_node else cluster.ranks  # of all there is, of each node
    if nbytes <= _SHORT:
        seconds = rounds * (latency + senders * nbytes / bandwidth)
    else:
        seconds = 2 * rounds * latency + 2 * nbytes * (1 - 0.5**rounds) / bandwidth
    if cluster.nodes != 1 << rounds:  # some send everything, and get it back
        seconds += 2 * (latency + senders * nbytes / bandwidth)
    return seconds


def _scores(cluster: Cluster) -> list[float]:
    """Return what normally distributed numbers, one a rank, are expected to be, sorted (Blom, 1958)."""
    if not cluster.jitter:
        return [0.0]
    size, normal = cluster.nodes * cluster.ranks, statistics.NormalDist()
    return [normal.inv_cdf((number + 0.625) / (size + 0.25)) for number in range(size)]


def costs(schedule: Schedule, cluster: Cluster, design: Design) -> dict[str, float]:
    """Return by how many seconds a step would be shorter, in closed form, if something cost nothing. Local.

    Returns:
        ``latency`` and ``bandwidth`` of the network, ``waiting`` for ranks that compute longer, and
        ``comparisons``, which are latency too. What is hidden behind computation costs nothing.
    """
    network = cluster.network
    step = closed_form(schedule, cluster, design)
    without = {
        "latency": (cluster._replace(network=network._replace(latency=0.0)), design),
        "bandwidth": (cluster._replace(network=network._replace(bandwidth=math.inf)), design),
        "waiting": (cluster._replace(straggler=1.0, jitter=0.0), design),
        "comparisons": (cluster, design._replace(comparisons=0)),
    }
    return {name: step - closed_form(schedule, *each) for name, each in without.items()}


def n_actions(schedule: Schedule, cluster: Cluster, design: Design) -> int:
    """Return about how many lines the trace of a step has. Local."""
    group = cluster.nodes if design.by_node else cluster.nodes * cluster.ranks
    steps = 2 * math.ceil(math.log2(max(group, 2)))
    return group * len(_messages(schedule, cluster, design)) * (3 * steps + 3)


def simulate(
    schedule: Schedule, cluster: Cluster, design: Design, *, timeout: float = 600
) -> float:
    """Return the seconds of a step, replayed in SMPI. Local; starts a process.

    Args:
        schedule: What a step is.
        cluster: Where.
        design: How.
        timeout: Seconds that simulation may take.

    Raises:
        FileNotFoundError: If there is no ``smpirun``.
        RuntimeError: If simulation fails, with what it said.
        subprocess.TimeoutExpired: If it takes too long.
    """
    program = shutil.which("smpirun")
    if program is None:
        raise FileNotFoundError(MISSING)
    with tempfile.TemporaryDirectory(prefix="chainer-dist-") as name:
        folder = Path(name)
        (folder / "platform.xml").write_text(_platform(cluster), encoding="utf-8")
        hosts = []
        with (folder / "trace").open("w", encoding="utf-8") as trace:
            hosts = list(_write(trace, schedule, cluster, design))
        (folder / "traces").write_text(f"{folder / 'trace'}\n", encoding="utf-8")
        (folder / "hosts").write_text("".join(f"node{host}\n" for host in hosts), encoding="utf-8")
        done = subprocess.run(  # noqa: S603
            [
                program,
                "-np",
                str(len(hosts)),
                *("-platform", folder / "platform.xml", "-hostfile", folder / "hosts"),
                *("-replay", folder / "traces"),
                "--log=replay.thresh:critical",
                "--cfg=smpi/host-speed:1Gf",
                # What ping-pongs measure is what links give.
                "--cfg=network/model:CM02",
                "--cfg=network/bandwidth-factor:1.0",
                "--cfg=network/latency-factor:1.0",
                "--cfg=network/TCP-gamma:0",
                "--cfg=smpi/async-small-thresh:65536",
                "--cfg=smpi/bw-factor:0:1.0",
                "--cfg=smpi/lat-factor:0:1.0",
            ],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        words = (done.stdout + done.stderr).split()
        if done.returncode or "Simulation" not in words:
            raise RuntimeError(f"smpirun failed: {(done.stdout + done.stderr)[-2000:]}")
        return float(words[len(words) - words[::-1].index("time")])


def _platform(cluster: Cluster) -> str:
    """Return SimGrid's description of a cluster."""
    network = cluster.network
    backbone = ""
    if cluster.oversubscription > 1:
        shared = network.bandwidth * cluster.nodes / cluster.oversubscription
        backbone = f' bb_bw="{shared}Bps" bb_lat="0s"'
    return (
        "<?xml version='1.0'?>\n"
        '<!DOCTYPE platform SYSTEM "https://simgrid.org/simgrid.dtd">\n'
        '<platform version="4.1">\n'
        f'<cluster id="cluster" prefix="node" suffix="" radical="0-{cluster.nodes - 1}" '
        f'speed="1Gf" core="{2 * cluster.ranks}" bw="{network.bandwidth}Bps" '
        f'lat="{network.latency / 2}s" loopback_bw="100GBps" loopback_lat="100ns"{backbone}/>\n'
        "</platform>\n"
    )


def _write(trace: TextIO, schedule: Schedule, cluster: Cluster, design: Design) -> Iterator[int]:
    """Write the actions of all processes, and yield the node of each."""
    messages = _messages(schedule, cluster, design)
    after = _after(schedule, design)
    slow = _slowness(cluster)
    if not design.by_node:
        size = cluster.nodes * cluster.ranks
        for rank in range(size):
            _act(trace, rank, ["init", _compute(schedule.compute * slow[rank])])
            for number, message in enumerate(messages):
                _act(trace, rank, _allreduce(rank, size, message.nbytes, number, 0))
            _act(trace, rank, [_compute(after), "finalize"])
            yield rank // cluster.ranks
        return
    last = len(messages)
    for node in range(cluster.nodes):
        computing, exchanging = node, cluster.nodes + node
        slowest = max(slow[node * cluster.ranks : (node + 1) * cluster.ranks])
        comparison = list(_allreduce(node, cluster.nodes, _COMPARISON, last + 1, 0))
        _act(trace, computing, ["init", _compute(schedule.forward * slowest)])
        _act(trace, computing, comparison * max(design.comparisons - 1, 0))
        _act(trace, exchanging, ["init"])
        before = schedule.forward
        for number, message in enumerate(messages):
            wait = _compute((message.ready - before) * slowest)
            _act(trace, computing, [wait, f"send {exchanging} {number} {_TOKEN}"])
            _act(trace, exchanging, [f"recv {computing} {number} {_TOKEN}"])
            summing = _direct if _is_direct(cluster.nodes, design) else _allreduce
            actions = summing(node, cluster.nodes, message.nbytes, number, cluster.nodes)
            _act(trace, exchanging, actions)
            before = message.ready
        _act(trace, exchanging, [f"send {computing} {last} {_TOKEN}", "finalize"])
        rest = _compute((schedule.compute - before) * slowest)
        _act(trace, computing, [rest, f"recv {exchanging} {last} {_TOKEN}"])
        _act(trace, computing, comparison * min(design.comparisons, 1))
        _act(trace, computing, [_compute(after), "finalize"])
    yield from itertools.chain(range(cluster.nodes), range(cluster.nodes))


def _slowness(cluster: Cluster) -> list[float]:
    """Return how many times as long as it was recorded each rank computes."""
    factors = [1 + cluster.jitter * score for score in _scores(cluster)]
    if not cluster.jitter:
        factors *= cluster.nodes * cluster.ranks
    random.Random(0).shuffle(factors)  # noqa: S311 - any order will do, the same each time
    factors[: cluster.ranks] = [max(each, cluster.straggler) for each in factors[: cluster.ranks]]
    return factors


def _act(trace: TextIO, process: int, actions: Iterable[str]) -> None:
    trace.writelines(f"{process} {action}\n" for action in actions)


def _compute(seconds: float) -> str:
    return f"compute {max(seconds, 0.0) * _SPEED:.0f}"


def _direct(rank: int, size: int, nbytes: float, tag: int, first: int) -> Iterator[str]:
    """Yield what a process does in a direct sum; arguments as of :func:`_allreduce`."""
    others = [first + other for other in range(size) if other != rank]
    for part in _direct_steps(size, nbytes):
        for other in others:
            yield f"isend {other} {tag} {part:.0f}"
            yield f"irecv {other} {tag} {part:.0f}"
        yield "waitall"


def _allreduce(rank: int, size: int, nbytes: float, tag: int, first: int) -> Iterator[str]:
    """Yield what a process does in an allreduce: recursive halving, then recursive doubling.

    As Rabenseifner (2004), and MPICH; short messages are only doubled. Where the size is no power of two the
    processes above it send what they have to one below, and get the result from it. The nearest are
    exchanged with first, and most.

    Args:
        rank: In the group.
        size: Of the group.
        nbytes: Of what is summed.
        tag: Of the messages.
        first: The process that is rank 0.
    """
    power = 1 << (size.bit_length() - 1)
    extra = size - power
    if rank >= power:
        partner = first + rank - power
        yield f"send {partner} {tag} {nbytes:.0f}"
        yield f"recv {partner} {tag} {nbytes:.0f}"
        return
    if rank < extra:
        yield f"recv {first + rank + power} {tag} {nbytes:.0f}"
    steps = power.bit_length() - 1
    if nbytes <= _SHORT:
        exchanges = [(1 << step, nbytes) for step in range(steps)]
    else:
        halving = [(1 << step, nbytes / (2 << step)) for step in range(steps)]
        exchanges = [*halving, *halving[::-1]]
    for distance, part in exchanges:
        partner = first + (rank ^ distance)
        yield f"isend {partner} {tag} {part:.0f}"
        yield f"irecv {partner} {tag} {part:.0f}"
        yield "waitall"
    if rank < extra:
        yield f"send {first + rank + power} {tag} {nbytes:.0f}"

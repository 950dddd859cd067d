"""Replays a recorded step on a cluster that is not here: with SimGrid's SMPI, and in closed form.

In SMPI (Degomme et al., IEEE TPDS 2017) a trace is replayed on a model of the network in which
messages that share a link share its bandwidth. Designs that exchange after backward are a process for each
rank. Where gradients are exchanged by one rank for all of a node (the ranks of a node each exchange a
slice, which on the network is the same as one rank that exchanges everything), a node is two processes: one
computes and tells the other of each gradient that is final; that one exchanges it, and tells of the means.
So computation and exchange go on at the same time, and meet where they depend on each other.
"""

from __future__ import annotations

import itertools
import math
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

    from chainer_dist.scaling.schedule import Schedule

__all__ = [
    "DESIGNS",
    "NETWORKS",
    "Cluster",
    "Design",
    "Network",
    "closed_form",
    "n_actions",
    "simulate",
]

_SPEED = 1e9  # of a simulated core, in operations a second: a nanosecond each
_TOKEN = 1  # bytes of a message that only tells of something
_MESSAGES = 24  # so many at most of a step: gradients that are final together go together


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
        uplink: How many nodes' links together are as fast as the one that all share; 0 if none is shared.
    """

    nodes: int
    ranks: int
    network: Network
    straggler: float = 1.0
    uplink: int = 0


class Design(NamedTuple):
    """How gradients are exchanged, and parameters updated.

    Attributes:
        by_tensor: Each gradient in messages of its own; otherwise packed.
        overlaps: While backward computes others.
        width: Bytes sent for one byte of a gradient.
        by_node: Ranks of a node exchange each a slice, and update each a slice; otherwise all ranks of all
            nodes exchange, and update, everything.
    """

    by_tensor: bool
    overlaps: bool
    width: float
    by_node: bool


DESIGNS = {
    "naive": Design(by_tensor=True, overlaps=False, width=1.0, by_node=False),
    "flat": Design(by_tensor=False, overlaps=False, width=1.0, by_node=False),
    "multi-leader": Design(by_tensor=False, overlaps=False, width=1.0, by_node=True),
    "overlap": Design(by_tensor=False, overlaps=True, width=1.0, by_node=True),
    "float16": Design(by_tensor=False, overlaps=True, width=0.5, by_node=True),
}


class _Message(NamedTuple):
    """Something to exchange: when it is there, in seconds from the beginning of the step, and its bytes."""

    ready: float
    nbytes: float


def _messages(schedule: Schedule, design: Design) -> list[_Message]:
    """Return what is exchanged in a step, in its order."""
    final = [_Message(schedule.forward + moment, size) for moment, size in schedule.final]
    if not design.overlaps:
        final = [each._replace(ready=schedule.compute) for each in final]
    if not design.by_tensor:
        final = list(_joined(final, overlaps=design.overlaps))
    return [each._replace(nbytes=each.nbytes * design.width) for each in final]


def _joined(final: list[_Message], *, overlaps: bool) -> Iterator[_Message]:
    """Join messages; those of an overlapped exchange into so few that simulation stays cheap."""
    total = sum(each.nbytes for each in final)
    least = total / _MESSAGES if overlaps else total
    nbytes = 0.0
    for each in final:
        nbytes += each.nbytes
        if nbytes >= least:
            yield _Message(each.ready, nbytes)
            nbytes = 0.0
    if nbytes:
        yield _Message(final[-1].ready, nbytes)


def _after(schedule: Schedule, design: Design) -> float:
    """Return the seconds of what a rank does besides computation and exchange between nodes."""
    return schedule.node_update if design.by_node else schedule.update


def closed_form(schedule: Schedule, cluster: Cluster, design: Design) -> float:
    """Return the seconds of a step by the model of Hockney (1994): latency and bandwidth alone. Local.

    An exchange of n bytes among p, a power of two, takes ``2 log2(p)`` latencies and ``2 n (p - 1) / p`` bytes
    of a link; among others ``2`` latencies and ``2 n`` bytes more. Messages do not meet on the network.
    """
    group = cluster.nodes if design.by_node else cluster.nodes * cluster.ranks
    latency, bandwidth = cluster.network.latency, cluster.network.bandwidth
    if cluster.uplink:
        bandwidth *= min(1.0, cluster.uplink / cluster.nodes)
    end = 0.0
    for ready, nbytes in _messages(schedule, design):
        end = max(end, ready * cluster.straggler)
        if cluster.nodes > 1:
            # Between nodes go the bytes of all of a node's ranks, less what its ranks exchange first.
            power = 1 << (group.bit_length() - 1)
            end += 2 * math.log2(power) * latency + 2 * nbytes * (power - 1) / power / bandwidth
            if power != group:  # some send everything, and get it back
                end += 2 * (latency + nbytes / bandwidth)
    return max(end, schedule.compute * cluster.straggler) + _after(schedule, design)


def n_actions(schedule: Schedule, cluster: Cluster, design: Design) -> int:
    """Return about how many lines the trace of a step has. Local."""
    group = cluster.nodes if design.by_node else cluster.nodes * cluster.ranks
    steps = 2 * math.ceil(math.log2(max(group, 2)))
    return group * len(_messages(schedule, design)) * (3 * steps + 3)


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
        raise FileNotFoundError(
            "there is no smpirun: install SimGrid (Debian and Ubuntu: apt install libsimgrid-dev)"
        )
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
    if cluster.uplink:
        backbone = f' bb_bw="{network.bandwidth * cluster.uplink}Bps" bb_lat="0s"'
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
    messages = _messages(schedule, design)
    after = _after(schedule, design)
    if not design.by_node:
        size = cluster.nodes * cluster.ranks
        for rank in range(size):
            node = rank // cluster.ranks
            _act(trace, rank, ["init", _compute(schedule.compute * _slow(cluster, node))])
            for number, message in enumerate(messages):
                _act(trace, rank, _allreduce(rank, size, message.nbytes, number, 0))
            _act(trace, rank, [_compute(after), "finalize"])
            yield node
        return
    for node in range(cluster.nodes):
        computing, exchanging = node, cluster.nodes + node
        slow = _slow(cluster, node)
        _act(trace, computing, ["init"])
        _act(trace, exchanging, ["init"])
        before = 0.0
        for number, message in enumerate(messages):
            wait = _compute((message.ready - before) * slow)
            _act(trace, computing, [wait, f"send {exchanging} {number} {_TOKEN}"])
            _act(trace, exchanging, [f"recv {computing} {number} {_TOKEN}"])
            actions = _allreduce(node, cluster.nodes, message.nbytes, number, cluster.nodes)
            _act(trace, exchanging, actions)
            before = message.ready
        last = len(messages)
        _act(trace, exchanging, [f"send {computing} {last} {_TOKEN}", "finalize"])
        rest = _compute((schedule.compute - before) * slow)
        _act(
            trace,
            computing,
            [rest, f"recv {exchanging} {last} {_TOKEN}", _compute(after), "finalize"],
        )
    yield from itertools.chain(range(cluster.nodes), range(cluster.nodes))


def _slow(cluster: Cluster, node: int) -> float:
    return cluster.straggler if node == 0 else 1.0


def _act(trace: TextIO, process: int, actions: Iterable[str]) -> None:
    trace.writelines(f"{process} {action}\n" for action in actions)


def _compute(seconds: float) -> str:
    return f"compute {max(seconds, 0.0) * _SPEED:.0f}"


def _allreduce(rank: int, size: int, nbytes: float, tag: int, first: int) -> Iterator[str]:
    """Yield what a process does in an allreduce: recursive halving, then recursive doubling.

    As Rabenseifner (2004), and MPICH for all but short messages. Where the size is no power of two the
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
    halving = [(1 << step, nbytes / (2 << step)) for step in range(steps)]
    for distance, part in [*halving, *halving[::-1]]:
        partner = first + (rank ^ distance)
        yield f"isend {partner} {tag} {part:.0f}"
        yield f"irecv {partner} {tag} {part:.0f}"
        yield "waitall"
    if rank < extra:
        yield f"send {first + rank + power} {tag} {nbytes:.0f}"

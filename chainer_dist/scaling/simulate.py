"""Replays a recorded step on a cluster that is not here, with SimGrid's SMPI.

In SMPI (Degomme et al., IEEE TPDS 2017) a trace is replayed on a model of the network in which
messages that share a link share its bandwidth. Designs that exchange after backward are a process for each
rank. Where gradients are exchanged by one rank for all of a node (the ranks of a node each exchange a
slice, which on the network is the same as one rank that exchanges everything), a node is two processes: one
computes and signals to the other when a gradient is final; that one exchanges it, and signals when means are there.
So computation and exchange go on at the same time, and meet where they depend on each other.

What is taken as free: the exchange within a node of designs in which all ranks exchange everything (that of
the others was recorded), and what processors do for the network, as far as a ping-pong does not show it.
"""

from __future__ import annotations

import itertools
import math
import random
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from chainer_dist.scaling.cluster import scores
from chainer_dist.scaling.design import (
    COMPARISON,
    SHORT,
    direct_steps,
    is_direct,
    messages_of,
    seconds_of_update,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import TextIO

    from chainer_dist.scaling.cluster import Cluster
    from chainer_dist.scaling.design import Design
    from chainer_dist.scaling.schedule import Schedule

__all__ = ["MISSING", "n_actions", "simulate"]

MISSING = "there is no smpirun: install SimGrid (Debian and Ubuntu: apt install libsimgrid-dev)"

_SPEED = 1e9  # of a simulated core, in operations a second: a nanosecond each
_TOKEN = 1  # bytes of a message that is only a signal


def n_actions(schedule: Schedule, cluster: Cluster, design: Design) -> int:
    """Return about how many lines the trace of a step has. Local."""
    group = cluster.nodes if design.by_node else cluster.nodes * cluster.ranks
    steps = 2 * math.ceil(math.log2(max(group, 2)))
    return group * len(messages_of(schedule, cluster, design)) * (3 * steps + 3)


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
    messages = messages_of(schedule, cluster, design)
    after = seconds_of_update(schedule, design)
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
        comparison = list(_allreduce(node, cluster.nodes, COMPARISON, last + 1, 0))
        _act(trace, computing, ["init", _compute(schedule.forward * slowest)])
        _act(trace, computing, comparison * max(design.comparisons - 1, 0))
        _act(trace, exchanging, ["init"])
        before = schedule.forward
        for number, message in enumerate(messages):
            wait = _compute((message.ready - before) * slowest)
            _act(trace, computing, [wait, f"send {exchanging} {number} {_TOKEN}"])
            _act(trace, exchanging, [f"recv {computing} {number} {_TOKEN}"])
            summing = _direct if is_direct(cluster.nodes, design) else _allreduce
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
    factors = [1 + cluster.jitter * score for score in scores(cluster)]
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
    for part in direct_steps(size, nbytes):
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
    if nbytes <= SHORT:
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

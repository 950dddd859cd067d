#!/usr/bin/env python
"""Run an MPI job on several hosts, all of which are on this machine.

A host is a set of Linux namespaces: a network, a host name, shared memory and semaphores of its own.
A switch joins the hosts, each by a link that has the bandwidth, delay and loss of the network one wants
to know about. TCP over these links is the real one; only
processors and memory are those of a single machine.

    scripts/cluster/netns_cluster.py --hosts 2 --ranks-per-host 2 --rate 1gbit -- python train.py

MPICH's mpiexec starts the job as on any cluster, with a launcher in the place of ssh, and the status
is the job's. At the start a ping-pong shows that messages between hosts cross the links and take the
time that these take, and that ranks of one host share memory.

Needs Linux, root, util-linux, iproute2 and MPICH; where something is missing the script says what, and
ends with status 77. All of it lives in a process namespace that ends with this process, however that
ends: nothing is left behind, and any number of clusters can be there at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from typing_extensions import Self

CANNOT = 77  # the status that test runners take for "skipped"

_RELAY = Path(__file__).resolve().with_name("netns_relay.py")
_MOST_HOSTS = 200
_HEAD = "10.0.0.254"  # mpiexec is here, beside the switch
_SECONDS_TO_END = 5
_QUEUE_BYTES = 4 << 20  # what waits at a link's end; what comes on top of that is lost
_SECONDS_TO_MEASURE = 0.5  # the fastest message counts: others may be using the processors, too
_TOLERANCE = 0.25

_ENVIRONMENT = {
    # TCP as it is. UCX, where it sees that hosts have one kernel, takes short cuts through memory.
    "MPIR_CVAR_CH4_NETMOD": "ofi",
    "FI_PROVIDER": "tcp",
    "GLOO_SOCKET_IFNAME": "eth0",
}

# Keeps namespaces until its input ends, which happens when this process does. Tells its process id
# outside and inside. Of TCP's algorithms only reno is there whatever the machine is set to.
_HOLDER = """
read outside rest </proc/self/stat
mount -t proc proc /proc
mount -t tmpfs tmpfs /dev/shm
printf '%b' "$2" >/dev/shm/hosts
mount --bind /dev/shm/hosts /etc/hosts
rm /dev/shm/hosts
hostname "$1"
ip link set lo up
echo reno >/proc/sys/net/ipv4/tcp_congestion_control
echo "$outside" $$
exec cat >/dev/null
"""

_UNITS = {
    "rate": {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9},
    "delay": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
    "loss": {"%": 1e-2},
}


class UnavailableError(RuntimeError):
    """No cluster can be had here; says what is missing and how to get it."""


class Measured(NamedTuple):
    """What a ping-pong of two ranks found."""

    latency: float  # seconds, one way
    rate: float  # bits a second
    crossed: float  # how often the messages went through the first host's link

    def __str__(self) -> str:
        return f"{self.latency * 1e6:8.1f} us {self.rate / 1e9:8.3f} Gbit/s"


class Cluster:
    """Hosts on this machine; a context manager.

    Args:
        hosts: How many; their addresses are 10.0.0.1 and so on, their names host0 and so on.
        rate: Bandwidth of each host's link in each direction: a number and bit, kbit, mbit or gbit.
        delay: How much later each packet leaves a host: a number and us, ms or s.
        loss: The share of a host's packets that never leave: a number and %.
        ranks_per_host: How many ranks a job has on each host, unless it is started with others.
        check: Whether to measure at the start that all is as it should be.

    Raises:
        UnavailableError: If something is missing on this machine.
        ValueError: If an argument makes no sense.
        RuntimeError: If the links are not what they should be.
    """

    def __init__(
        self,
        hosts: int,
        *,
        rate: str = "1gbit",
        delay: str = "0ms",
        loss: str = "0%",
        ranks_per_host: int = 1,
        check: bool = True,
    ) -> None:
        if not 1 <= hosts <= _MOST_HOSTS:
            raise ValueError(f"hosts is {hosts}, expected 1 to {_MOST_HOSTS}")
        if ranks_per_host < 1:
            raise ValueError(f"ranks_per_host is {ranks_per_host}, expected at least 1")
        self.hosts, self.ranks_per_host = hosts, ranks_per_host
        self.addresses = [f"10.0.0.{1 + host}" for host in range(hosts)]
        self.pids: list[int] = []  # of the process that keeps each host
        self._links = [_Link.parse(rate=rate, delay=delay, loss=loss)] * hosts
        self._check = check
        self._holders: list[subprocess.Popen[str]] = []
        self._relays: dict[
            int, subprocess.Popen[str]
        ] = {}  # by host, where the kernel has no netem
        self._jobs: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        self._mpiexec = find_mpiexec()
        try:
            self._bring_up()
            if self._check:
                print(self.check(), flush=True)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _bring_up(self) -> None:
        names = [f"{address} host{host}" for host, address in enumerate(self.addresses)]
        known = "\\n".join(["127.0.0.1 localhost", f"{_HEAD} head", *names, ""])
        space = ["unshare", "--mount", "--uts", "--ipc", "--net"]
        hold = ["sh", "-euc", _HOLDER, "holder"]
        self._head, _ = self._hold([*space, "--pid", "--fork", *hold, "head", known])
        _inside(
            self._head,
            "ip link add switch type bridge",
            f"ip addr add {_HEAD}/24 dev switch",
            "ip link set switch up",
        )
        # Called in the place of ssh, with options, a host and a command.
        launch = ["#!/bin/sh", 'while [ "${1#-}" != "$1" ]; do shift; done', 'case "$1" in']
        for host, (address, link) in enumerate(zip(self.addresses, self._links)):
            into = ["nsenter", f"--target={self._head}", "--pid", *space]
            pid, pid_inside = self._hold([*into, *hold, f"host{host}", known])
            self.pids.append(pid)
            launch.append(f"{address}) pid={pid_inside};;")
            if self._needs_relay(link):
                self._start_relay(host, link)
            else:
                _inside(self._head, f"ip link add port{host} type veth peer name eth0 netns {pid}")
            _inside(self._head, f"ip link set port{host} master switch up")
            _inside(pid, f"ip addr add {address}/24 dev eth0", "ip link set eth0 up")
            self._set_rate(host, link)
            if (link.delay or link.loss) and host not in self._relays:
                self._set_netem(host, link)
        launch += ['*) echo "no host $1" >&2; exit 1;;', "esac", "shift"]
        launch += ['exec nsenter --target="$pid" --mount --uts --ipc --net sh -c "$*"']
        write = "cat >/dev/shm/launch; chmod +x /dev/shm/launch"
        _run(
            ["nsenter", f"--target={self._head}", "--mount", "sh", "-euc", write], "\n".join(launch)
        )

    def _needs_relay(self, link: _Link) -> bool:
        """Tell whether a link delays or loses packets, and the kernel cannot do that."""
        if not (link.delay or link.loss):
            return False
        try:
            _inside(self._head, "tc qdisc add dev lo root netem", "tc qdisc del dev lo root")
        except UnavailableError:
            return True
        return False

    def _start_relay(self, host: int, link: _Link) -> None:
        """Let a process be a host's link."""
        into = ["nsenter", f"--target={self._head}", "--net"]
        what = [str(host), str(self.pids[host]), link.late]
        relay = subprocess.Popen(  # noqa: S603
            [*into, sys.executable, str(_RELAY), *what],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._holders.append(relay)
        assert relay.stdout is not None  # noqa: S101 - it is a pipe
        if not relay.stdout.readline():
            raise UnavailableError(
                f"no delay and no loss here: the kernel has no netem, and {relay.communicate()[1]}"
            )
        self._relays[host] = relay

    def _hold(self, command: list[str]) -> tuple[int, int]:
        """Start a process that keeps namespaces; return its id outside and inside of them."""
        holder = subprocess.Popen(  # noqa: S603
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is for this process to handle
        )
        self._holders.append(holder)
        assert holder.stdout is not None  # noqa: S101 - it is a pipe
        pids = holder.stdout.readline().split()
        if len(pids) != 2:
            raise UnavailableError(
                f"namespaces cannot be had here: {holder.communicate()[1].strip()}; a container "
                "needs more rights, such as docker run --privileged"
            )
        return int(pids[0]), int(pids[1])

    def close(self) -> None:
        """End all jobs and take the hosts down; a second call does nothing."""
        for job in self._jobs:
            stop(job)
        # The first holder is process 1 of the namespace; when it ends all others in there do.
        for holder in self._holders:
            holder.communicate()
        self._jobs, self._holders, self.pids, self._relays = [], [], [], {}

    def start(
        self,
        command: Sequence[str],
        *,
        ranks_per_host: int | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> subprocess.Popen[str]:
        """Start a job on all hosts without waiting for it; :func:`stop` ends it.

        Args:
            command: What each rank runs, in the directory that this process is in.
            ranks_per_host: How many ranks, if not as many as the cluster was created with.
            env: Environment variables on top of this process's.
            options: For ``subprocess.Popen``.

        Returns:
            The process of mpiexec.
        """
        ranks = ranks_per_host or self.ranks_per_host
        hosts = ",".join(f"{address}:{ranks}" for address in self.addresses)
        into = f"nsenter --target={self._head} --pid --mount --uts --ipc --net".split()
        launcher = ["-launcher", "ssh", "-launcher-exec", "/dev/shm/launch"]  # noqa: S108 - its own
        size = ["-hosts", hosts, "-n", str(ranks * self.hosts), "-wdir", str(Path.cwd())]
        job = subprocess.Popen(  # noqa: S603
            [*into, self._mpiexec, *launcher, *size, *command],
            env={**os.environ, **_ENVIRONMENT, **(env or {})},
            text=True,
            start_new_session=True,
            **{"stdin": subprocess.DEVNULL, **options},
        )
        self._jobs.append(job)
        return job

    def run(
        self, command: Sequence[str], *, timeout: float | None = None, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a job on all hosts to its end.

        Args:
            command: What each rank runs, in the directory that this process is in.
            timeout: Seconds after which the job is stopped.
            options: Of :meth:`start`.

        Returns:
            Status and output.

        Raises:
            subprocess.TimeoutExpired: If the job was stopped.
        """
        job = self.start(command, **options)
        try:
            out, err = job.communicate(timeout=timeout)
        finally:
            stop(job)
            self._jobs.remove(job)
        return subprocess.CompletedProcess(job.args, job.returncode, out, err)

    def set_link(self, host: int, **changed: str) -> None:
        """Change a host's link, also while a job runs.

        Args:
            host: Its number.
            changed: ``rate``, ``delay`` or ``loss``; others stay as they are.
        """
        before = self._links[self._number(host)]
        link = before._replace(**_parse(**changed))
        if link.rate != before.rate:
            self._set_rate(host, link)
        if link[1:] != before[1:]:
            self._set_late(host, link)
        self._links[host] = link

    def cut(self, host: int) -> None:
        """Pull a host's cable: all that it sends, and all that is sent to it, is lost."""
        _inside(self._head, f"ip link set port{self._number(host)} down")

    def mend(self, host: int) -> None:
        """Undo :meth:`cut`. TCP resends by itself, the later the longer it could not."""
        _inside(self._head, f"ip link set port{self._number(host)} up")

    def _number(self, host: int) -> int:
        if not 0 <= host < self.hosts:
            raise ValueError(f"host is {host}, expected 0 to {self.hosts - 1}")
        return host

    def _set_rate(self, host: int, link: _Link) -> None:
        # Several hosts may send to one: so the switch, too, sends no faster than that. Its bucket is
        # larger, because two of a size in a row lose more of the rate than either.
        for pid, device, bucket in (
            (self.pids[host], "eth0", link.bucket),
            (self._head, f"port{host}", 4 * link.bucket),
        ):
            shape = f"rate {link.rate:.0f}bit burst {bucket} limit {_QUEUE_BYTES}"
            _inside(pid, f"tc qdisc replace dev {device} root handle 1: tbf {shape}")

    def _set_late(self, host: int, link: _Link) -> None:
        if host in self._relays:
            relay = self._relays[host]
            assert relay.stdin is not None  # noqa: S101 - it is a pipe
            relay.stdin.write(f"{link.late}\n")
            relay.stdin.flush()
            return
        self._set_netem(host, link)

    def _set_netem(self, host: int, link: _Link) -> None:
        room = 1000 + int(
            link.rate * link.delay / 8 / 100
        )  # packets that are on their way meanwhile
        what = f"netem delay {link.delay * 1e6:.0f}us loss {link.loss:%} limit {room}"
        try:
            _inside(self.pids[host], f"tc qdisc replace dev eth0 parent 1:1 handle 10: {what}")
        except UnavailableError as error:
            raise UnavailableError(
                f"no delay and no loss with this kernel: {error}; without CONFIG_NET_SCH_NETEM "
                "(modprobe sch_netem, where that is a module) start with some delay or loss, to change it"
            ) from error

    def check(self) -> str:
        """Measure all links by a ping-pong between ranks of host 0 and of each host.

        Returns:
            A table of what was found.

        Raises:
            RuntimeError: If a message between hosts took another way than the links or is more than
                25 % faster or slower than they are; or if ranks of one host use their link.
        """
        nbytes = 16 * max(link.bucket for link in self._links)
        slowest = min(link.rate for link in self._links)
        times = 3 + int(_SECONDS_TO_MEASURE * slowest / 8 / nbytes)
        rank = [sys.executable, __file__, "--ping-pong", str(nbytes), str(times)]
        job = self.run(rank, ranks_per_host=2, stdout=subprocess.PIPE, timeout=120)
        if job.returncode:
            raise RuntimeError(f"the ping-pong of the hosts ended with status {job.returncode}")
        nodes, results = json.loads(job.stdout)
        within, *between = [Measured(*each) for each in results]
        wrong = []
        if nodes != self.hosts:
            wrong.append(f"MPI finds {nodes} nodes, expected {self.hosts}")
        if within.crossed > 0.1:
            wrong.append("ranks of host 0 talk through its link, not through memory")
        table = [f"{'within host 0':24} {within}"]
        for host, measured in enumerate(between, start=1):
            table.append(f"{f'host 0 to host {host}':24} {measured}")
            if measured.crossed < 0.9:
                wrong.append(
                    f"messages between host 0 and host {host} take another way than the link"
                )
            ends = self._links[0], self._links[host]
            ratio = measured.rate / min(link.rate for link in ends)
            lossy = any(link.loss for link in ends)
            if ratio > 1 + _TOLERANCE or (ratio < 1 - _TOLERANCE and not lossy):
                wrong.append(f"host {host} is reached at {ratio:.2f} of its link's rate")
            if measured.latency < (1 - _TOLERANCE) * sum(link.delay for link in ends) / 2:
                wrong.append(f"host {host} is reached sooner than its link's delay allows")
        if wrong:
            raise RuntimeError("\n".join(["the cluster is not what it should be:", *wrong, *table]))
        return "\n".join(table)


class _Link(NamedTuple):
    rate: float  # bits a second
    delay: float  # seconds
    loss: float  # a share

    @classmethod
    def parse(cls, **properties: str) -> _Link:
        return cls(**_parse(**properties))

    @property
    def late(self) -> str:
        """What netns_relay.py is told."""
        return json.dumps({"delay": self.delay, "loss": self.loss})

    @property
    def bucket(self) -> int:
        """Bytes that an idle link sends at once.

        The largest packet fits in; and what the link sends in the time that a timer may be late,
        1 ms where that is not too much, 0.2 ms otherwise.
        """
        bytes_a_second = self.rate / 8
        return int(max(66_000, min(1e-3 * bytes_a_second, 125_000), 0.2e-3 * bytes_a_second))


def _parse(**properties: str) -> dict[str, float]:
    """Return a link's properties as numbers: bits a second, seconds, a share."""
    numbers = {}
    for name, text in properties.items():
        found = re.fullmatch(r"(\d+\.?\d*)\s*([a-z%]+)", text.strip().lower())
        if name not in _UNITS or found is None or found[2] not in _UNITS[name]:
            known = "; ".join(f"{each} in {', '.join(units)}" for each, units in _UNITS.items())
            raise ValueError(f"{name} is {text!r}, expected a number and a unit: {known}")
        numbers[name] = float(found[1]) * _UNITS[name][found[2]]
    if numbers.get("rate", 1) <= 0 or numbers.get("loss", 0) > 1:
        raise ValueError(f"{properties}: a rate is more than 0, a loss at most 100%")
    return numbers


def find_mpiexec() -> str:
    """Return the mpiexec of this Python's environment, or that on the path.

    Raises:
        UnavailableError: If something is missing on this machine.
    """
    if not sys.platform.startswith("linux"):
        raise UnavailableError("namespaces are Linux's")
    if os.geteuid() != 0:
        raise UnavailableError("only root can create hosts: sudo, or a container's root")
    for command, package in (("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")):
        if shutil.which(command) is None:
            raise UnavailableError(f"no command {command}: apt-get install {package}")
    beside = Path(sys.executable).parent / "mpiexec"
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None or "HYDRA" not in _run([mpiexec, "--version"]):
        raise UnavailableError("no mpiexec of MPICH: pip install mpich")
    return mpiexec


def stop(job: subprocess.Popen[str]) -> None:
    """End a job that is running still."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if job.poll() is None:
            os.killpg(job.pid, number)
            try:
                job.wait(_SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                continue


def _inside(pid: int, *commands: str) -> None:
    """Run commands in the network of a process."""
    _run(["nsenter", f"--target={pid}", "--net", "sh", "-euc", "\n".join(commands)])


def _run(command: list[str], text: str = "") -> str:
    """Run a command with a text as its input and return what it prints."""
    done = subprocess.run(command, input=text, text=True, capture_output=True, check=False)  # noqa: S603
    if done.returncode:
        raise UnavailableError(f"{command[-1]}: {done.stderr.strip()}")
    return done.stdout


def ping_pong(nbytes: int, times: int) -> None:
    """Be one of two ranks on each host; rank 0 prints how many nodes there are and what it measures."""
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    node = world.Split_type(MPI.COMM_TYPE_SHARED)
    nodes = world.allreduce(int(node.rank == 0))
    results = []
    for peer in (1, *range(2, world.size, 2)):
        latency, _ = messages(world, peer, 1, times)
        seconds, crossed = messages(world, peer, nbytes, times)
        results.append(Measured(latency, 8 * nbytes / (seconds - latency), crossed))
    if world.rank == 0:
        print(json.dumps([nodes, results]))


def messages(world: Any, peer: int, nbytes: int, times: int) -> tuple[float, float]:
    """Let rank 0 and a peer send one another messages. Collective.

    Args:
        world: MPI communicator.
        peer: The other rank.
        nbytes: Of a message.
        times: How many messages go there and back.

    Returns:
        Seconds of the fastest message, and how often all messages left through the host's link. On
        ranks that take no part both mean nothing.
    """
    buffer = bytearray(nbytes)
    calls: list[Callable[..., Any]] = [world.Send, world.Recv]
    seconds = [math.inf]
    before = _sent_bytes()
    for _ in range(times if world.rank in {0, peer} else 0):
        started = time.perf_counter()
        for call in calls if world.rank == 0 else calls[::-1]:
            call(buffer, peer if world.rank == 0 else 0)
        seconds.append((time.perf_counter() - started) / 2)
    crossed = (_sent_bytes() - before) / (times * nbytes)
    done = world.Ibarrier()
    while not done.Test():  # a rank that spins takes a core from those that are measured
        time.sleep(1e-3)
    return min(seconds), crossed


def _sent_bytes() -> int:
    """Return how many bytes have left this host."""
    table = Path("/proc/self/net/dev").read_text(encoding="ascii")
    return int(table.split("eth0:")[1].split()[8])


def main() -> int:
    """Run a command on a cluster."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="(default: 2)")
    parser.add_argument("--ranks-per-host", type=int, default=1, help="(default: 1)")
    parser.add_argument("--rate", default="1gbit", help="of each link (default: 1gbit)")
    parser.add_argument("--delay", default="0ms", help="of what leaves a host (default: 0ms)")
    parser.add_argument("--loss", default="0%", help="of what leaves a host (default: 0%%)")
    parser.add_argument("--no-check", action="store_true", help="measure nothing at the start")
    parser.add_argument("--ping-pong", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND")
    args = parser.parse_args()
    if args.ping_pong:
        ping_pong(*args.ping_pong)
        return 0
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("no command: what is to run comes behind --")
    options = {"rate": args.rate, "delay": args.delay, "loss": args.loss}
    try:
        with Cluster(
            args.hosts, ranks_per_host=args.ranks_per_host, check=not args.no_check, **options
        ) as cluster:
            # For what the command reports.
            called = f"scripts/cluster/netns_cluster.py --hosts {args.hosts} --ranks-per-host {args.ranks_per_host}"
            env = {"NETNS_CLUSTER": f"{called} --rate {args.rate}"}
            return cluster.run(command, env=env).returncode
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return CANNOT if isinstance(error, UnavailableError) else 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())

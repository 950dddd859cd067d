"""Running a function on many ranks from Python: :func:`chainer_dist.launch`.

The ranks belong to an ordinary job of ``chainer-dist run``, in processes of their own. Each connects to the
process that called :func:`launch`, proves that it belongs to the job (see :mod:`chainer_dist._connections`),
fetches the function, calls it, and sends back what it returned or raised.
"""

from __future__ import annotations

import codecs
import contextlib
import operator
import os
import pickle
import re
import secrets
import selectors
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

from chainer_dist import _environment
from chainer_dist._connections import Reception, own_address
from chainer_dist.launcher import mpi
from chainer_dist.launcher.addresses import addresses
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.hostfiles import n_slots, parse_hosts, read_hostfile

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from typing_extensions import Self

    from chainer_dist.launcher.hostfiles import Host

__all__ = ["launch"]

LAUNCHER = Path(__file__).resolve().parent
SECONDS_TO_SAY_HELLO = 10
SECONDS_TO_END = 10  # from an interrupt to a second one, which kills
MOST_STRANGERS = 50
_CHUNK = 1 << 16
_LENGTH, RANK = struct.Struct("!Q"), struct.Struct("!I")
_REASON = re.compile(r"^chainer-dist(?: run)?: (.*)$", re.MULTILINE)
_LAST_PIECES = 20  # of what the launcher prints, for its reason


class RemoteTraceback(Exception):  # noqa: N818 - as in concurrent.futures, it only carries text
    """The traceback of an error on a rank, as the cause of the error that is raised here."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n{self.text}"


def launch(
    function: Callable[..., Any],
    args: Sequence[Any] = (),
    n: int | None = None,
    hosts: str | None = None,
    *,
    kwargs: Mapping[str, Any] | None = None,
    hostfile: str | os.PathLike[str] | None = None,
    timeout: float | None = None,
    env: Mapping[str, str] | None = None,
    options: Iterable[str] = (),
) -> list[Any]:
    """Run a function on many ranks, and return what it returned on each.

    For scripts, notebooks and the Python prompt::

        import chainer_dist

        def train(epochs):
            comm = chainer_dist.create_communicator()
            ...
            return accuracy

        accuracies = chainer_dist.launch(train, (20,), n=4)

    Every rank is a new process in which nothing of the calling one has happened. The function and its arguments
    are sent by ``cloudpickle``, so that functions of a notebook, closures and lambdas may be called; globals
    that a function of the calling script or notebook uses are sent as they are. What ranks print is printed here,
    with the number of the rank.

    Args:
        function: The function to be called on each rank.
        args: Positional arguments of the function, the same on all ranks.
        n: The number of ranks; by default the slots of the hosts, or 2 on this machine.
        hosts: The hosts and how many ranks each takes, as in ``"node1:4,node2:4"``; by default this machine.
        kwargs: Keyword arguments of the function, the same on all ranks.
        hostfile: The name of a file of hosts, in the format of MPICH or Open MPI, in place of ``hosts``.
        timeout: Seconds after which the job is ended; by default never.
        env: Environment variables of the ranks by name, in addition to the ones of this process.
        options: More options of ``chainer-dist run``, such as ``["--checked"]``.

    Returns:
        The values that the function returned, in the order of rank; they must be picklable.

    Raises:
        Exception: The error of the function on the rank that failed first, with that rank's traceback as its cause.
        LaunchError: If the job cannot be started, a rank dies without an exception, or time is over. All
            processes of the job have ended by then, as they have after an interrupt.
        RuntimeError: If this process is itself a rank.
    """
    from chainer_dist.launcher.by_value import dumps  # imports a library that few processes need

    if mpi.rank_of(os.environ) is not None:
        raise RuntimeError(
            "launch was called on a rank of a job; call it where no job runs, or call the function itself"
        )
    if not callable(function):
        raise TypeError(f"function is called on each rank, got {type(function).__name__}")
    places = _places(hosts, hostfile)
    n_ranks = _n_ranks(n) or n_slots(places) or 2
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout is a number of seconds, more than 0, got {timeout!r}")
    # The path comes first: the function may be of a module that is found by it only.
    content = dumps((function, tuple(args), dict(kwargs or {})))
    task = pickle.dumps((list(sys.path), content))
    command = [
        *(sys.executable, str(LAUNCHER), "run", "-n", str(n_ranks), "--hosts"),
        ",".join(f"{host.name}:{host.slots}" for host in places) or f"localhost:{n_ranks}",
        *(["--timeout", str(timeout)] if timeout else []),
        *options,
        *("-m", "chainer_dist.launcher.callee"),
    ]
    with _Call(task, places, n_ranks) as call:
        return call.results(call.run(command, env or {}))


def _places(hosts: str | None, hostfile: str | os.PathLike[str] | None) -> list[Host]:
    if hosts and hostfile:
        raise ValueError("hosts and hostfile name the same; give one of them")
    if hostfile:
        return read_hostfile(os.fspath(hostfile))
    return parse_hosts(hosts) if hosts else []


def _n_ranks(n: SupportsIndex | None) -> int:
    if n is None:
        return 0
    if not hasattr(n, "__index__") or isinstance(n, bool) or operator.index(n) < 1:
        raise ValueError(f"n is the number of ranks, from 1 up, got {n!r}")
    return operator.index(n)


class _Call:
    """One call of a function on all ranks: the connections from them, and what they answer.

    Args:
        task: The pickled function and its arguments, which ranks fetch.
        hosts: Hosts of the ranks; none is this host only.
        n_ranks: Number of ranks.
    """

    def __init__(self, task: bytes, hosts: Sequence[Host], n_ranks: int) -> None:
        self._task = task
        self._n_ranks = n_ranks
        self._secret = secrets.token_bytes(32)
        self._reception = Reception(
            self._secret,
            most=n_ranks + MOST_STRANGERS,
            seconds=SECONDS_TO_SAY_HELLO,
            n_bytes=RANK.size,
        )
        self._connections: list[socket.socket] = []
        self._answers: dict[int, _Answer] = {}  # in the order in which they came
        self._said: deque[str] = deque(maxlen=_LAST_PIECES)  # by the launcher
        self._where = [
            f"{each}/{self._reception.listen(own_address(each), n_ranks + MOST_STRANGERS)}"
            for each in addresses(hosts)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._reception.close()
        for connection in self._connections:
            connection.close()

    def run(self, command: list[str], env: Mapping[str, str]) -> int:
        """Run the job to its end, print what it prints, and return its status."""
        where = ",".join([self._secret.hex(), *self._where])
        job = subprocess.Popen(  # noqa: S603 - this package
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **env, _environment.CALL: where},
            start_new_session=True,  # what a terminal sends on Ctrl-C comes here only
        )
        with job, selectors.DefaultSelector() as self._selector:
            self._selector.register(self._reception, selectors.EVENT_READ)
            for pipe, name in ((job.stdout, "stdout"), (job.stderr, "stderr")):
                assert pipe is not None  # noqa: S101 - for the type checker
                decoder = codecs.getincrementaldecoder("utf-8")("replace")
                self._selector.register(pipe, selectors.EVENT_READ, (name, decoder))
            try:
                while self._look(1.0):
                    pass
            except BaseException:
                self._end(job)
                raise
        return job.returncode

    def results(self, status: int) -> list[Any]:
        """Return what all ranks returned, or raise what the first that failed has raised."""
        for rank, answer in self._answers.items():
            if not answer.returned:
                raise _error(rank, answer)
        missing = [rank for rank in range(self._n_ranks) if rank not in self._answers]
        if status or missing:
            reasons = _REASON.findall("".join(self._said)) or ["the launcher gave no reason"]
            raise LaunchError(f"{reasons[-1]}; the job ended with status {status}")
        return [_load(self._answers[rank].content) for rank in range(self._n_ranks)]

    def _look(self, seconds: float) -> bool:
        """React to what happens within some seconds; return whether the job may print more."""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._reception:
                continue
            printed = os.read(key.fd, _CHUNK)
            name, decoder = key.data
            self._print(name, decoder.decode(printed, final=not printed))
            if not printed:
                self._selector.unregister(key.fileobj)
        for connection, rank in self._reception.admit():
            self._connections.append(connection)
            threading.Thread(
                target=self._serve, args=(connection, *RANK.unpack(rank)), daemon=True
            ).start()
        return len(self._selector.get_map()) > 1

    def _print(self, name: str, text: str) -> None:
        if name == "stderr":
            self._said.append(text)
        stream = getattr(sys, name)  # a notebook has its own
        if stream is not None and text:
            stream.write(text)
            stream.flush()

    def _serve(self, connection: socket.socket, rank: int) -> None:
        """Hand a rank the function, and take its answer."""
        with contextlib.suppress(OSError, ValueError):  # the launcher reports a rank that dies
            connection.setblocking(True)  # noqa: FBT003 - positional only
            send(connection, self._task)
            returned, content, text = pickle.loads(receive(connection))
            self._answers[rank] = _Answer(returned, content, text)
            send(connection, b"")  # the rank may leave now

    def _end(self, job: subprocess.Popen[bytes]) -> None:
        """End the job: ranks are interrupted, and killed if they are still there after a while."""
        for _ in range(2):
            with contextlib.suppress(ProcessLookupError):
                job.send_signal(signal.SIGINT)
            deadline = time.monotonic() + SECONDS_TO_END
            while self._look(0.1) and time.monotonic() < deadline:
                pass
        job.kill()  # it has ended, or does not listen


class _Answer(NamedTuple):
    """What a rank sends back: what the function returned or raised, pickled, and the traceback."""

    returned: bool
    content: bytes
    traceback: str


def _error(rank: int, answer: _Answer) -> BaseException:
    """Return the error of a rank, its traceback as the cause."""
    try:
        error = _load(answer.content)
    except LaunchError as unknown:
        error = unknown
    error.__cause__ = RemoteTraceback(f"rank {rank}:\n{answer.traceback}")
    found: BaseException = error
    return found


def _load(content: bytes) -> Any:
    try:
        return pickle.loads(content)
    except Exception as error:
        raise LaunchError(f"what a rank sent back cannot be loaded here: {error!r}") from error


def send(connection: socket.socket, content: bytes) -> None:
    """Send a message, of any length. Local."""
    connection.sendall(_LENGTH.pack(len(content)))
    connection.sendall(content)


def receive(connection: socket.socket) -> bytes:
    """Return a message. Local.

    Raises:
        ConnectionResetError: If the other side closes before its end.
    """
    with connection.makefile("rb") as file:
        header = file.read(_LENGTH.size)
        content = file.read(*_LENGTH.unpack(header)) if len(header) == _LENGTH.size else b""
    if len(header) < _LENGTH.size or len(content) < _LENGTH.unpack(header)[0]:
        raise ConnectionResetError("the other process has ended")
    return content

"""One job: ``mpiexec``, the monitors of its ranks, what they print, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import math
import resource
import secrets
import signal
import socket
from collections import deque
from typing import TYPE_CHECKING, Any, NamedTuple

from chainer_dist import _environment
from chainer_dist._connections import LOOPBACK, Reception, is_loopback, own_address
from chainer_dist.launcher import mpi, output, wire
from chainer_dist.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chainer_dist.launcher.hostfiles import Host
    from chainer_dist.launcher.stdin import Input

__all__ = ["Job", "Outcome", "addresses"]

TIMED_OUT = 124  # as timeout(1) has it
SECONDS_TO_START = 300
SECONDS_TO_SPEAK = 0.5  # for the other ranks, after the first has failed
SECONDS_TO_SAVE = 10  # the same, where the ranks were asked to end by a signal from outside
SECONDS_TO_HANG_UP = 10  # from SIGHUP, which libraries of MPI catch, to SIGTERM
SECONDS_TO_LEAVE = 30  # from that to SIGKILL
SECONDS_TO_FINISH = 300  # from a SIGTERM from outside to SIGKILL: a checkpoint may take long
SECONDS_TO_DUMP = 1  # where a rank hangs, on SIGABRT
SECONDS_TO_OBEY = 5  # from SIGTERM to SIGKILL, and from that to giving up
SECONDS_TO_SAY_HELLO = 10
N_LINES = 200  # that are kept of what mpiexec says
MORE_FILES = 100  # that may be open, beside a connection to each rank
MOST_STRANGERS = 50  # connections of them

# An address that is nobody's: the way to it begins at the interface that most ways begin at.
SOMEWHERE = "198.51.100.1"

_HINTS = {
    "SIGKILL": " (by the system, if memory was short)",
    "SIGSEGV": " (a crash in compiled code)",
}


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        status: Exit status: 0, that of the first rank that failed, 128 and the number of the signal
            that killed it, or 124 for the time limit.
        reason: Which rank failed first and why, or what else ended the job; "" if nothing did.
        final: Whether starting again is pointless: it ended well, in time, or by the user's wish.
        progress: The largest number that ranks have written as their progress, or None.
    """

    status: int
    reason: str
    final: bool
    progress: int | None


class Job:
    """A job that is started once.

    Args:
        command: ``mpiexec`` and its arguments, and what each rank is to run, a monitor.
        environ: Environment of ``mpiexec``.
        n_ranks: How many monitors are expected.
        reach: Addresses of this host that the hosts of the ranks can reach.
        stdin: What rank 0 reads.
        prefix: Whether lines are printed with the number of their rank.
        seconds: Time limit.
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        n_ranks: int,
        *,
        reach: Sequence[str],
        stdin: Input,
        prefix: bool,
        seconds: float = math.inf,
    ) -> None:
        self._command = command
        self._environ = environ
        self._n_ranks = n_ranks
        self._reach = reach
        self._stdin = stdin
        self._prefix = prefix
        self._seconds = seconds
        self._secret = secrets.token_bytes(32)
        self._listens = True
        self._ranks: dict[int, _Rank] = {}
        self._failed: list[_Rank] = []  # by themselves, in this order
        self._ending = False  # whether the launcher ends the ranks
        self._verdict: tuple[int, str] | None = None  # the launcher's own reason to end the job
        self._signal: signal.Signals | None = None  # that the ranks were asked to end with
        self._status: int | None = None  # of mpiexec
        self._talks: set[asyncio.Task[None]] = set()  # keeps them alive, too
        self._said: deque[bytes] = deque(maxlen=N_LINES)  # by mpiexec
        self._progress: int | None = None

    def run(self) -> Outcome:
        """Run the job to its end; no process of it is left then. Local.

        Raises:
            LaunchError: If mpiexec cannot be started.
        """
        return asyncio.run(self._run())

    async def _run(self) -> Outcome:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        for number in wire.FORWARDED:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._loop.add_signal_handler(number, self._forward, number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, wire.FORWARDED)
        output.listen(functools.partial(self._loop.call_soon_threadsafe, self._was_written))
        _allow_open_files(self._n_ranks + MORE_FILES)
        self._reception = Reception(
            self._secret, most=self._n_ranks + MOST_STRANGERS, seconds=SECONDS_TO_SAY_HELLO
        )
        places = self._listen()
        self._loop.add_reader(self._reception, self._admit)
        self._expire()
        where = ",".join([self._secret.hex(), *(f"{place}/{port}" for place, port in places)])
        mpiexec = await self._start({**self._environ, _environment.LAUNCHER: where})
        try:
            await self._supervise()
            await self._end_ranks()
            if not await self._until(lambda: self._status is not None, SECONDS_TO_OBEY):
                mpiexec.kill()
                await self._until(lambda: self._status is not None, SECONDS_TO_OBEY)
        finally:
            output.listen(None)
            signal.pthread_sigmask(signal.SIG_BLOCK, wire.FORWARDED)
            self._stop_listening()
            for talk in self._talks:
                talk.cancel()
            ended = await asyncio.gather(*self._talks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        return self._outcome()

    def _listen(self) -> list[tuple[str, int]]:
        """Listen where the ranks can reach this host, nowhere else; return where that is for them."""
        places = []
        for each in self._reach:
            own = own_address(each)  # itself, unless it is translated on the way
            if not own or (is_loopback(own) and not is_loopback(each) and each != "localhost"):
                # A name of this host that stands for another address elsewhere.
                own = own_address(SOMEWHERE)
            try:
                places.append((each, self._reception.listen(own, self._n_ranks + MORE_FILES)))
            except OSError as error:
                self._reception.close()
                raise LaunchError(
                    f"ranks cannot connect to {each}: {error}; name an address at which other hosts reach "
                    "this one: chainer-dist run --address NAME"
                ) from None
        return places

    def _admit(self) -> None:
        """Talk to who has proven to be a monitor."""
        for connection, _ in self._reception.admit():
            self._talks.add(self._loop.create_task(self._serve(connection)))

    def _expire(self) -> None:
        """See to it that nobody stays without having said anything."""
        if self._listens:
            self._admit()
            self._loop.call_later(1, self._expire)

    def _stop_listening(self) -> None:
        if self._listens:
            self._listens = False
            self._loop.remove_reader(self._reception)
            self._reception.close()

    async def _start(self, environ: Mapping[str, str]) -> asyncio.subprocess.Process:
        # What a terminal or a scheduler sends to all processes must not end mpiexec before the ranks
        # have had their say. In a session of its own it could not ask for ssh's passwords.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, wire.FORWARDED)
        try:
            mpiexec = await asyncio.create_subprocess_exec(
                *self._command,
                env=environ,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
        except OSError as error:
            raise LaunchError(f"{self._command[0]} cannot be started: {error}") from None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._talks.add(self._loop.create_task(self._listen_to(mpiexec)))
        return mpiexec

    async def _listen_to(self, mpiexec: asyncio.subprocess.Process) -> None:
        lines = output.Lines(self._mpiexec_says)
        assert mpiexec.stdout is not None  # noqa: S101 - for the type checker
        while True:
            said = await mpiexec.stdout.read(wire.CHUNK)
            if not said:
                break
            lines.add(said)
        lines.end()
        self._status = await mpiexec.wait()
        self._changed.set()

    def _mpiexec_says(self, line: bytes) -> None:
        self._said.append(line)
        if len(self._ranks) < self._n_ranks and not self._failed and not output.is_full():
            self._show_mpiexec()  # it may be asking for something, or say why there are no ranks

    def _show_mpiexec(self) -> None:
        while self._said:
            output.write(wire.ERR, b"[mpiexec] " + self._said.popleft())

    async def _supervise(self) -> None:
        """Wait for the job's end, or for a reason to end it."""
        limit = self._loop.time() + self._seconds
        all_there = await self._until(
            lambda: len(self._ranks) == self._n_ranks or self._is_over(),
            min(SECONDS_TO_START, self._seconds),
        )
        if not all_there and self._seconds > SECONDS_TO_START:
            missing = [rank for rank in range(self._n_ranks) if rank not in self._ranks]
            reason = f"{len(missing)} of {self._n_ranks} ranks, of which the first is {missing[0]},"
            self._verdict = 1, f"{reason} have not started within {SECONDS_TO_START} s"
        elif not await self._until(self._is_over, limit - self._loop.time()):
            there = sorted(rank.number for rank in self._alive())
            who = f"rank {', '.join(map(str, there))}" if there else "mpiexec"
            self._verdict = TIMED_OUT, f"the time limit is reached; {who} had not ended"
            self._send_all(wire.SIGNAL, signal.SIGABRT)  # faulthandler says where they are
            await self._until(lambda: not self._alive(), SECONDS_TO_DUMP)

    def _is_over(self) -> bool:
        if self._verdict or self._status is not None:
            return True
        if len(self._ranks) == self._n_ranks and not self._alive():
            return True
        patience = SECONDS_TO_SAVE if self._signal else 0
        return any(self._loop.time() >= rank.ended_at + patience for rank in self._failed)

    async def _end_ranks(self) -> None:
        if self._verdict is None:
            # Without mpiexec the monitors end their scripts by themselves, and say so.
            patience = SECONDS_TO_SPEAK if self._status is None else SECONDS_TO_OBEY
            await self._until(lambda: not self._alive(), patience)
        self._ending = True
        self._send_all(wire.SIGNAL, signal.SIGTERM)
        if not await self._until(lambda: not self._alive(), SECONDS_TO_OBEY):
            self._send_all(wire.KILL)
            await self._until(lambda: not self._alive(), SECONDS_TO_OBEY)
        for rank in self._ranks.values():
            rank.send(wire.BYE)

    def _alive(self) -> list[_Rank]:
        return [rank for rank in self._ranks.values() if rank.ended_at == math.inf]

    async def _until(self, condition: Callable[[], object], seconds: float) -> bool:
        """Wait until a condition holds; return whether it does."""
        deadline = self._loop.time() + seconds
        while not condition():
            left = deadline - self._loop.time()
            if left <= 0:
                return False
            self._changed.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._changed.wait(), min(left, 1))
        return True

    def _send_all(self, kind: bytes, number: int = 0) -> None:
        for rank in self._alive():
            rank.send(kind, b"%d" % number)

    def _forward(self, number: signal.Signals) -> None:
        """Pass a signal on to the scripts, before anything else: nobody may be there to read of it."""
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            self._verdict = 128 + number, "interrupted twice: the ranks were killed"
            self._send_all(wire.KILL)
            self._changed.set()
            return
        self._send_all(wire.SIGNAL, number)
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            return
        self._signal = number
        if number == signal.SIGHUP:
            patience = SECONDS_TO_HANG_UP + SECONDS_TO_LEAVE
            self._loop.call_later(SECONDS_TO_HANG_UP, self._send_all, wire.SIGNAL, signal.SIGTERM)
        else:
            patience = SECONDS_TO_FINISH
        if number == signal.SIGINT:
            more = "; Ctrl-C again kills them"
        else:
            more = f", and killed after {patience} s"
            self._loop.call_later(patience, self._give_up, number, patience)
        output.say(f"{number.name}: the ranks are asked to end{more}")
        if not self._ranks:
            self._verdict = 128 + number, f"{number.name} came before any rank had started"
            self._changed.set()

    def _give_up(self, number: signal.Signals, patience: float) -> None:
        """Have the ranks killed that a signal has not ended."""
        there = ", ".join(map(str, sorted(rank.number for rank in self._alive())))
        if there and self._verdict is None:
            reason = f"{number.name}: rank {there} had not ended {patience} s later"
            self._verdict = 128 + number, reason
            self._changed.set()

    async def _serve(self, connection: socket.socket) -> None:
        """Listen to a monitor for as long as it speaks."""
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            rank = await asyncio.wait_for(self._meet(reader, writer), SECONDS_TO_SAY_HELLO)
        except Exception:  # noqa: BLE001 - a monitor that has gone, or one too many
            writer.close()
            return
        self._ranks[rank.number] = rank
        self._reception.most -= 1
        if len(self._ranks) == self._n_ranks:
            self._stop_listening()
        if self._ending or self._signal:
            rank.send(wire.SIGNAL, b"%d" % (self._signal or signal.SIGTERM))
        self._changed.set()
        try:
            while True:
                kind, length = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
                self._hear(rank, kind, await reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()
            if rank.ended_at == math.inf:  # somebody killed the monitor, or its host is gone
                if not (self._ending or self._verdict) and rank not in self._failed:
                    self._failed.append(rank)
                self._has_ended(rank)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Rank:
        _, length = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
        hello = json.loads(await reader.readexactly(length))
        wire.notice_lost_host(writer.get_extra_info("socket"))
        number = int(hello["rank"])
        if number in self._ranks or not 0 <= number < self._n_ranks:
            raise ValueError(f"there is no other rank {number}")
        return _Rank(number, str(hello["host"]), writer, prefix=self._prefix)

    def _hear(self, rank: _Rank, kind: bytes, content: bytes) -> None:
        if kind in (wire.OUT, wire.ERR):
            rank.print(kind, content)
            rank.unpaid += len(content)
            self._pay(rank)
        elif kind == wire.FAILED:
            end = json.loads(content)
            rank.status, rank.cause = end["status"], end["cause"]
            if not (self._ending or self._verdict) and rank not in self._failed:
                self._failed.append(rank)  # the others will end because of it
        elif kind == wire.PROGRESS:
            try:
                self._progress = max(int(content), self._progress or 0)
            except ValueError:
                output.say(
                    f"rank {rank.number} wrote {content!r} as its progress, which is no integer"
                )
        elif kind == wire.WANT:
            self._stdin.ask(self._loop, functools.partial(rank.send, wire.IN))
        elif kind == wire.END:
            rank.status = json.loads(content)["status"]
            self._has_ended(rank)

    def _has_ended(self, rank: _Rank) -> None:
        rank.ended_at = self._loop.time()
        rank.print_rest()
        self._changed.set()

    def _pay(self, rank: _Rank) -> None:
        """Have a rank send more output, unless who reads it is behind."""
        owes = rank.unpaid >= wire.WINDOW // 4 and rank.ended_at == math.inf
        if owes and not output.is_full():
            rank.send(wire.MORE, b"%d" % rank.unpaid)
            rank.unpaid = 0

    def _was_written(self) -> None:
        for rank in self._ranks.values():
            self._pay(rank)
        if output.has_no_reader() and self._verdict is None:
            self._verdict = 128 + signal.SIGPIPE, "nobody reads the output any more"
            self._changed.set()

    def _outcome(self) -> Outcome:
        ranks = self._ranks.values()
        bad = [rank for rank in ranks if rank.status != 0]
        final = False
        if self._verdict:
            status, reason = self._verdict
            final = status != 1
        elif self._failed:
            if self._failed[0].exit_status() is None:
                self._show_mpiexec()  # the monitor's own last words came this way
            status, reason = self._failed[0].exit_status() or 1, self._failed[0].why()
        elif self._status or bad or len(ranks) < self._n_ranks:
            self._show_mpiexec()
            status = self._status or (bad[0].exit_status() if bad else 0) or 1
            reason = f"mpiexec ended the job with status {status}"
            if status < 0:
                status = 128 - status
                reason = f"mpiexec was killed by {_name(status - 128)}"
            # Of who calls MPI_Abort, mpiexec has the status and, in MPICH, the rank itself says that it was.
            aborted = [rank for rank in bad if status in rank.words.aborts]
            left = [str(rank.number) for rank in ranks if rank.status == 0]
            if aborted:
                rank = aborted[0]
                reason = f"rank {rank.number} on {rank.host} failed first: exit status {status}"
            elif not ranks:
                reason += " before any rank had started"
            elif left:
                reason += f" after rank {', '.join(left)} had left with status 0"
        else:
            self._show_mpiexec()
            status, reason, final = 0, "", True
        if self._signal and not self._verdict:
            reason = f"ended after {self._signal.name}" + (f"; {reason}" if reason else "")
            final = True
        return Outcome(status, reason, final, self._progress)


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of those for real time most have none
        return f"signal {number}"


class _Rank:
    """What the launcher knows of a rank."""

    def __init__(
        self,
        number: int,
        host: str,
        writer: asyncio.StreamWriter,
        *,
        prefix: bool,
    ) -> None:
        self.number = number
        self.host = host
        self.writer = writer
        self.ended_at = math.inf
        self.status: int | None = None  # None if it is not known
        self.cause: dict[str, Any] = {}  # what the script has told of its end
        self.words = output.LastWords()
        self.unpaid = 0  # bytes of output that came, and no more was asked for
        self._prefix = b"[%d] " % number if prefix else b""
        self._lines = {
            wire.OUT: output.Lines(lambda line: self._take(wire.OUT, line)),
            wire.ERR: output.Lines(lambda line: self._take(wire.ERR, line)),
        }

    def send(self, kind: bytes, content: bytes = b"") -> None:
        if not self.writer.is_closing():
            self.writer.write(wire.message(kind, content))

    def print(self, kind: bytes, content: bytes) -> None:
        if not self._prefix:
            output.write(kind, content)
        self._lines[kind].add(content)

    def print_rest(self) -> None:
        for lines in self._lines.values():
            lines.end()

    def _take(self, kind: bytes, line: bytes) -> None:
        if kind == wire.ERR:
            self.words.add(line)
        if self._prefix:
            output.write(kind, self._prefix + line)

    def exit_status(self) -> int | None:
        """Return the status as a shell has it, None if it is not known."""
        status = self.cause.get("status", self.status)  # MPI_Abort itself ends with other ones
        return status if status is None or status >= 0 else 128 - status

    def why(self) -> str:
        who = f"rank {self.number} on {self.host}"
        if self.cause.get("stall"):
            return f"{who} ended the job: {self.cause['stall']}"
        if self.exit_status() is None:
            return f"the connection to {who} broke"
        if not self.cause and self.status is not None and self.status < 0:
            name = _name(-self.status)
            return f"{who} failed first: killed by {name}{_HINTS.get(name, '')}"
        status = f"exit status {self.exit_status()}"
        exception = self.cause.get("exception", "") if self.cause else self.words.exception
        return f"{who} failed first: {f'{exception} ({status})' if exception else status}"


def addresses(hosts: Sequence[Host], given: str | None = None) -> list[str]:
    """Return at which addresses ranks on these hosts may reach this host. Local.

    Args:
        hosts: Where ranks run; none is this host only.
        given: What the user says.

    Raises:
        LaunchError: If there is none.
    """
    if given:
        return [given]
    others = [host.name for host in hosts if not mpi.is_here(host.name)]
    if not others:
        return [LOOPBACK]
    ways = map(own_address, (*others[:9], socket.gethostname(), SOMEWHERE))
    found = [each for each in dict.fromkeys(ways) if each and not is_loopback(each)]
    if not found:
        raise LaunchError(
            f"no address of this host is known that {others[0]} could reach it at; "
            "name one: chainer-dist run --address NAME"
        )
    return found


def _allow_open_files(n: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < n:
        most = n if hard == resource.RLIM_INFINITY else min(n, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

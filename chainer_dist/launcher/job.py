"""One job: ``mpiexec``, the monitors of its ranks, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import signal
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from chainer_dist import _environment
from chainer_dist.launcher import output, processes, ssh, wire
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.monitors import MORE_FILES, Monitors
from chainer_dist.launcher.ranks import name_of_signal

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from chainer_dist.launcher.printing import Format
    from chainer_dist.launcher.ranks import Rank
    from chainer_dist.launcher.stdin import Input

__all__ = ["TIMED_OUT", "Job", "Outcome"]

TIMED_OUT = 124  # as timeout(1) has it
SECONDS_TO_START = 300
SECONDS_TO_SPEAK = 0.5  # for the other ranks, after the first has failed
SECONDS_TO_SAVE = 10  # the same, where the ranks were asked to end by a signal from outside
SECONDS_TO_HANG_UP = 10  # from SIGHUP, which libraries of MPI catch, to SIGTERM
SECONDS_TO_LEAVE = 30  # from that to SIGKILL
SECONDS_TO_FINISH = 300  # from a SIGTERM from outside to SIGKILL: a checkpoint may take long
SECONDS_TO_DUMP = 1  # where a rank hangs, on SIGABRT
SECONDS_BETWEEN_LOOKS = 1  # for other hosts
SECONDS_TO_OBEY = 5  # from SIGTERM to SIGKILL, and from that to giving up
N_LINES = 200  # that are kept of what mpiexec says
SECONDS_TO_REACH = 5  # a host, after ssh has said that it cannot: there may be other ways


class Outcome(NamedTuple):
    """How a job ended.

    Attributes:
        status: Exit status: 0, that of the first rank that failed, 128 and the number of the signal
            that killed it, or 124 for the time limit.
        reason: Which rank failed first and why, or what else ended the job; "" if nothing did.
        final: Whether starting again is pointless: it ended well, in time, or by the user's wish.
        progress: The largest number that ranks have written as their progress, or None.
        was_moved: Whether the ranks were asked to end because other hosts are to be used.
    """

    status: int
    reason: str
    final: bool
    progress: int | None
    was_moved: bool = False


class Job:
    """A job that is started once.

    More than ten attributes: a third is how it was asked for, a third how it stands, a third its event loop's.

    Args:
        command: ``mpiexec`` and its arguments, and what each rank is to run, a monitor.
        environ: Environment of ``mpiexec``.
        n_ranks: How many monitors are expected.
        hosts_from: What names the hosts of the ranks, in words.
        reach: Addresses of this host that the hosts of the ranks can reach.
        stdin: Standard input of rank 0.
        how: Format of the output of the ranks.
        seconds: Time limit.
        change: Function that is called now and then in another thread. It returns why other hosts are needed, or "".
    """

    def __init__(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        n_ranks: int,
        *,
        hosts_from: str,
        reach: Sequence[str],
        stdin: Input,
        how: Format,
        seconds: float = math.inf,
        change: Callable[[], str] | None = None,
    ) -> None:
        self._command = command
        self._environ = environ
        self._n_ranks = n_ranks
        self._hosts_from = hosts_from
        self._reach = reach
        self._stdin = stdin
        self._how = how
        self._seconds = seconds
        self._change = change
        self._was_moved = False
        self._verdict: tuple[int, str] | None = None  # the launcher's own reason to end the job
        self._signal: signal.Signals | None = None  # that the ranks were asked to end with
        self._status: int | None = None  # of mpiexec
        self._said: deque[bytes] = deque(maxlen=N_LINES)  # by mpiexec

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
        processes.allow_open_files(self._n_ranks + MORE_FILES)
        self._monitors = Monitors(self._n_ranks, self._stdin, self._how, self._changed)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, wire.FORWARDED)
        output.listen(functools.partial(self._loop.call_soon_threadsafe, self._was_written))
        where = self._monitors.listen(self._reach)
        mpiexec = await self._start({**self._environ, _environment.LAUNCHER: where})
        listening = self._loop.create_task(self._listen_to(mpiexec))
        looking = self._loop.create_task(self._look_for_change())
        try:
            await self._supervise()
            await self._end_ranks()
            if not await self._until(lambda: self._status is not None, SECONDS_TO_OBEY):
                mpiexec.kill()
                await self._until(lambda: self._status is not None, SECONDS_TO_OBEY)
        finally:
            output.listen(None)
            signal.pthread_sigmask(signal.SIG_BLOCK, wire.FORWARDED)
            listening.cancel()
            looking.cancel()
            await self._monitors.close()
        return self._outcome()

    async def _start(self, environ: Mapping[str, str]) -> asyncio.subprocess.Process:
        # What a terminal or a scheduler sends to all processes must not end mpiexec before the ranks
        # have printed their last lines. In a session of its own it could not ask for ssh's passwords.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, wire.FORWARDED)
        try:
            return await asyncio.create_subprocess_exec(
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
        waits = not self._monitors.are_all_there and not self._monitors.failed
        if waits and not output.is_full():
            self._show_mpiexec()  # it may be asking for something, or say why there are no ranks
        words = ssh.last_words(line)
        if words:
            self._loop.call_later(SECONDS_TO_REACH, self._give_up_a_host, words)

    def _give_up_a_host(self, words: str) -> None:
        """End the job if ranks are still missing, where ssh has said that it cannot reach a host."""
        if not (self._monitors.are_all_there or self._monitors.failed):
            self._judge(1, f"a host of {self._hosts_from} cannot be reached: {words}")

    def _show_mpiexec(self) -> None:
        while self._said:
            output.write(wire.ERR, b"[mpiexec] " + self._said.popleft())

    async def _supervise(self) -> None:
        """Wait for the job's end, or for a reason to end it."""
        limit = self._loop.time() + self._seconds
        all_there = await self._until(
            lambda: self._monitors.are_all_there or self._is_over(),
            min(SECONDS_TO_START, self._seconds),
        )
        if not all_there and self._seconds > SECONDS_TO_START:
            missing = [rank for rank in range(self._n_ranks) if rank not in self._monitors.ranks]
            reason = f"{len(missing)} of {self._n_ranks} ranks, of which the first is {missing[0]},"
            self._judge(1, f"{reason} have not started within {SECONDS_TO_START} s")
        elif not await self._until(self._is_over, limit - self._loop.time()):
            there = sorted(rank.number for rank in self._monitors.alive())
            who = f"rank {', '.join(map(str, there))}" if there else "mpiexec"
            self._judge(TIMED_OUT, f"the time limit is reached; {who} had not ended")
            # faulthandler says where they are
            self._monitors.send_all(wire.SIGNAL, signal.SIGABRT)
            await self._until(lambda: not self._monitors.alive(), SECONDS_TO_DUMP)

    def _judge(self, status: int, reason: str) -> None:
        """End the job for a reason of the launcher's own, unless there is one."""
        if self._verdict is None:
            self._verdict = status, reason
            self._monitors.blames = False
            self._changed.set()

    def _is_over(self) -> bool:
        if self._verdict or self._status is not None:
            return True
        if self._monitors.are_all_there and not self._monitors.alive():
            return True
        patience = SECONDS_TO_SAVE if self._signal or self._was_moved else 0
        return any(self._loop.time() >= rank.ended_at + patience for rank in self._monitors.failed)

    async def _end_ranks(self) -> None:
        monitors = self._monitors
        if self._verdict is None:
            # Without mpiexec the monitors end their scripts by themselves, and say so.
            patience = SECONDS_TO_SPEAK if self._status is None else SECONDS_TO_OBEY
            await self._until(lambda: not monitors.alive(), patience)
        monitors.blames = False
        monitors.parting = monitors.parting or signal.SIGTERM
        monitors.send_all(wire.SIGNAL, signal.SIGTERM)
        if not await self._until(lambda: not monitors.alive(), SECONDS_TO_OBEY):
            monitors.send_all(wire.KILL)
            await self._until(lambda: not monitors.alive(), SECONDS_TO_OBEY)
        for rank in monitors.ranks.values():
            rank.send(wire.BYE)

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

    def _forward(self, number: signal.Signals) -> None:
        """Pass a signal on to the scripts first, and print after that: the output may have no reader."""
        if number == signal.SIGINT and self._signal is signal.SIGINT:
            self._judge(128 + number, "interrupted twice: the ranks were killed")
            self._monitors.send_all(wire.KILL)
            return
        self._monitors.send_all(wire.SIGNAL, number)
        if number in (signal.SIGUSR1, signal.SIGUSR2):
            return
        self._signal = self._monitors.parting = number
        if number == signal.SIGHUP:
            patience = SECONDS_TO_HANG_UP + SECONDS_TO_LEAVE
            self._loop.call_later(
                SECONDS_TO_HANG_UP, self._monitors.send_all, wire.SIGNAL, signal.SIGTERM
            )
        else:
            patience = SECONDS_TO_FINISH
        if number == signal.SIGINT:
            more = "; Ctrl-C again kills them"
        else:
            more = f", and killed after {patience} s"
            self._loop.call_later(patience, self._give_up, number, patience)
        output.say(f"{number.name}: the ranks are asked to end{more}")
        if not self._monitors.ranks:
            self._judge(128 + number, f"{number.name} came before any rank had started")

    async def _look_for_change(self) -> None:
        """Ask the ranks to save and to end once other hosts are to be used."""
        while self._change is not None and not self._was_moved:
            await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
            change = await self._loop.run_in_executor(None, self._change)
            if change and self._monitors.are_all_there and not (self._signal or self._is_over()):
                output.say(f"{change}: the ranks are asked to save and to end")
                self._was_moved = True
                self._monitors.parting = signal.SIGTERM
                self._monitors.send_all(wire.SIGNAL, signal.SIGTERM)
                self._loop.call_later(
                    SECONDS_TO_FINISH, self._give_up, signal.SIGTERM, SECONDS_TO_FINISH
                )

    def _give_up(self, number: signal.Signals, patience: float) -> None:
        """Have the ranks killed that a signal has not ended."""
        there = ", ".join(map(str, sorted(rank.number for rank in self._monitors.alive())))
        if there:
            self._judge(
                128 + number, f"{number.name}: rank {there} had not ended {patience} s later"
            )

    def _was_written(self) -> None:
        self._monitors.pay_all()
        if output.has_no_reader():
            self._judge(128 + signal.SIGPIPE, "the output has no reader any more")

    def _outcome(self) -> Outcome:
        monitors = self._monitors
        bad = [rank for rank in monitors.ranks.values() if rank.status != 0]
        final = False
        if self._verdict:
            status, reason = self._verdict
            final = status != 1
        elif monitors.failed:
            first = monitors.failed[0]
            if first.exit_status() is None:
                self._show_mpiexec()  # the monitor's own last words came this way
            if not self._was_moved:
                first.printer.show_last_words()
            status, reason = first.exit_status() or 1, first.why()
        elif self._status or bad or not monitors.are_all_there:
            self._show_mpiexec()
            status, reason = self._end_of_mpiexec(bad)
        else:
            self._show_mpiexec()
            status, reason, final = 0, "", True
            self._monitors.say_if_alone()
        if self._signal and not self._verdict:
            reason = f"ended after {self._signal.name}" + (f"; {reason}" if reason else "")
            final = True
        if self._was_moved and not final:  # a script that saves nothing ends by the signal
            return Outcome(status, "", final, monitors.progress, was_moved=True)
        return Outcome(status, reason, final, monitors.progress)

    def _end_of_mpiexec(self, bad: Sequence[Rank]) -> tuple[int, str]:
        """Return the status and the reason of a job that mpiexec has ended."""
        ranks = self._monitors.ranks.values()
        status = self._status or (bad[0].exit_status() if bad else 0) or 1
        reason = f"mpiexec ended the job with status {status}"
        if status < 0:
            status = 128 - status
            reason = f"mpiexec was killed by {name_of_signal(status - 128)}"
        # mpiexec has the status of a rank that calls MPI_Abort; in MPICH that rank itself says that it did.
        aborted = [rank for rank in bad if status in rank.printer.words.aborts]
        left = [str(rank.number) for rank in ranks if rank.status == 0]
        if aborted:
            rank = aborted[0]
            return status, f"rank {rank.number} on {rank.host} failed first: exit status {status}"
        if not ranks:
            reason += " before any rank had started"
        elif left:
            reason += f" after rank {', '.join(left)} had left with status 0"
        return status, reason

"""A rank's monitor: starts the user's script, passes on what it prints, and ends it when it must end."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

from chainer_dist.launcher import processes, wire

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["SECONDS_TO_LEAVE", "Monitor", "exit_status"]

SECONDS_TO_CONNECT = 10
SECONDS_TO_LEAVE = 1.0  # by itself, after what it depends on has ended
SECONDS_TO_OBEY = 2.0  # from being asked to end to being killed
SECONDS_BETWEEN_LOOKS = 0.5  # at the file of progress


class Monitor:
    """Watches one script.

    More than fifteen methods and ten attributes: its event loop has a method for each kind of event, and what is known of the
    script's input, output, progress and end.

    Args:
        launcher: Connection to the launcher.
        parent: Connection to the process that mpiexec knows.
        progress: File that the script may write its progress to.
        cause: File in which the script may say why it ends.
        notes: File in which it may note what it has to do with other ranks, without its process's number.
        has_input: Whether the script gets the launcher's standard input.
    """

    def __init__(
        self,
        launcher: socket.socket,
        parent: socket.socket,
        progress: Path,
        cause: Path,
        notes: Path,
        *,
        has_input: bool,
    ) -> None:
        self._launcher = launcher
        self._parent = parent
        self._progress = progress
        self._cause = cause
        self._notes = notes
        self._received = b""
        self._selector = selectors.DefaultSelector()
        self._has_input = has_input
        self._input = b""  # that the script has not taken yet
        self._stdin: Any = None
        self._pipes: dict[
            Any, bytes
        ] = {}  # of the script's output that are still open, and their kinds
        self._window = wire.WINDOW  # bytes of output that may be sent
        self._pid = 0
        self._due: list[tuple[float, signal.Signals]] = []  # when the script gets which signal
        self._asked = False  # whether it got one
        self._alone = False  # whether no process waits for this monitor any more
        self._reported = b""  # of its progress
        self._noted = b""

    def run(self, command: Sequence[str], cpus: Sequence[int] | None) -> int:
        """Run a command, and return when it has ended and the launcher knows. Local.

        Args:
            command: Program and arguments.
            cpus: Hardware threads to which it is bound; None to leave it free.

        Returns:
            Its exit status; 128 plus the number of the signal if it was killed.
        """
        script = self._start(command, cpus)
        while script.poll() is None:
            self._look(SECONDS_BETWEEN_LOOKS)
            processes.bury_orphans(self._pid)
            self._tell_progress()
            self._tell_notes()
            self._send_due_signals()
        status = script.returncode
        cause = self._read_cause()
        if not self._asked and (cause or (status and not self._alone)):
            # At once, before others end because of it.
            self._tell(wire.FAILED, json.dumps({"status": status, "cause": cause}).encode())
        self._clean_up()
        self._tell_progress()
        self._tell_notes()
        self._tell(wire.END, json.dumps({"status": status}).encode())
        while status and not self._alone:
            # When one rank leaves with an error mpiexec kills the others. The launcher comes first.
            self._look(None)
        self._hang_up()
        return exit_status(status)

    def kill(self) -> None:
        """Kill the script and all that it started. Local."""
        if self._pid:
            self._signal_all(signal.SIGKILL)

    def _start(self, command: Sequence[str], cpus: Sequence[int] | None) -> subprocess.Popen[bytes]:
        ended, wake_up = socket.socketpair()
        wake_up.setblocking(False)  # noqa: FBT003 - positional only
        signal.set_wakeup_fd(wake_up.detach(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # the loop looks at the script then
        if cpus is not None:
            own = os.sched_getaffinity(0)
            os.sched_setaffinity(0, cpus)
        script = subprocess.Popen(  # noqa: S603 - this Python
            command,
            bufsize=0,
            stdin=subprocess.PIPE if self._has_input else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            close_fds=False,  # MPI has handed it some
            start_new_session=True,
            preexec_fn=processes.ended_with_parent(),  # noqa: PLW1509 - there are no threads here
        )
        if cpus is not None:
            os.sched_setaffinity(0, own)
        self._pid = script.pid
        self._parent.sendall(b"%d" % script.pid)
        self._listen(ended, lambda: ended.recv(wire.CHUNK))
        self._listen(self._launcher, self._receive)
        self._listen(self._parent, self._parent_is_gone)
        for pipe, kind in ((script.stdout, wire.OUT), (script.stderr, wire.ERR)):
            self._pipes[pipe] = kind
            self._listen(pipe, functools.partial(self._pass_on, pipe))
        if script.stdin:
            self._stdin = script.stdin
            os.set_blocking(self._stdin.fileno(), False)
            self._tell(wire.WANT, b"")
        return script

    def _listen(self, file: Any, react: Any) -> None:
        self._selector.register(file, selectors.EVENT_READ, react)

    def _look(self, seconds: float | None) -> None:
        """React to what has happened, or happens within some seconds."""
        for key, _ in self._selector.select(seconds):
            key.data()

    def _pass_on(self, pipe: Any) -> None:
        """Send what the script has printed, as much as the launcher wants; the script waits for it."""
        if self._window <= 0:
            return
        output = os.read(pipe.fileno(), min(wire.CHUNK, self._window))
        if output:
            self._tell(self._pipes[pipe], output)
            self._window -= len(output)
            if self._window <= 0:
                for each in self._pipes:
                    self._selector.unregister(each)
        else:
            self._selector.unregister(pipe)
            del self._pipes[pipe]

    def _pass_on_rest(self) -> None:
        """Send what is left in the pipes after the end of all processes that could write to them."""
        for pipe, kind in self._pipes.items():
            os.set_blocking(pipe.fileno(), False)
            with contextlib.suppress(BlockingIOError):  # another process has it open
                while output := os.read(pipe.fileno(), wire.CHUNK):
                    self._tell(kind, output)

    def _read_cause(self) -> dict[str, Any]:
        """Return what the script itself, not a child, has reported of its end; or nothing."""
        try:
            with self._cause.open("rb") as file:
                cause = json.loads(file.read(wire.CHUNK))
            if cause["pid"] == self._pid and isinstance(cause["status"], int):
                return dict(cause)
        except (OSError, ValueError, TypeError, KeyError):  # mostly there is none
            pass
        return {}

    def _feed(self) -> None:
        """Write to the script's standard input, and ask for more when all is written."""
        try:
            self._input = self._input[os.write(self._stdin.fileno(), self._input) :]
        except BrokenPipeError:  # the script wants no more
            self._selector.unregister(self._stdin)
            self._stdin.close()
            return
        if not self._input:
            self._selector.unregister(self._stdin)
            self._tell(wire.WANT, b"")

    def _tell(self, kind: bytes, content: bytes) -> None:
        try:
            self._launcher.sendall(wire.message(kind, content))
        except OSError:
            self._launcher_is_gone()

    def _tell_progress(self) -> None:
        try:
            progress = self._progress.read_bytes().strip()
        except OSError:
            return  # nothing has been written yet
        if progress != self._reported:
            self._reported = progress
            self._tell(wire.PROGRESS, progress[:100])

    def _tell_notes(self) -> None:
        try:
            noted = self._notes.with_name(f"{self._notes.name}.{self._pid}").read_bytes()
            if noted == self._noted:
                return
            json.loads(noted)
        except (OSError, ValueError):  # there are none, or they are being written
            return
        self._noted = noted
        self._tell(wire.NOTES, noted)

    def _receive(self) -> None:
        try:
            received = self._launcher.recv(wire.CHUNK)
        except OSError:
            received = b""
        if not received:
            self._launcher_is_gone()
        self._received += received
        messages, self._received = wire.split(self._received)
        for kind, content in messages:
            self._obey(kind, content)

    def _obey(self, kind: bytes, content: bytes) -> None:
        if kind == wire.SIGNAL:
            self._signal(signal.Signals(int(content)))
        elif kind == wire.KILL:
            self._asked = True
            self.kill()
        elif kind == wire.IN and content:
            self._input = content
            self._selector.register(self._stdin, selectors.EVENT_WRITE, self._feed)
        elif kind == wire.IN:
            self._stdin.close()
        elif kind == wire.MORE:
            if self._window <= 0:
                for pipe in self._pipes:
                    self._listen(pipe, functools.partial(self._pass_on, pipe))
            self._window += int(content)
        elif kind == wire.BYE:
            self._alone = True

    def _hang_up(self) -> None:
        """Close the connection so that all that was sent arrives: not while there is something to receive."""
        with contextlib.suppress(OSError):
            self._launcher.shutdown(socket.SHUT_WR)
            self._launcher.settimeout(SECONDS_TO_CONNECT)
            while self._launcher.recv(wire.CHUNK):
                pass

    def _launcher_is_gone(self) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(self._launcher)
        self._alone = True
        self._end_in(0)

    def _parent_is_gone(self) -> None:
        # mpiexec has killed it: because a rank has aborted, perhaps this one, which is leaving by itself.
        self._selector.unregister(self._parent)
        self._alone = True
        self._end_in(SECONDS_TO_LEAVE)

    def _end_in(self, seconds: float) -> None:
        asked = time.monotonic() + seconds
        self._due = [(asked, signal.SIGTERM), (asked + SECONDS_TO_OBEY, signal.SIGKILL)]

    def _send_due_signals(self) -> None:
        now = time.monotonic()
        for when, number in list(self._due):
            if when <= now:
                self._asked = True
                self._due.remove((when, number))
                self._signal(number)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, number)

    def _signal_all(self, number: int) -> bool:
        """Send a signal to the script and all it started; return whether there is any of them."""
        found = processes.signal_descendants(number)
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # macOS: only zombies are left
            os.killpg(self._pid, number)
            found = True
        return found

    def _clean_up(self) -> None:
        """Wait for what the ended script has started, not for long, and for the end of its output."""
        deadline = time.monotonic() + SECONDS_TO_LEAVE
        while self._signal_all(0) and time.monotonic() < deadline:
            self._look(0.05)
            processes.bury_orphans(self._pid)
        self._signal_all(signal.SIGKILL)
        processes.kill_descendants(SECONDS_TO_LEAVE)
        self._pass_on_rest()


def exit_status(status: int) -> int:
    """Return a status as a shell has it. Local."""
    return 128 - status if status < 0 else status

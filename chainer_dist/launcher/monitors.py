"""The launcher's end of the connections to the monitors of all ranks."""

from __future__ import annotations

import asyncio
import functools
import json
import math
import secrets
from typing import TYPE_CHECKING

from chainer_dist._connections import Reception, is_loopback, own_address
from chainer_dist.launcher import output, wire
from chainer_dist.launcher.addresses import SOMEWHERE
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.printing import Format, Printer
from chainer_dist.launcher.ranks import Rank

if TYPE_CHECKING:
    import signal
    import socket
    from collections.abc import Sequence

    from chainer_dist.launcher.stdin import Input

__all__ = ["MORE_FILES", "Monitors"]

SECONDS_TO_SAY_HELLO = 10
MORE_FILES = 100  # that may be open, beside a connection to each rank
MOST_STRANGERS = 50  # connections of them
_ALONE = (
    "{} independent copies of the script have run: no rank made a communicator. chainer-dist run --distribute makes them "
    "one training; so do two lines of the script: comm = chainer_dist.create_communicator() and "
    "optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)"
)


class Monitors:
    """Listens to the monitors of a job: which ranks run, what they print, and which has failed first.

    More than ten attributes: a third is how the job was asked for, and the others how it stands.

    Args:
        n_ranks: Number of monitors that are expected.
        stdin: Standard input of rank 0.
        how: Format of the output of the ranks.
        changed: Event that is set whenever something has happened that a job may wait for.

    Attributes:
        ranks: Ranks whose monitor has connected, by number.
        failed: Ranks that failed by themselves, in the order in which they failed.
        progress: The largest number that ranks have written as their progress, or None.
        parting: The signal with which the ranks are asked to end, late ones too; None until then.
        blames: Whether a rank that fails does so by itself: not once the launcher ends the ranks.
    """

    def __init__(self, n_ranks: int, stdin: Input, how: Format, changed: asyncio.Event) -> None:
        self.ranks: dict[int, Rank] = {}
        self.failed: list[Rank] = []
        self.progress: int | None = None
        self.parting: signal.Signals | None = None
        self.blames = True
        self._n_ranks = n_ranks
        self._stdin = stdin
        self._how = how
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._secret = secrets.token_bytes(32)
        self._talks: set[asyncio.Task[None]] = set()  # keeps them alive, too
        self._listens = True
        self._writers: dict[
            tuple[str, str], int
        ] = {}  # by host and path: the first rank to write there
        self._has_warned = False
        self._reception = Reception(
            self._secret, most=n_ranks + MOST_STRANGERS, seconds=SECONDS_TO_SAY_HELLO
        )

    @property
    def are_all_there(self) -> bool:
        """Whether every rank has said hello."""
        return len(self.ranks) == self._n_ranks

    def alive(self) -> list[Rank]:
        """Return the ranks that have not ended."""
        return [rank for rank in self.ranks.values() if rank.ended_at == math.inf]

    def send_all(self, kind: bytes, number: int = 0) -> None:
        """Send a message with a number to all ranks that have not ended."""
        for rank in self.alive():
            rank.send(kind, b"%d" % number)

    def say_if_alone(self) -> None:
        """Print a warning if there were several ranks, and no rank made a communicator."""
        if self._n_ranks > 1 and all(rank.alone for rank in self.ranks.values()):
            output.say(_ALONE.format(self._n_ranks))

    def listen(self, reach: Sequence[str]) -> str:
        """Listen where the ranks can reach this host, nowhere else.

        Args:
            reach: Addresses of this host that the hosts of the ranks can reach.

        Returns:
            Text for the environment of monitors: the secret of the job, and the addresses to connect to.

        Raises:
            LaunchError: If this host has no such address.
        """
        places = []
        for each in reach:
            own = own_address(each)  # itself, unless it is translated on the way
            if not own or (is_loopback(own) and not is_loopback(each) and each != "localhost"):
                # A name of this host that stands for another address elsewhere.
                own = own_address(SOMEWHERE)
            try:
                places.append(f"{each}/{self._reception.listen(own, self._n_ranks + MORE_FILES)}")
            except OSError as error:
                self._reception.close()
                raise LaunchError(
                    f"ranks cannot connect to {each}: {error}; name an address at which other hosts reach "
                    "this one: chainer-dist run --address NAME"
                ) from None
        self._loop.add_reader(self._reception, self._admit)
        self._expire()
        return ",".join([self._secret.hex(), *places])

    async def close(self) -> None:
        """Listen no more, and end all conversations. Raises what went wrong in them."""
        self._stop_listening()
        for talk in self._talks:
            talk.cancel()
        for error in await asyncio.gather(*self._talks, return_exceptions=True):
            if isinstance(error, Exception):
                raise error

    def pay_all(self) -> None:
        """Let the ranks send more output, unless its reader is behind."""
        for rank in self.ranks.values():
            self._pay(rank)

    def _admit(self) -> None:
        """Begin conversations with connections that have proven to be monitors."""
        for connection, _ in self._reception.admit():
            self._talks.add(self._loop.create_task(self._serve(connection)))

    def _expire(self) -> None:
        """See to it that no connection stays without having said anything."""
        if self._listens:
            self._admit()
            self._loop.call_later(1, self._expire)

    def _stop_listening(self) -> None:
        if self._listens:
            self._listens = False
            self._loop.remove_reader(self._reception)
            self._reception.close()

    async def _serve(self, connection: socket.socket) -> None:
        """Listen to a monitor for as long as it speaks."""
        reader, writer = await asyncio.open_connection(sock=connection)
        try:
            rank = await asyncio.wait_for(self._greet(reader, writer), SECONDS_TO_SAY_HELLO)
        except Exception:  # noqa: BLE001 - a monitor that has gone, or one too many
            writer.close()
            return
        self.ranks[rank.number] = rank
        self._reception.most -= 1
        if self.are_all_there:
            self._stop_listening()
        if self.parting:
            rank.send(wire.SIGNAL, b"%d" % self.parting)
        self._changed.set()
        try:
            while True:
                kind, length = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
                self._hear(rank, kind, await reader.readexactly(length))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            writer.close()
            if rank.ended_at == math.inf:  # its monitor was killed, or its host is gone
                self._blame(rank)
                self._has_ended(rank)

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Rank:
        _, length = wire.HEADER.unpack(await reader.readexactly(wire.HEADER.size))
        hello = json.loads(await reader.readexactly(length))
        wire.notice_lost_host(writer.get_extra_info("socket"))
        number = int(hello["rank"])
        if number in self.ranks or not 0 <= number < self._n_ranks:
            raise ValueError(f"there is no other rank {number}")
        printer = Printer(number, self._how, self._loop.call_later)
        return Rank(number, str(hello["host"]), writer, printer)

    def _hear(self, rank: Rank, kind: bytes, content: bytes) -> None:
        if kind in (wire.OUT, wire.ERR):
            rank.printer.add(kind, content)
            rank.unpaid += len(content)
            self._pay(rank)
        elif kind == wire.FAILED:
            end = json.loads(content)
            rank.status, rank.cause = end["status"], end["cause"]
            self._blame(rank)  # the others will end because of it
        elif kind == wire.PROGRESS:
            try:
                self.progress = max(int(content), self.progress or 0)
            except ValueError:
                output.say(
                    f"rank {rank.number} wrote {content!r} as its progress, which is no integer"
                )
        elif kind == wire.NOTES:
            notes = json.loads(content)
            rank.alone = bool(notes["alone"])
            self._compare_files(rank, notes["files"])
        elif kind == wire.WANT:
            self._stdin.ask(self._loop, functools.partial(rank.send, wire.IN))
        elif kind == wire.END:
            rank.status = json.loads(content)["status"]
            self._has_ended(rank)

    def _compare_files(self, rank: Rank, files: Sequence[str]) -> None:
        """Warn once where two ranks write to one file."""
        for file in files:
            other = self._writers.setdefault((rank.host, file), rank.number)
            if other != rank.number and not self._has_warned:
                self._has_warned = True
                first, second = sorted([other, rank.number])
                output.say(
                    f"warning: rank {first} and rank {second} both write {file}; let rank 0 alone report: "
                    "chainer_dist.on_rank_zero(trainer, comm)"
                )

    def _blame(self, rank: Rank) -> None:
        if self.blames and rank not in self.failed:
            self.failed.append(rank)

    def _has_ended(self, rank: Rank) -> None:
        rank.ended_at = self._loop.time()
        rank.printer.end()
        self._changed.set()

    def _pay(self, rank: Rank) -> None:
        owes = rank.unpaid >= wire.WINDOW // 4 and rank.ended_at == math.inf
        if owes and not output.is_full():
            rank.send(wire.MORE, b"%d" % rank.unpaid)
            rank.unpaid = 0

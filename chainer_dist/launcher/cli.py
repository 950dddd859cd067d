"""The command line of ``chainer-dist``."""

from __future__ import annotations

import contextlib
import difflib
import functools
import math
import os
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from chainer_dist import _environment
from chainer_dist.launcher import output, wire
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.options import Parser, distribution, divide, make_parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from chainer_dist.launcher.hostfiles import Host
    from chainer_dist.launcher.job import Outcome
    from chainer_dist.launcher.mpi import Mpi

__all__ = ["main"]

SECONDS_TO_BE_READ = 2.0  # for the last lines, where the user or a time limit has ended the job
HERE = Path(__file__).resolve().parent
_ELF = b"\x7fELF"

_MEASURING = {
    "scale": "measure how training scales over ranks, beside its peers",
    "predict": "replay a step that was measured here on clusters that are not here",
}
_MEASURING_MODULES = {"scale": "cli", "predict": "predict"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says. Local.

    Args:
        arguments: Arguments without the program's name; by default the arguments of this process.

    Returns:
        The exit status: that of the job, 1 if it cannot be started, 2 if the call is wrong.
    """
    output.open_closed_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    others: list[str] = []
    parser, run = make_parser(_MEASURING)
    if words and words[0] not in _ACTIONS and words[0] not in _WITHOUT_ACTION:
        parser.error(f"invalid choice: {words[0]!r}{_what_was_meant(words, parser)}")
    if words[:1] == ["run"]:
        words, others = divide(words, run)
    elif words and words[0] in _MEASURING:  # which have options of their own
        words, others = words[:1], words[1:]
    options, unknown = parser.parse_known_args(words)
    if unknown:
        options.parser.refuse_unknown(unknown)
    options.arguments = others
    try:
        return _ACTIONS[options.action](options)
    except LaunchError as error:
        output.say(str(error))
        output.finish(SECONDS_TO_BE_READ)
        return error.status
    except KeyboardInterrupt:  # beside a job
        return 130


def _what_was_meant(words: Sequence[str], parser: Parser) -> str:
    """Return a hint for a command line that does not begin with an action."""
    action = difflib.get_close_matches(words[0], _ACTIONS, n=1)
    if action:
        return f"; did you mean {parser.prog} {action[0]}?"
    if words[0].startswith("-") or words[0].endswith(".py"):
        return f"; did you mean {parser.prog} run {shlex.join(words)}?"
    return f"; choose from {', '.join(_ACTIONS)}"


def _run(options: argparse.Namespace) -> int:
    from chainer_dist.launcher import mpi

    script = _script(options)
    added = _added_environment(options)
    return _launch(mpi.find(options.mpiexec), script, added, options)


def _launch(
    found: Mpi, script: Sequence[str], added: dict[str, str], options: argparse.Namespace
) -> int:
    """Run ``python`` with these arguments on the ranks, or say how it would be run."""
    from chainer_dist.launcher import mpi, placement, processes, restarts
    from chainer_dist.launcher.addresses import addresses
    from chainer_dist.launcher.job import TIMED_OUT, Job
    from chainer_dist.launcher.printing import Format
    from chainer_dist.launcher.stdin import Input

    discovery = placement.discovery(options)
    n_ranks, hosts = (options.max_ranks or 1, []) if discovery else placement.places(options)
    if options.ssh_port or options.ssh_identity:
        # In this process's own environment: hosts are probed by mpiexec, too.
        os.environ.update(
            mpi.ssh_environment(found, os.environ, options.ssh_port, options.ssh_identity)
        )
    added = {**mpi.environment(found, {**os.environ, **added}), **added}
    monitor = [sys.executable, str(HERE), "rank", *script]
    if options.dry_run:
        command = [*mpi.command(found, n_ranks, hosts, [*added]), *monitor]
        settings = [f"{name}={value}" for name, value in added.items()]
        try:
            sys.stdout.write(shlex.join(["env", *settings, *command]) + "\n")
            sys.stdout.flush()
        except (OSError, AttributeError) as error:  # it is full, or closed
            output.give_up_printing()
            raise LaunchError(f"the command cannot be printed: {error}") from None
        return 0
    if _environment.CALL in os.environ:
        processes.end_with_parent()
    ignored = [each for each in wire.FORWARDED if signal.getsignal(each) is signal.SIG_IGN]
    if ignored:  # by nohup, or by a shell that starts jobs in the background
        added[_environment.IGNORED] = ",".join(str(int(each)) for each in ignored)
    # A job takes them as long as it runs; between two attempts they wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, wire.FORWARDED)
    output.start()
    for words in _environment.misspelt({**os.environ, **added}):
        output.say(f"warning: {words}")
    stdin = Input()
    how = Format(
        prefix=(n_ranks > 1 or discovery is not None) and not options.no_prefix,
        only=options.only_rank,
        folder=_log_folder(options),
        width=len(str(n_ranks - 1)),
    )
    limit = time.monotonic() + options.timeout

    def start(attempt: int, n_ranks: int, hosts: Sequence[Host], seconds: float) -> Outcome:
        environ = {**added, _environment.RESTART: str(attempt)}
        command = [*mpi.command(found, n_ranks, hosts, [*environ, _environment.LAUNCHER]), *monitor]
        if options.verbose:
            output.say(f"{found.family} {found.version}, {found.library}")
            output.say(f"running {shlex.join(command)}")
        return Job(
            command,
            {**os.environ, **environ},
            n_ranks,
            hosts_from=placement.source(options),
            reach=addresses(hosts, options.address),
            stdin=stdin,
            how=how,
            seconds=seconds,
            change=functools.partial(discovery.change, n_ranks, hosts) if discovery else None,
        ).run()

    try:
        outcome = restarts.run(
            start,
            discovery
            or restarts.GivenHosts(n_ranks, hosts, functools.partial(restarts.reachable, found)),
            max_restarts=options.max_restarts,
            seconds=options.timeout,
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # The reader of the output may be slow, and may be waited for as long as the job.
    was_ended = outcome.final and outcome.reason
    patience = SECONDS_TO_BE_READ if was_ended else limit - time.monotonic()
    if output.finish(patience) or was_ended or outcome.status:
        return outcome.status
    output.say("the time limit is reached; not all that the ranks have printed was read")
    output.finish(SECONDS_TO_BE_READ)
    return TIMED_OUT


def _info(options: argparse.Namespace) -> int:
    import json

    from chainer_dist.launcher import mpi

    found = problem = None
    try:
        found = mpi.find(options.mpiexec)
    except LaunchError as error:
        problem = str(error)
    launcher = {"mpi": found._asdict() if found else None, "problem": problem}
    flags = ["--json"] if options.json else []
    report = [str(HERE), "module", "chainer_dist.launcher.report", json.dumps(launcher), *flags]
    if not (options.n_ranks or options.per_host or options.hosts or options.hostfile):
        os.execv(sys.executable, [sys.executable, *report])  # noqa: S606 - under mpiexec this is a rank
    if found is None:
        raise LaunchError(problem)
    return _launch(found, report, {}, options)


def _measure(options: argparse.Namespace) -> NoReturn:
    """Go on in a process that imports Chainer."""
    module = f"chainer_dist.scaling.{_MEASURING_MODULES[options.action]}"
    command = [sys.executable, str(HERE), "module", module, *options.arguments]
    os.execv(sys.executable, command)  # noqa: S606 - this package


def _script(options: argparse.Namespace) -> list[str]:
    """Return what comes after ``python``."""
    import shutil

    script: list[str] = options.arguments
    if script == ["-m"]:
        options.parser.error("-m wants the name of a module")
    if not script:
        options.parser.error("no script is given")
    if script[0] == "-m":
        return script
    path = Path(script[0])
    try:
        if not path.is_file() and not (path / "__main__.py").is_file():
            hint = ""
            if shutil.which(script[0]):
                rest = shlex.join(script[1:] or ["train.py"])
                hint = f"; the launcher calls Python itself: did you mean chainer-dist run {rest}?"
            options.parser.error(f"there is no script {script[0]!r}{hint}")
        with contextlib.suppress(IsADirectoryError), path.open("rb") as file:
            if file.read(4) == _ELF:
                rest = (
                    f"; did you mean chainer-dist run {shlex.join(script[1:])}?"
                    if script[1:]
                    else ""
                )
                options.parser.error(f"{script[0]!r} is a program, and no Python script{rest}")
    except (OSError, ValueError) as error:
        options.parser.error(f"the script {script[0]!r} cannot be read: {error}")
    if script[0].startswith("-"):  # which Python would take for an option
        return [f".{os.sep}{script[0]}", *script[1:]]
    return script


def _added_environment(options: argparse.Namespace) -> dict[str, str]:
    added = {}
    for item in options.env:
        name, equals, value = item.partition("=")
        if not name or (not equals and name not in os.environ):
            options.parser.error(
                f"--env {item!r}: {name or 'this'} is not set here; give NAME=VALUE"
            )
        added[name] = value if equals else os.environ[name]
    added.update(distribution(options))
    if options.no_pin:
        added[_environment.PIN] = "0"
    if options.timeline:
        file = _absolute(options, "--timeline", options.timeline)
        if not file.parent.is_dir():
            options.parser.error(f"--timeline {options.timeline}: there is no folder {file.parent}")
        if file.is_dir():
            options.parser.error(f"--timeline {options.timeline}: it is a folder, expected a file")
        added[_environment.TIMELINE] = str(file)
    if options.stall_abort == math.inf:
        options.parser.error("--stall-abort inf: without the option ranks may wait for ever")
    if options.stall_abort:
        added[_environment.STALL_ABORT] = str(options.stall_abort)
    if options.checked:
        added[_environment.CHECKED] = "1"
    return added


def _log_folder(options: argparse.Namespace) -> Path | None:
    """Return the folder of --log-dir, which is made where it is not there."""
    if options.log_dir is None:
        return None
    folder = _absolute(options, "--log-dir", options.log_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        options.parser.error(f"--log-dir {options.log_dir}: {error.strerror}")
    return folder


def _absolute(options: argparse.Namespace, option: str, given: str) -> Path:
    path = Path(given)
    try:
        path = path.absolute()
    except FileNotFoundError:
        options.parser.error(f"{option} {given}: the current folder was removed; go to another one")
    return path


_WITHOUT_ACTION = ("-h", "--help", "--version")
_ACTIONS = {"run": _run, "info": _info, "scale": _measure, "predict": _measure}

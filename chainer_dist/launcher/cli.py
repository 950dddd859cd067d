"""The command line of ``chainer-dist``."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from chainer_dist import _environment
from chainer_dist._arguments import count, positive, seconds, text
from chainer_dist._version import __version__
from chainer_dist.launcher import output, wire
from chainer_dist.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chainer_dist.launcher.hostfiles import Host
    from chainer_dist.launcher.job import Outcome
    from chainer_dist.launcher.mpi import Mpi

__all__ = ["main"]

USAGE_ERROR = 2
SECONDS_TO_BE_READ = 2.0  # for the last words, where somebody or a time limit has ended the job
HERE = Path(__file__).resolve().parent
_ADDRESS = re.compile(r"\w[\w.-]*|[0-9A-Fa-f:.]+(%[\w.-]+)?", re.ASCII)
_ELF = b"\x7fELF"

_MEASURING = {
    "scale": "measure how training scales over ranks, beside its peers",
    "predict": "replay a step that was measured here on clusters that are not here",
}
_MEASURING_MODULES = {"scale": "cli", "predict": "predict"}


class _Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and says what is wrong in one line."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        message = f"{output.one_line(message)}; see {self.prog} --help"
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says. Local.

    Args:
        arguments: Without the program's name; by default those of this process.

    Returns:
        The exit status: that of the job, 1 if it cannot be started, 2 if the call is wrong.
    """
    output.open_closed_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    others: list[str] = []
    parser, run = _parser()
    if words[:1] == ["run"]:
        words, others = _divide(words, run)
    elif words and words[0] in _MEASURING:  # which have options of their own
        words, others = words[:1], words[1:]
    options, unknown = parser.parse_known_args(words)
    if unknown:
        options.wrong(f"unrecognized arguments: {' '.join(unknown)}")
    options.arguments = others
    try:
        return _ACTIONS[options.action](options)
    except LaunchError as error:
        output.say(str(error))
        return 1
    except KeyboardInterrupt:  # beside a job
        return 130


def _divide(words: Sequence[str], run: _Parser) -> tuple[list[str], list[str]]:
    """Divide a command line into the launcher's words, and the script or ``-m MODULE`` with its own.

    argparse would look for options of the launcher, and for abbreviations of them, behind the script too.
    """
    n = 1
    while n < len(words):
        word = words[n]
        if word == "--":
            return [*words[:n]], [*words[n + 1 :]]
        if not word.startswith("-") or word == "-":
            break
        if word.startswith("-m"):
            return [*words[:n]], ["-m", *filter(None, [word[2:]]), *words[n + 1 :]]
        name, has_value = (
            (word.partition("=")[0], "=" in word)
            if word.startswith("--")
            else (word[:2], len(word) > len("-n"))
        )
        option = run._option_string_actions.get(name)
        n += 2 if option is not None and option.nargs is None and not has_value else 1
    return [*words[:n]], [*words[n:]]


def _parser() -> tuple[_Parser, _Parser]:
    """Return the parser, and that of the action ``run``, which knows nothing of scripts."""
    parser = _Parser(prog="chainer-dist", description="Distributed training for Chainer over MPI.")
    parser.add_argument("--version", action="version", version=__version__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="run | info | scale | predict"
    )
    run = actions.add_parser(
        "run",
        help="run a script on many ranks",
        usage="chainer-dist run [options] (script.py | -m MODULE) [arguments of the script]",
        description="Run a Python script on many ranks, by the mpiexec of the MPI that mpi4py loads.",
        epilog="The exit status is that of the first rank that failed, 128 and the number of the signal "
        "that killed it, or 124 after the time limit.",
    )
    _add_places(run, "the slots of the hosts, or the number of cores")
    run.add_argument(
        "--max-restarts",
        type=count,
        default=0,
        metavar="N",
        help="after a failure start again, on the hosts that can still be reached, up to N times; "
        "the script goes on from its newest checkpoint (default: 0)",
    )
    run.add_argument(
        "--timeout",
        type=seconds,
        default=math.inf,
        metavar="SECONDS",
        help="end the job, restarts included, after so long, with status 124",
    )
    run.add_argument(
        "--timeline",
        type=text,
        metavar="FILE",
        help="write what the ranks did when, to open in Perfetto",
    )
    run.add_argument(
        "--stall-abort",
        type=seconds,
        metavar="SECONDS",
        help="end the job, as a failure, once ranks have waited for one another for so long",
    )
    run.add_argument(
        "--checked",
        action="store_true",
        help="compare what the ranks do before they do it, and look for NaN in gradients",
    )
    run.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set an environment variable, or take one to other hosts; may be repeated",
    )
    run.add_argument("--no-prefix", action="store_true", help="print lines without [rank]")
    run.add_argument("--no-pin", action="store_true", help="do not bind ranks to cores")
    run.add_argument("--dry-run", action="store_true", help="print the command that would be run")
    info = actions.add_parser(
        "info",
        help="say what there is, and what will hurt",
        description="Print versions, hosts, cores and communicators, and warnings. With hosts or -n, "
        "or under mpiexec, of all ranks.",
    )
    _add_places(info, "one process without mpiexec")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(max_restarts=0, timeout=math.inf, no_prefix=True, dry_run=False)
    for action in (run, info):
        action.set_defaults(wrong=action.error)
    for name, words in _MEASURING.items():
        actions.add_parser(name, help=words, add_help=False)
    return parser, run


def _add_places(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "-n",
        type=positive,
        dest="n_ranks",
        metavar="N",
        help=f"number of ranks (default: {default})",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--hosts", type=text, metavar="A:2,B:2", help="hosts, and how many ranks each takes"
    )
    where.add_argument(
        "--hostfile",
        type=text,
        metavar="FILE",
        help="a file of them, in the format of MPICH or Open MPI",
    )
    parser.add_argument("--mpiexec", type=text, metavar="PATH", help="the mpiexec to use")
    parser.add_argument(
        "--address",
        type=_address,
        metavar="NAME",
        help="name or address at which other hosts reach this one",
    )


def _address(given: str) -> str:
    if not _ADDRESS.fullmatch(given):
        raise argparse.ArgumentTypeError(f"{given!r} is no name or address of a host")
    return given


def _run(options: argparse.Namespace) -> int:
    from chainer_dist.launcher import mpi

    script = _script(options)
    added = _added_environment(options)
    return _launch(mpi.find(options.mpiexec), script, added, options)


def _launch(
    found: Mpi, script: Sequence[str], added: dict[str, str], options: argparse.Namespace
) -> int:
    """Run ``python`` with these arguments on the ranks, or say how it would be run."""
    import shlex

    from chainer_dist.launcher import mpi, restarts
    from chainer_dist.launcher.job import TIMED_OUT, Job, addresses
    from chainer_dist.launcher.stdin import Input

    n_ranks, hosts = _places(options)
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
    ignored = [each for each in wire.FORWARDED if signal.getsignal(each) is signal.SIG_IGN]
    if ignored:  # by nohup, or by a shell that starts jobs in the background
        added[_environment.IGNORED] = ",".join(str(int(each)) for each in ignored)
    # A job takes them as long as it runs; between two attempts they wait.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, wire.FORWARDED)
    output.start()
    stdin = Input()
    limit = time.monotonic() + options.timeout

    def start(attempt: int, n_ranks: int, hosts: Sequence[Host], seconds: float) -> Outcome:
        environ = {**added, _environment.RESTART: str(attempt)}
        return Job(
            [*mpi.command(found, n_ranks, hosts, [*environ, _environment.LAUNCHER]), *monitor],
            {**os.environ, **environ},
            n_ranks,
            reach=addresses(hosts, options.address),
            stdin=stdin,
            prefix=n_ranks > 1 and not options.no_prefix,
            seconds=seconds,
        ).run()

    try:
        outcome = restarts.run(
            start,
            n_ranks,
            hosts,
            max_restarts=options.max_restarts,
            seconds=options.timeout,
            probe=lambda hosts: restarts.reachable(found, hosts),
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    # Who reads the output may be slow, and may be waited for as long as the job.
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
    if not (options.n_ranks or options.hosts or options.hostfile):
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
        options.wrong("-m wants the name of a module")
    if not script:
        options.wrong("no script is given")
    if script[0] == "-m":
        return script
    path = Path(script[0])
    try:
        if not path.is_file() and not (path / "__main__.py").is_file():
            hint = ""
            if shutil.which(script[0]):
                hint = "; the launcher calls Python itself: chainer-dist run train.py"
            options.wrong(f"there is no script {script[0]!r}{hint}")
        with contextlib.suppress(IsADirectoryError), path.open("rb") as file:
            if file.read(4) == _ELF:
                options.wrong(f"{script[0]!r} is a program, and no Python script")
    except (OSError, ValueError) as error:
        options.wrong(f"the script {script[0]!r} cannot be read: {error}")
    if script[0].startswith("-"):  # which Python would take for an option
        return [f".{os.sep}{script[0]}", *script[1:]]
    return script


def _added_environment(options: argparse.Namespace) -> dict[str, str]:
    added = {}
    for item in options.env:
        name, equals, value = item.partition("=")
        if not name or (not equals and name not in os.environ):
            options.wrong(f"--env {item!r}: {name or 'this'} is not set here; give NAME=VALUE")
        added[name] = value if equals else os.environ[name]
    if options.no_pin:
        added[_environment.PIN] = "0"
    if options.timeline:
        added[_environment.TIMELINE] = str(Path(options.timeline).absolute())
    if options.stall_abort == math.inf:
        options.wrong("--stall-abort inf: without the option ranks may wait for ever")
    if options.stall_abort:
        added[_environment.STALL_ABORT] = str(options.stall_abort)
    if options.checked:
        added[_environment.CHECKED] = "1"
    return added


def _places(options: argparse.Namespace) -> tuple[int, list[Host]]:
    """Return the number of ranks, and the hosts if they are not this one alone."""
    from chainer_dist.launcher import cores, hostfiles, mpi

    hosts: list[Host] = []
    try:
        if options.hosts:
            hosts = hostfiles.parse_hosts(options.hosts)
        elif options.hostfile:
            hosts = hostfiles.read_hostfile(options.hostfile)
    except LaunchError as error:
        options.wrong(str(error))
    if not hosts:
        _, hosts = hostfiles.allocation(os.environ) or ("", [])
    n_ranks = options.n_ranks or hostfiles.n_slots(hosts) or cores.n_cores()
    if n_ranks > hostfiles.MAX_RANKS:
        options.wrong(f"{n_ranks} ranks are more than {hostfiles.MAX_RANKS:,}")
    most = [host.max_slots for host in hosts]
    if hosts and None not in most and n_ranks > sum(number or 0 for number in most):
        options.wrong(f"{n_ranks} ranks are more than the max_slots of the hosts")
    return n_ranks, [] if all(mpi.is_here(host.name) for host in hosts) else hosts


_ACTIONS = {"run": _run, "info": _info, "scale": _measure, "predict": _measure}

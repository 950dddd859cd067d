"""The options of ``chainer-dist``, and hints for options of other launchers."""

from __future__ import annotations

import argparse
import difflib
import math
import re
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from chainer_dist import _environment
from chainer_dist._arguments import count, positive, seconds, text
from chainer_dist._version import __version__
from chainer_dist.launcher import output
from chainer_dist.launcher.other_launchers import MEANT, NEEDLESS

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Parser", "distribution", "divide", "make_parser"]

USAGE_ERROR = 2
_ADDRESS = re.compile(r"\w[\w.-]*|[0-9A-Fa-f:.]+(%[\w.-]+)?", re.ASCII)
_PORT_MAX = 65535


class Parser(argparse.ArgumentParser):
    """Takes no abbreviations, and says in one line what is wrong and what may have been meant."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse arguments, and refuse those that are not known with what may have been meant."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.refuse_unknown(unknown)
        return found

    def error(self, message: str) -> NoReturn:
        """Leave with status 2."""
        message = f"{output.one_line(message)}; see {self.prog} --help"
        self.exit(USAGE_ERROR, f"{self.prog}: {message}\n")

    def refuse_unknown(self, unknown: Sequence[str]) -> NoReturn:
        """Say which arguments are not known, and what the first may have meant."""
        name = unknown[0].partition("=")[0]
        same = name.replace("_", "-")
        known = [each for each in self._option_string_actions if each.startswith("--")]
        close = difflib.get_close_matches(same, known, n=1)
        meant = same if same in known else MEANT.get(same) or (close[0] if close else "")
        hint = ""
        if same in NEEDLESS:
            hint = f"; it is not needed: {NEEDLESS[same]}"
        elif meant and name.startswith("-"):
            hint = f"; did you mean {meant}?"
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")


def make_parser(others: dict[str, str]) -> tuple[Parser, Parser]:
    """Return the parser, and that of the action ``run``, which knows nothing of scripts. Local.

    Args:
        others: Actions that have options of their own, and what they do.
    """
    parser = Parser(
        prog="chainer-dist",
        description="Distributed training for Chainer over MPI.",
        epilog="example:\n  chainer-dist run -n 4 train.py",
    )
    parser.add_argument("--version", action="version", version=__version__)
    actions = parser.add_subparsers(
        dest="action", required=True, metavar=" | ".join(["run", "info", *others])
    )
    run = actions.add_parser(
        "run",
        help="run a script on many ranks",
        usage="chainer-dist run [options] (script.py | -m MODULE) [arguments of the script]",
        description="Run a Python script on many ranks, by the mpiexec of the MPI that mpi4py loads.",
        epilog="The exit status is that of the first rank that failed, 128 and the number of the signal\n"
        "that killed it, or 124 after the time limit.\n\n"
        "examples:\n"
        "  chainer-dist run -n 4 train.py --epoch 20\n"
        "  chainer-dist run --hosts node1:4,node2:4 --log-dir logs train.py",
    )
    places = run.add_argument_group("ranks and hosts")
    _add_places(places, "the slots of the hosts, or the number of cores")
    places.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME[=VALUE]",
        help="set an environment variable, or take one to other hosts; may be repeated",
    )
    places.add_argument("--no-pin", action="store_true", help="do not bind ranks to cores")
    _add_training(run.add_argument_group("training"))
    _add_output(run.add_argument_group("output"))
    _add_ends(run.add_argument_group("failures and time limits"))
    _add_watching(run.add_argument_group("watching"))
    info = actions.add_parser(
        "info",
        help="say what there is, and what will hurt",
        description="Print versions, hosts, cores and communicators, and warnings. With hosts or -n, "
        "or under\nmpiexec, of all ranks.",
        epilog="example:\n  chainer-dist info --hosts node1:4,node2:4",
    )
    _add_places(info, "one process without mpiexec")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(
        max_restarts=0,
        timeout=math.inf,
        no_prefix=True,
        dry_run=False,
        verbose=False,
        log_dir=None,
        host_discovery_script=None,
        only_rank=None,
    )
    for action in (run, info):
        action.set_defaults(parser=action)
    for name, words in others.items():
        actions.add_parser(name, help=words, add_help=False)
    return parser, run


def divide(words: Sequence[str], run: Parser) -> tuple[list[str], list[str]]:
    """Divide a command line into the launcher's words, and the script or ``-m MODULE`` with its own. Local.

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
        known = run._option_string_actions  # noqa: SLF001 - argparse's
        name, has_value = word, False
        if word not in known:
            name, has_value = (
                (word.partition("=")[0], "=" in word)
                if word.startswith("--")
                else (word[:2], len(word) > len("-n"))
            )
        option = known.get(name)
        n += 2 if option is not None and option.nargs is None and not has_value else 1
    return [*words[:n]], [*words[n:]]


def distribution(options: argparse.Namespace) -> dict[str, str]:
    """Return the environment that lets ranks distribute an unmodified script. Local."""
    if options.distribute_batch and not options.distribute:
        options.parser.error("--distribute-batch needs --distribute")
    if not options.distribute:
        return {}
    # One seed for all ranks, and for the job when it is started again.
    seed = secrets.randbelow(1 << 32)
    return {_environment.DISTRIBUTE: f"{options.distribute_batch or 'rank'},{seed}"}


def _add_places(parser: argparse._ActionsContainer, default: str) -> None:
    parser.add_argument(
        "-n",
        "-np",
        type=positive,
        dest="n_ranks",
        metavar="N",
        help=f"number of ranks (default: {default})",
    )
    parser.add_argument(
        "-N",
        "--nproc-per-node",
        type=positive,
        dest="per_host",
        metavar="N",
        help="ranks on each host (default: its slots)",
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "-H",
        "--hosts",
        "--host",
        type=text,
        metavar="A:2,B:2",
        help="hosts, and how many ranks each takes (default: the hosts of the scheduler's allocation, or this one)",
    )
    where.add_argument(
        "--hostfile",
        type=text,
        metavar="FILE",
        help="a file of them, in the format of MPICH or Open MPI",
    )
    parser.add_argument(
        "--mpiexec",
        type=text,
        metavar="PATH",
        help="the mpiexec to use (default: the one that belongs to mpi4py's MPI)",
    )
    parser.add_argument(
        "--address",
        type=_address,
        metavar="NAME",
        help="name or address at which other hosts reach this one (default: found out)",
    )
    parser.add_argument(
        "--ssh-port",
        type=_port,
        metavar="PORT",
        help="port of ssh on the other hosts (default: ssh's own)",
    )
    parser.add_argument(
        "--ssh-identity",
        type=_file,
        metavar="FILE",
        help="private key for ssh (default: ssh's own)",
    )


def _add_training(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--distribute",
        action="store_true",
        help="make an unmodified Chainer script data-parallel",
    )
    parser.add_argument(
        "--distribute-batch",
        choices=["rank", "global"],
        help="with it, whether the script's batch size is that of a rank or of all (default: rank)",
    )


def _add_output(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--log-dir",
        "--output-filename",
        type=text,
        metavar="DIR",
        help="append the lines of each rank to a file of its own, DIR/rank.0.log and so on, as well",
    )
    parser.add_argument(
        "--only-rank",
        type=_ranks,
        metavar="R[,R]",
        help="show the lines of these ranks only (default: all)",
    )
    parser.add_argument("--no-prefix", action="store_true", help="print lines without [rank]")
    parser.add_argument(
        "--verbose",
        action="store_true",
        help="say which MPI, which hosts and which command are used",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the command that would be run"
    )


def _add_ends(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--max-restarts",
        type=count,
        default=0,
        metavar="N",
        help="after a failure start again, on the hosts that can still be reached, up to N times; "
        "the script goes on from its newest checkpoint (default: 0)",
    )
    parser.add_argument(
        "--host-discovery-script",
        type=_file,
        metavar="PATH",
        help="a program that prints a line host:slots for each host there is now, run again and again: when hosts "
        "come or go, the job saves, and goes on with more ranks or fewer",
    )
    parser.add_argument(
        "--min-ranks",
        type=positive,
        metavar="N",
        help="with such a script, wait until there is room for so many (default: 1)",
    )
    parser.add_argument(
        "--max-ranks",
        type=positive,
        metavar="N",
        help="with such a script, never have more (default: the slots of all hosts)",
    )
    parser.add_argument(
        "--timeout",
        type=seconds,
        default=math.inf,
        metavar="SECONDS",
        help="end the job, restarts included, after so long, with status 124 (default: never)",
    )
    parser.add_argument(
        "--stall-abort",
        type=seconds,
        metavar="SECONDS",
        help="end the job, as a failure, once ranks have waited for one another for so long (default: never)",
    )


def _add_watching(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--timeline",
        type=text,
        metavar="FILE",
        help="write what the ranks did when, to open in Perfetto",
    )
    parser.add_argument(
        "--checked",
        action="store_true",
        help="compare what the ranks do before they do it, and look for NaN in gradients",
    )


def _address(given: str) -> str:
    if not _ADDRESS.fullmatch(given):
        raise argparse.ArgumentTypeError(f"{given!r} is no name or address of a host")
    return given


def _port(given: str) -> int:
    found = positive(given)
    if found > _PORT_MAX:
        raise argparse.ArgumentTypeError(f"{given} is no port: they end at {_PORT_MAX}")
    return found


def _file(given: str) -> str:
    try:
        is_file = Path(given).is_file()
    except (OSError, ValueError):
        is_file = False
    if not is_file:
        raise argparse.ArgumentTypeError(f"there is no file {given!r}")
    if re.search(r"\s", given):  # mpiexec takes the arguments of ssh as one text
        raise argparse.ArgumentTypeError(
            f"{given!r} has white space, which mpiexec cannot pass to ssh"
        )
    return str(Path(given).absolute())


def _ranks(given: str) -> frozenset[int]:
    return frozenset(count(each.strip()) for each in given.split(","))

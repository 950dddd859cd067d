"""What ``chainer-dist info`` prints: what each rank sees, put together, and what will hurt.

Run on every rank. Nothing but rank 0 prints.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import multiprocessing
import os
import platform
import shutil
import socket
import sys
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import threadpoolctl

import chainer_dist
from chainer_dist import _threads, communicators, kernels
from chainer_dist.launcher import mpi

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

SHARED_MEMORY = "/dev/shm"  # noqa: S108 - this is where MPI puts it
LITTLE_SHARED_MEMORY = 1 << 30  # bytes; containers have 64 MiB by default
PACKAGES = ("chainer", "numpy", "mpi4py")
_LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")


def main(arguments: Sequence[str]) -> int:
    """Collect, and print on rank 0. Collective over the ranks of the job.

    Args:
        arguments: Facts from the launcher, as JSON, and perhaps ``--json``.

    Returns:
        0, whatever is found.
    """
    launcher = json.loads(arguments[0])
    ranks, communicator, problem = collect()
    if not speaks(ranks):
        return 0
    facts = summary(ranks, communicator, launcher)
    facts["warnings"] = [*([problem] if problem else []), *warnings(facts)]
    sys.stdout.write((json.dumps(facts, indent=2) if "--json" in arguments else text(facts)) + "\n")
    return 0


def collect() -> tuple[list[dict[str, Any]], dict[str, str], str]:
    """Return what all ranks see, what ``auto`` is, and why MPI is missing if it is. Collective."""
    own = {
        "rank": 0,
        "started_as": mpi.rank_of(os.environ),
        "host": socket.gethostname(),
        "versions": {
            "chainer_dist": chainer_dist.__version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "cores": _threads.cores(),
        "quota": _threads.quota(),
        "shared_memory": _shared_memory(),
        "start_method": multiprocessing.get_start_method(),
        "kernels": kernels.status()._asdict(),
    }
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return [{**own, "threads": _n_threads()}], {}, f"mpi4py loads no MPI: {error}"
    own["library"] = mpi.name_of(MPI.Get_library_version())
    own["thread_level"] = f"MPI_THREAD_{_LEVELS[_levels(MPI).index(MPI.Query_thread())]}"
    own["rank"] = MPI.COMM_WORLD.rank
    with communicators.create_communicator() as comm:
        own["threads"] = _n_threads()
        own["node"] = comm.inter_rank
        ranks = comm.allgather_obj(own)
        auto = {
            "auto": _kind_of(comm),
            "why": (inspect.getdoc(type(comm)) or "").split("\n\n")[0].replace("\n", " "),
        }
    return ranks, auto, ""


def speaks(ranks: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether this process is the one that prints. Local."""
    started_as = mpi.rank_of(os.environ)
    if started_as and started_as[1] != len(ranks):  # it takes itself for one of another job
        return started_as[0] == 0
    return not ranks or _own_rank() == 0


def summary(
    ranks: Sequence[Mapping[str, Any]], auto: Mapping[str, str], launcher: Mapping[str, Any]
) -> dict[str, Any]:
    """Put what the ranks see together, a host at a time. Local."""
    hosts: dict[Any, list[Mapping[str, Any]]] = defaultdict(list)
    for rank in ranks:
        hosts[rank["host"], rank.get("node", 0)].append(rank)
    first = ranks[0]
    return {
        "versions": first["versions"],
        "mpi": {
            "library": first.get("library"),
            "thread_level": first.get("thread_level"),
            "mpiexec": launcher["mpi"],
            "problem": launcher["problem"],
        },
        "n_ranks": len(ranks),
        "hosts": [
            {
                "name": name,
                "ranks": [rank["rank"] for rank in there],
                "cores": len({core for rank in there for core in rank["cores"]}),
                "quota": there[0]["quota"],
                "threads": [rank["threads"] for rank in there],
                "shared_memory": there[0]["shared_memory"],
            }
            for (name, _), there in hosts.items()
        ],
        "start_method": first["start_method"],
        "kernels": first["kernels"],
        "communicators": {**auto, "names": list(communicators.names())},
        "differing": _differing(ranks),
        "started_as": first["started_as"],
    }


def warnings(facts: Mapping[str, Any]) -> list[str]:
    """Return what will hurt, each with what to do about it. Local.

    Args:
        facts: Result of :func:`summary`.
    """
    found = []
    launcher = facts["mpi"]
    if launcher["problem"]:
        found.append(launcher["problem"])
    elif launcher["mpiexec"]["mpiexec_version"] != launcher["mpiexec"]["version"]:
        found.append(
            f"mpiexec is of version {launcher['mpiexec']['mpiexec_version']}, the library of "
            f"{launcher['mpiexec']['version']}; install both from one place"
        )
    size = facts["started_as"][1] if facts["started_as"] else facts["n_ranks"]
    if size != facts["n_ranks"]:
        found.append(
            f"{size} ranks were started, and each of them knows {facts['n_ranks']}: mpiexec belongs to "
            "another MPI; use chainer-dist run"
        )
    found += facts["differing"]
    for host in facts["hosts"]:
        found += _warnings_of_host(host)
    if facts["start_method"] == "fork":
        found.append(
            "data-loader processes are forked, which MPI does not bear: put "
            'multiprocessing.set_start_method("forkserver") at the top of the script'
        )
    return found


def text(facts: Mapping[str, Any]) -> str:
    """Return the facts for people to read. Local."""
    versions = facts["versions"]
    launcher = facts["mpi"]["mpiexec"]
    lines = [
        f"chainer_dist {versions['chainer_dist']}",
        "  " + ", ".join(f"{name} {versions[name]}" for name in ("python", *PACKAGES)),
        "",
        "MPI",
        f"  library   {facts['mpi']['library'] or 'none'}"
        + (f", {facts['mpi']['thread_level']}" if facts["mpi"]["thread_level"] else "")
        + (f", {launcher['library']}" if launcher else ""),
        f"  mpiexec   {launcher['mpiexec']} {launcher['mpiexec_version']}"
        if launcher
        else "  mpiexec   none that fits",
        "",
        f"Ranks: {facts['n_ranks']}",
    ]
    for host in facts["hosts"]:
        threads = "-".join(map(str, sorted({min(host["threads"]), max(host["threads"])})))
        memory = host["shared_memory"]
        quota = f" (limited to {host['quota']:g})" if host["quota"] else ""
        lines.append(
            f"  {host['name']}   {_plural(len(host['ranks']), 'rank')} on "
            f"{_plural(host['cores'], 'core')}{quota}, {threads} thread(s) a rank, "
            + (
                f"{SHARED_MEMORY} {_gib(memory['free'])} of {_gib(memory['total'])} free"
                if memory
                else ""
            )
        )
    lines += ["", "Communicators"]
    if "auto" in facts["communicators"]:
        lines.append(
            f"  auto      {facts['communicators']['auto']}: {facts['communicators']['why']}"
        )
    lines.append(f"  all       {', '.join(facts['communicators']['names'])}")
    lines += ["", "Forward and backward", f"  {facts['kernels']['text']}"]
    lines += ["", "Warnings"]
    lines += [f"  - {warning}" for warning in facts["warnings"]] or ["  none"]
    return "\n".join(lines)


def _warnings_of_host(host: Mapping[str, Any]) -> Iterable[str]:
    n_ranks, name = len(host["ranks"]), host["name"]
    cores = host["cores"] if host["quota"] is None else min(host["cores"], host["quota"])
    if n_ranks > cores:
        yield f"{name} has {n_ranks} ranks on {cores:g} cores; start one a core at most"
    elif sum(host["threads"]) > cores:
        yield (
            f"{name} has {sum(host['threads'])} threads on {cores:g} cores; unset OMP_NUM_THREADS "
            "and the like, or set fewer"
        )
    memory = host["shared_memory"]
    if memory and memory["free"] < LITTLE_SHARED_MEMORY:
        yield (
            f"{name} has {_gib(memory['free'])} free in {SHARED_MEMORY}, where ranks keep gradients and "
            "scattered data; give a container more by --shm-size"
        )


def _differing(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for name in (*ranks[0]["versions"], "library"):
        seen: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for rank in ranks:
            seen[str(rank["versions"].get(name, rank.get(name)))].append(rank)
        if len(seen) > 1:
            which = ", ".join(
                f"{version} on rank {there[0]['rank']} ({there[0]['host']})"
                for version, there in seen.items()
            )
            found.append(
                f"ranks have different versions of {name}: {which}; install the same everywhere"
            )
    computing = {rank["kernels"]["name"]: rank for rank in reversed(ranks)}
    if len(computing) > 1:
        which = ", ".join(
            f"{rank['kernels']['text']} on rank {rank['rank']} ({rank['host']})"
            for rank in computing.values()
        )
        found.append(
            f"ranks compute forward and backward in different ways, and wait for the slowest: {which}"
        )
    return found


def _own_rank() -> int:
    module = sys.modules.get("mpi4py.MPI")
    return module.COMM_WORLD.rank if module else 0


def _levels(module: Any) -> list[int]:
    return [getattr(module, f"THREAD_{name}") for name in _LEVELS]


def _kind_of(comm: communicators.CommunicatorBase) -> str:
    paths = {path: name for name, path in communicators.KINDS.items()}
    kind = type(comm)
    return paths[f"{kind.__module__}:{kind.__qualname__}"]


def _n_threads() -> int:
    """Return how many threads a library of this process may use."""
    return max((library["num_threads"] for library in threadpoolctl.threadpool_info()), default=1)


def _shared_memory() -> dict[str, int] | None:
    if not os.path.isdir(SHARED_MEMORY):  # noqa: PTH112 - one question
        return None
    usage = shutil.disk_usage(SHARED_MEMORY)
    return {"total": usage.total, "free": usage.free}


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / (1 << 30):.2g} GiB"


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" + "s" * (n != 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

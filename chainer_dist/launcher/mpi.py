"""The MPI that mpi4py loads, the ``mpiexec`` that belongs to it, and how to call that one.

An ``mpiexec`` of another MPI starts processes each of which is rank 0 of a job of one.
So the launcher asks mpi4py which library it loads and looks for that library's own ``mpiexec``.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from chainer_dist.launcher.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from chainer_dist.launcher.hostfiles import Host

__all__ = [
    "Mpi",
    "command",
    "environment",
    "find",
    "is_here",
    "name_of",
    "rank_of",
    "ssh_environment",
]

MPICH, OPEN_MPI, INTEL = "MPICH", "Open MPI", "Intel MPI"

# What MPI.Get_library_version() and `mpiexec --version` print. MVAPICH is an MPICH of another name.
_LIBRARIES = {
    INTEL: re.compile(r"Intel\(R\) MPI Library (\d[\w.]*)"),
    MPICH: re.compile(r"^(?:MPICH|MVAPICH2?) Version\s*:\s*(\d[\w.]*)", re.MULTILINE),
    OPEN_MPI: re.compile(r"Open MPI v(\d[\w.]*)"),
}
_LAUNCHERS = {
    INTEL: re.compile(r"Intel\(R\) MPI Library .*?Version (\d[\w.]*)"),
    MPICH: re.compile(r"HYDRA build details:\s*Version:\s*(\d[\w.]*)"),
    OPEN_MPI: re.compile(r"\((?:Open MPI|OpenRTE)\) (\d[\w.]*)"),
}
_NAMES = {
    MPICH: ("mpiexec", "mpiexec.mpich", "mpiexec.hydra"),
    INTEL: ("mpiexec", "mpiexec.hydra"),
    OPEN_MPI: ("mpiexec", "mpiexec.openmpi"),
}
# In which arguments for ssh are passed on; Open MPI 5 has another one than Open MPI 4.
_SSH_VARIABLES = {
    MPICH: ("HYDRA_LAUNCHER_EXTRA_ARGS",),
    INTEL: ("I_MPI_HYDRA_BOOTSTRAP_EXEC_EXTRA_ARGS",),
    OPEN_MPI: ("PRTE_MCA_plm_ssh_args", "OMPI_MCA_plm_rsh_args"),
}
# In the environment of a rank: its number, how many there are, and the same on its host.
_RANK_VARIABLES = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
# Open MPI takes no other variables to other hosts than its own, unless they are named.
_EXPORTED = re.compile(
    "CHAINER|OMP_|OPENBLAS_|MKL_|BLIS_|VECLIB_|KMP_|GOMP_|PYTHON|UCX_|FI_|(PATH|LD_LIBRARY_PATH)$"
)
_MPIEXECS_OWN = re.compile("OMPI_|PRTE_|PMIX_|SLURM_")  # it takes care of those itself
_NUMBER = re.compile("[0-9]{1,9}")
SECONDS_TO_ANSWER = 60

# Without the first lines, what lies in the current directory would be imported.
_ASK = """
import sys
if sys.path[:1] == [""]:
    del sys.path[0]
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
try:
    lines = open("/proc/self/maps").read().splitlines()
except OSError:
    lines = []
found = [line.split(None, 5)[5] for line in lines if "/libmpi" in line]
print(next(iter(found), ""))
print(MPI.Get_library_version())
"""


class Mpi(NamedTuple):
    """The MPI that mpi4py loads in this Python.

    Attributes:
        family: "MPICH", "Open MPI" or "Intel MPI".
        version: Version of the library.
        library: Path of the library; "" where the system does not show it.
        mpiexec: Path of the ``mpiexec`` that belongs to it.
        mpiexec_version: Version of that ``mpiexec``.
    """

    family: str
    version: str
    library: str
    mpiexec: str
    mpiexec_version: str


def find(mpiexec: str | None = None) -> Mpi:
    """Find out which MPI mpi4py loads in this Python, and its ``mpiexec``. Local; takes about 0.2 s.

    Looked for beside the library, beside this Python and on ``PATH``, in this order; one of the
    library's own version goes before others. To ask for its version is to run it: so only those are
    asked that belong to root, to this user or to the owner of the environment or the library, at
    places where not everybody may write.

    Args:
        mpiexec: The one to use, a path or a name on ``PATH``, instead of looking for one. A path is
            taken wherever it is.

    Raises:
        LaunchError: If mpi4py loads no MPI, no ``mpiexec`` belongs to it, or the given one is
            another MPI's. It says what was found where.
    """
    library, text = _ask_mpi4py()
    family, version = _recognize(_LIBRARIES, text)
    if not family:
        raise LaunchError(
            f"mpi4py loads {text.splitlines()[0]!r}, which chainer-dist does not know how to launch; "
            "use its own mpiexec or srun"
        )
    if mpiexec is None:
        candidates = _candidates(_folders(library), _NAMES[family])
    else:
        candidates = iter([mpiexec] if os.sep in mpiexec else _candidates(_on_path(), [mpiexec]))
    others = []
    fitting = None
    for path in dict.fromkeys(candidates):
        distrust = "" if path == mpiexec else _why_not_to_run(path, library)
        if distrust:
            others.append(f"{path} was not asked: {distrust}")
            continue
        try:
            its_family, its_version = _recognize(_LAUNCHERS, _run([path, "--version"]))
        except LaunchError as error:
            others.append(f"{path} cannot be run: {error}")
            continue
        if its_family == family:
            fitting = fitting or Mpi(family, version, library, path, its_version)
            if its_version == version:
                return Mpi(family, version, library, path, its_version)
        else:
            others.append(f"{path} is {its_family or 'of an unknown MPI'} {its_version}".rstrip())
    if fitting is None:
        where = f" ({library})" if library else ""
        seen = "; ".join(others) or (f"there is no {mpiexec}" if mpiexec else "there is none")
        raise LaunchError(
            f"mpi4py loads {family} {version}{where}, and found no mpiexec that belongs to it: {seen}. "
            "Name it: chainer-dist run --mpiexec PATH"
        )
    return fitting


def name_of(text: str) -> str:
    """Return a library's family and version from what ``MPI.Get_library_version()`` says. Local."""
    family, version = _recognize(_LIBRARIES, text)
    return f"{family} {version}" if family else text.splitlines()[0]


def command(mpi: Mpi, n_ranks: int, hosts: Sequence[Host], variables: Sequence[str]) -> list[str]:
    """Return the call of ``mpiexec``, to be followed by the program and its arguments. Local.

    Args:
        mpi: Result of :func:`find`.
        n_ranks: Number of ranks.
        hosts: Hosts of the ranks; none is this host.
        variables: Names of environment variables that must reach other hosts, in addition to variables
            of this process for Python, threads, the network and Chainer. MPICH and Intel MPI pass all.
    """
    call = [mpi.mpiexec, "-n", str(n_ranks)]
    elsewhere = not all(is_here(host.name) for host in hosts)
    places = ",".join(f"{host.name}:{host.slots}" for host in hosts)
    if mpi.family == OPEN_MPI:
        # Ranks are bound by chainer_dist.launcher.rank.
        call += ["--bind-to", "none"]
        call += ["--host", places] if elsewhere else ["--host", f"localhost:{n_ranks}"]
        names = {*filter(_EXPORTED.match, os.environ), *variables} if elsewhere else set()
        exported = sorted(name for name in names if not _MPIEXECS_OWN.match(name))
        return [*call, *(word for name in exported for word in ("-x", name))]
    # In a job of Slurm, Hydra would call srun even for this host.
    return [
        *call,
        *(["-hosts", places] if elsewhere else ["-launcher", "fork", "-hosts", "localhost"]),
    ]


def environment(mpi: Mpi, environ: Mapping[str, str]) -> dict[str, str]:
    """Return what ``mpiexec`` wants in its environment beside what is there. Local.

    Ranks are bound to cores by :mod:`~chainer_dist.launcher.rank` and not by MPI, several may share a
    core, and the superuser of a container may start them. Variables that are set stay as they are.
    """
    wanted = {"SLURM_CPU_BIND": "none"} if "SLURM_JOB_ID" in environ else {}
    if mpi.family == INTEL:
        wanted["I_MPI_PIN"] = "off"
    if mpi.family == OPEN_MPI:
        wanted["PRTE_MCA_rmaps_default_mapping_policy"] = ":oversubscribe"
        wanted["OMPI_MCA_rmaps_base_oversubscribe"] = "1"  # the same for Open MPI 4
        wanted["OMPI_MCA_orte_keep_fqdn_hostnames"] = "1"  # or it calls ssh without the domain
        if os.geteuid() == 0:
            wanted["OMPI_ALLOW_RUN_AS_ROOT"] = "1"
            wanted["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] = "1"
    return {name: value for name, value in wanted.items() if name not in environ}


def ssh_environment(
    mpi: Mpi, environ: Mapping[str, str], port: int | None, identity: str | None
) -> dict[str, str]:
    """Return what makes ``mpiexec`` call ssh with a port and a private key. Local.

    Args:
        mpi: Result of :func:`find`.
        environ: The environment, whose own arguments for ssh are kept.
        port: Port of ssh on the other hosts; None for ssh's own.
        identity: Path of a private key, without white space; None for ssh's own.
    """
    words = [*(["-p", str(port)] if port else []), *(["-i", identity] if identity else [])]
    names = _SSH_VARIABLES[mpi.family]
    return {name: " ".join(filter(None, [environ.get(name), *words])) for name in names}


def is_here(host: str) -> bool:
    """Return whether this is a name of the machine on which this process runs. Local."""
    own = socket.gethostname()
    return host in ("localhost", "127.0.0.1", own, own.partition(".")[0])


def rank_of(environ: Mapping[str, str]) -> tuple[int, int, int, int] | None:
    """Return which rank of how many this is, and which of how many on its host. Local.

    Args:
        environ: The environment of a process that ``mpiexec`` started.

    Returns:
        The four numbers, or None if ``mpiexec`` did not start this process.
    """
    for names in _RANK_VARIABLES:
        if all(_NUMBER.fullmatch(environ.get(name, "")) for name in names):
            rank, size, local_rank, local_size = (int(environ[name]) for name in names)
            return rank, size, local_rank, local_size
    return None


def _ask_mpi4py() -> tuple[str, str]:
    try:
        answer = _run([sys.executable, "-c", _ASK])
    except LaunchError as error:
        raise LaunchError(
            f"mpi4py loads no MPI: {error}; `pip install mpich` brings one, and `pip install "
            "--force-reinstall --no-deps --no-binary mpi4py mpi4py` compiles mpi4py for the system's"
        ) from None
    library, _, text = answer.partition("\n")
    return library, text.strip("\0\n ")


def _run(command: list[str]) -> str:
    """Return what a command prints."""
    try:
        answer = subprocess.run(  # noqa: S603 - this Python, or an mpiexec
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_ANSWER,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LaunchError(str(error)) from None
    if answer.returncode:
        raise LaunchError((answer.stderr.strip() or f"status {answer.returncode}").splitlines()[-1])
    return answer.stdout


def _recognize(patterns: Mapping[str, re.Pattern[str]], text: str) -> tuple[str, str]:
    for family, pattern in patterns.items():
        match = pattern.search(text)
        if match:
            return family, match[1]
    return "", ""


def _folders(library: str) -> Iterator[Path]:
    """Yield the folders in which the library's mpiexec may be, best first."""
    for folder in Path(library).parents:
        if folder.name in ("lib", "lib32", "lib64"):
            yield folder.parent / "bin"
    yield Path(sys.executable).parent
    yield from _on_path()


def _on_path() -> Iterator[Path]:
    """Yield the folders of PATH; not the current one, which any other may be."""
    path = map(Path, os.environ.get("PATH", os.defpath).split(os.pathsep))
    return (folder for folder in path if folder.is_absolute())


def _candidates(folders: Iterable[Path], names: Iterable[str]) -> Iterator[str]:
    names = list(names)
    for folder in folders:
        for name in names:
            if (folder / name).is_file() and os.access(folder / name, os.X_OK):
                yield str(folder / name)


def _why_not_to_run(program: str, library: str) -> str:
    """Return why a program might be another user's, or "" if it is not."""
    owners = {0, os.geteuid()}
    given = {
        Path(sys.prefix),
        *Path(sys.prefix).parents,
    }  # a user who may write there decides what Python is
    for each in (sys.prefix, library):
        with contextlib.suppress(OSError):
            owners.add(os.stat(each).st_uid)  # noqa: PTH116 - "" is none
    for path in {Path(program), Path(program).resolve()}:
        for place in (path, path.parent):
            status = place.stat()
            if status.st_uid not in owners:
                return f"{place} belongs to another user"
            if status.st_mode & stat.S_IWOTH:
                return f"everybody may write to {place}"
        for place in {*path.parents} - given:
            mode = place.stat().st_mode
            if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
                return f"everybody may write to {place}"
    return ""

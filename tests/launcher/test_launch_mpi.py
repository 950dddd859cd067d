"""Finding the mpiexec that belongs to the MPI of mpi4py, and calling it; cores; the words between processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.launcher import cores, mpi, output, wire
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.hostfiles import Host

LIBRARIES = {
    "MPICH Version:      5.0.2\nMPICH Release date: ...": "MPICH 5.0.2",
    "MPICH Version:\t4.0.2\nMPICH ABI: 15:1:3": "MPICH 4.0.2",
    "MVAPICH2 Version      :\t2.3.7": "MPICH 2.3.7",
    "MVAPICH Version:\t3.0": "MPICH 3.0",
    "Open MPI v5.0.11, package: Open MPI user@host": "Open MPI 5.0.11",
    "Intel(R) MPI Library 2021.18.1 for Linux* OS\n": "Intel MPI 2021.18.1",
    "Another MPI 1.0\nmore": "Another MPI 1.0",
}
VERSIONS = {
    mpi.MPICH: "HYDRA build details:\n    Version:                                 4.0.2\n    CC: gcc",
    mpi.OPEN_MPI: "mpiexec (OpenRTE) 4.1.4\n\nReport bugs to http://www.open-mpi.org/",
    mpi.INTEL: "Intel(R) MPI Library for Linux* OS, Version 2021.9 Build 20230307 (id: d82b3071db)",
}

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("text", LIBRARIES)
def test_names_of_libraries(text):
    """As they name themselves, with and without release candidates and vendors."""
    assert mpi.name_of(text) == LIBRARIES[text]


def test_the_mpiexec_of_this_mpi():
    """It is of the family and version of the library that mpi4py loads."""
    from mpi4py import MPI

    found = mpi.find()
    assert f"{found.family} {found.version}" == mpi.name_of(MPI.Get_library_version())
    assert os.access(found.mpiexec, os.X_OK)
    assert found.mpiexec_version
    assert mpi.find(found.mpiexec) == found


def test_the_mpiexec_of_another_mpi(tmp_path):
    """It would start ranks that do not know of one another; the error says what was found."""
    family = mpi.find().family
    other = next(name for name in VERSIONS if name != family)
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(f"#!/bin/sh\ncat <<'END'\n{VERSIONS[other]}\nEND\n")
    mpiexec.chmod(0o755)
    with pytest.raises(LaunchError) as caught:
        mpi.find(str(mpiexec))
    assert f"mpi4py loads {family}" in str(caught.value)
    assert f"{mpiexec} is {other}" in str(caught.value)
    with pytest.raises(LaunchError, match="nosuch cannot be run"):
        mpi.find(str(tmp_path / "nosuch"))
    with pytest.raises(LaunchError, match="there is no nosuch"):
        mpi.find("nosuch")


def plant(folder, family):
    """Put a program into a folder that passes for an mpiexec, and leaves a trace when it is run."""
    folder.mkdir(parents=True)
    program = folder / "mpiexec"
    trace = folder / "was run"
    program.write_text(f"#!/bin/sh\n: > '{trace}'\necho '{VERSIONS[family]}'\n")
    program.chmod(0o755)
    return program, trace


# Where everybody may write: the folder, the one above, the program itself; or whose it is.
PLACES = {"folder": "bin", "above": "", "program": "bin/mpiexec"}


@pytest.mark.parametrize("how", [*PLACES, "another user", "link"])
@pytest.mark.parametrize("where", ["library", "PATH", "name"])
def test_an_mpiexec_of_strangers_is_not_run(how, where, tmp_path, monkeypatch):
    """Not even asked for its version, wherever it would be looked for."""
    family = mpi.find().family
    prefix = tmp_path / "prefix"
    program, trace = plant(prefix / "bin", family)
    if how in PLACES:
        (prefix / PLACES[how]).chmod(0o777)
    elif how == "link":
        real, trace = plant(tmp_path / "elsewhere", family)
        real.parent.chmod(0o777)
        program.unlink()
        program.symlink_to(real)
    elif os.geteuid() == 0:
        os.chown(program, 12345, 12345)
    else:
        pytest.skip("this user may not give files away")
    text = next(text for text, name in LIBRARIES.items() if name.startswith(family))
    library = prefix / "lib" / "libmpi.so"
    monkeypatch.setattr(
        mpi, "_ask_mpi4py", lambda: (str(library) if where == "library" else "", text)
    )
    monkeypatch.setenv("PATH", str(tmp_path) if where == "library" else str(program.parent))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(LaunchError, match=f"{program} was not asked: "):
        mpi.find("mpiexec" if where == "name" else None)
    assert not trace.exists()


def test_only_the_library_s_own_folders_are_looked_at(tmp_path, monkeypatch):
    """Not those above the place where it is installed; and no more is run than what is used."""
    family = mpi.find().family
    _, above = plant(tmp_path / "bin", family)
    own, its_trace = plant(tmp_path / "prefix" / "bin", family)
    _, later = plant(tmp_path / "later", family)
    version = mpi._recognize(mpi._LAUNCHERS, VERSIONS[family])[1]
    text = next(text for text, name in LIBRARIES.items() if name.startswith(family))
    text = text.replace(mpi._recognize(mpi._LIBRARIES, text)[1], version)
    library = tmp_path / "prefix" / "lib" / "x86_64-linux-gnu" / "libmpi.so"
    monkeypatch.setattr(mpi, "_ask_mpi4py", lambda: (str(library), text))
    monkeypatch.setenv("PATH", str(tmp_path / "later"))
    assert mpi.find().mpiexec == str(own)
    assert its_trace.exists()
    assert not above.exists()
    assert not later.exists()


@pytest.mark.parametrize("path", ["", ".", "bin", "/nosuch::/nosuch"])
def test_the_current_folder_is_not_looked_at(path, tmp_path, monkeypatch):
    """Neither where PATH has it nor for a name; and nothing in it is imported."""
    family, *_, mpiexec, _ = mpi.find()
    _, trace = plant(tmp_path / "bin", family)
    _, other = plant(tmp_path / "x", family)
    (tmp_path / "mpiexec").write_text((tmp_path / "x" / "mpiexec").read_text())
    (tmp_path / "mpiexec").chmod(0o755)
    for name in ("mpi4py", "json", "chainer_dist", "numpy", "encodings"):
        (tmp_path / f"{name}.py").write_text(f"open({str(trace)!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", path)
    assert mpi.find().mpiexec == mpiexec
    with pytest.raises(LaunchError, match="there is no mpiexec"):
        mpi.find("mpiexec")
    assert not trace.exists()
    assert not other.exists()


@pytest.mark.parametrize("family", VERSIONS)
def test_another_version_of_the_same_mpi(family, tmp_path, monkeypatch):
    """It is taken where there is none of the same version, and known to be another."""
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(f"#!/bin/sh\ncat <<'END'\n{VERSIONS[family]}\nEND\n")
    mpiexec.chmod(0o755)
    text = next(text for text, name in LIBRARIES.items() if name.startswith(family))
    monkeypatch.setattr(mpi, "_ask_mpi4py", lambda: ("", text))
    found = mpi.find(str(mpiexec))
    assert (found.family, found.mpiexec) == (family, str(mpiexec))
    assert found.mpiexec_version in VERSIONS[family]
    assert found.mpiexec_version != found.version


TWO = [Host("a", 2), Host("b", 1)]


@pytest.mark.parametrize(
    ("family", "here", "there"),
    [
        ("MPICH", "-launcher fork -hosts localhost", "-hosts a:2,b:1"),
        ("Intel MPI", "-launcher fork -hosts localhost", "-hosts a:2,b:1"),
        (
            "Open MPI",
            "--bind-to none --host localhost:3",
            "--bind-to none --host a:2,b:1 -x OMP_X -x Y",
        ),
    ],
)
def test_calls(family, here, there, monkeypatch):
    """Every MPI has its own words for hosts, and for variables that should reach them."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    monkeypatch.setenv("OMP_X", "1")
    monkeypatch.setenv("SECRET", "1")
    found = mpi.Mpi(family, "1", "", "/x/mpiexec", "1")
    assert mpi.command(found, 3, [], ["Y"]) == f"/x/mpiexec -n 3 {here}".split()
    assert mpi.command(found, 3, TWO, ["Y", "OMPI_X"]) == f"/x/mpiexec -n 3 {there}".split()


def test_what_users_set_stays():
    """Defaults for mpiexec are no more than that."""
    found = mpi.Mpi("Intel MPI", "1", "", "mpiexec", "1")
    assert mpi.environment(found, {}) == {"I_MPI_PIN": "off"}
    assert mpi.environment(found, {"I_MPI_PIN": "on"}) == {}
    assert mpi.environment(found, {"SLURM_JOB_ID": "1", "I_MPI_PIN": ""}) == {
        "SLURM_CPU_BIND": "none"
    }


def test_which_rank_a_process_is():
    """It is in the environment, under different names."""
    environ = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}
    assert mpi.rank_of(environ) == (1, 4, 0, 2)
    names = ["RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"]
    environ = {f"OMPI_COMM_WORLD_{name}": str(n) for n, name in enumerate(names)}
    assert mpi.rank_of(environ) == (0, 1, 2, 3)
    assert mpi.rank_of({"PMI_RANK": "1"}) is None
    assert mpi.rank_of({**environ, "OMPI_COMM_WORLD_RANK": "x"}) is None


CORES = st.lists(st.integers(1, 4), min_size=1, max_size=12)


@given(threads=CORES, n_ranks=st.integers(1, 14))
def test_cores_are_divided(threads, n_ranks):
    """Among the ranks, hardware threads of a core together, evenly, all of them, each once."""
    numbers = iter(range(100))
    machine = [[next(numbers) for _ in range(n)] for n in threads]
    everything = [cpu for core in machine for cpu in core]
    parts = cores.divide(machine, n_ranks)
    assert len(parts) == n_ranks
    if n_ranks > len(machine):
        assert parts == [everything] * n_ranks
        return
    assert [cpu for part in parts for cpu in part] == everything
    n_cores = [sum(set(core) <= set(part) for core in machine) for part in parts]
    assert sum(n_cores) == len(machine)
    assert max(n_cores) - min(n_cores) <= 1


def test_cores_of_a_machine(tmp_path, monkeypatch):
    """Neighbours share a socket, however the system numbers them; a job may have a part only."""
    for cpu in range(8):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{cpu % 2}\n")
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(8)}, raising=False)
    assert cores.physical_cores(tmp_path) == [[0, 4], [2, 6], [1, 5], [3, 7]]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 7}, raising=False)
    assert cores.physical_cores(tmp_path) == [[1], [3, 7]]
    assert cores.physical_cores(tmp_path / "nosuch") == [[1], [3], [7]]


@given(
    messages=st.lists(st.tuples(st.sampled_from([b"O", b"E", b"X"]), st.binary(max_size=30))),
    size=st.integers(1, 40),
)
def test_messages_arrive_whole(messages, size):
    """However the network cuts them into pieces."""
    stream = b"".join(wire.message(*message) for message in messages)
    received, rest = [], b""
    for begin in range(0, len(stream), size):
        whole, rest = wire.split(rest + stream[begin : begin + size])
        received += whole
    assert (received, rest) == (messages, b"")


@given(
    text=st.lists(st.sampled_from([b"a", b"\n", b"bc", b"\r"])).map(b"".join),
    size=st.integers(1, 9),
)
def test_lines_arrive_whole(text, size):
    """However they are cut; only the last one may get an end it did not have."""
    taken = []
    lines = output.Lines(taken.append)
    for begin in range(0, len(text), size):
        lines.add(text[begin : begin + size])
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 for line in taken)
    lines.end()
    assert b"".join(taken) == (text if text.endswith(b"\n") or not text else text + b"\n")


def test_a_line_without_end_is_not_kept_for_ever():
    """A progress bar may never end one."""
    taken = []
    lines = output.Lines(taken.append)
    for _ in range(100):
        lines.add(b"x" * 10_000)
    assert sum(map(len, taken)) > 900_000
    assert max(map(len, taken)) < 2 * output.MAX_LINE


HEAD = "Traceback (most recent call last):\n  File x\n"
LEFT = "chainer_dist: exit with status 3 on rank 1 of 2 (h); ending the job with status 3.\n"
RAISED = "chainer_dist: uncaught E on rank 1 of 2 (h); ending the job with status 1.\n"
ABORT = "Abort({0}) on node 1 (rank 1 in comm 0): application called MPI_Abort(comm, {0})\n"
BROKEN = "Abort(15) on node 0 (rank 0 in comm 0): Fatal error in internal_Barrier\n"
LAST_WORDS = {
    "uncaught": (f"{HEAD}E: a\n", "E: a", set()),
    "chained": (f"{HEAD}E: a\n\nDuring handling ...\n\n{HEAD}mod.F: b\n", "mod.F: b", set()),
    "syntax": (
        '  File "x", line 1\n    1 +\nSyntaxError: invalid\n',
        "SyntaxError: invalid",
        set(),
    ),
    "left": (f"{HEAD}E: a\n{HEAD}{LEFT}", "", set()),
    "raised": (f"{HEAD}E: a\n{RAISED}", "E: a", set()),
    "aborted": (ABORT.format(7) + ABORT.format(15), "", {7, 15}),
    "broken": (BROKEN, "", set()),
}


@pytest.mark.parametrize("kind", LAST_WORDS)
def test_last_words(kind):
    """The exception that was not handled, and with which statuses MPI says it was aborted."""
    text, exception, aborts = LAST_WORDS[kind]
    words = output.LastWords()
    for line in text.encode().splitlines(keepends=True):
        words.add(line)
    assert (words.exception, words.aborts) == (exception, aborts)


def test_the_files_that_are_run_by_their_path_are_there():
    """The console script and the ranks run this one."""
    folder = Path(mpi.__file__).parent
    assert (folder / "__main__.py").exists()
    assert "launcher/__main__.py" in (folder / "chainer-dist").read_text()

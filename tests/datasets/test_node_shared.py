"""Parts of something for each rank, in memory that the ranks of a node share."""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.communicators.shared_memory.memory import default_directories
from chainer_dist.datasets.node_file import NodeFile
from chainer_dist.datasets.node_shared import scatter_parts
from chainer_dist.datasets.pickled_parts import Common

# Sizes around what the transport distinguishes: kept in the pickle, collected, sent directly, in
# several chunks.
SIZES = [0, 1, 511, 512, 513, 8191, 8192, 131072, (1 << 20) + 1, (3 << 20) + 3]


@pytest.fixture(name="nodes", params=["one", "each rank", "odd and even"])
def nodes_fixture(request, comm):
    """Return this rank's group of those that are taken to share memory: real ranks, any grouping."""
    color = {"one": 0, "each rank": comm.rank, "odd and even": comm.rank % 2}[request.param]
    node_comm = comm.mpi_comm.Split(color, comm.rank)
    yield node_comm
    node_comm.Free()


@pytest.fixture(name="directory")
def directory_fixture(comm, tmp_path):
    """Return an empty directory that all ranks see."""
    return comm.bcast_obj(tmp_path)


def made_for(rank, sizes):
    """Return a part as the root makes it: arrays of all sizes and dtypes, and other objects."""
    arrays = [np.arange(size, dtype=np.float64) * (rank + 1) for size in sizes]
    return {
        "rank": rank,
        "arrays": arrays,
        "Fortran": np.asfortranarray(np.arange(6000).reshape(60, 100) + rank),
        "text": "x" * 10000,
    }


def check(part, rank, sizes):
    """Check a part against what the root made."""
    expected = made_for(rank, sizes)
    assert part["rank"] == rank
    assert part["text"] == expected["text"]
    for got, array in zip(
        [*part["arrays"], part["Fortran"]], [*expected["arrays"], expected["Fortran"]]
    ):
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)
        if got.nbytes >= 4096:
            assert got.ctypes.data % 64 == 0
        got[...] = -1  # writable
    assert part["Fortran"].flags.f_contiguous


@pytest.mark.parametrize("root", [0, -1])
def test_every_rank_gets_what_was_made_for_it(comm, nodes, directory, root):
    """Arrays of every size arrive whole, aligned and writable, on one node and on several."""
    part = scatter_parts(
        comm,
        root % comm.size,
        lambda rank: made_for(rank, SIZES),
        node_comm=nodes,
        directories=[directory],
    )
    check(part, comm.rank, SIZES)
    comm.mpi_comm.Barrier()
    assert not [*directory.iterdir()]


@given(sizes=st.lists(st.integers(0, 20000), max_size=12))
def test_any_sizes(comm, nodes, sizes):
    """Any mix of array sizes arrives whole."""
    part = scatter_parts(comm, 0, lambda rank: made_for(rank, sizes), node_comm=nodes)
    check(part, comm.rank, sizes)


def test_parts_are_made_one_at_a_time_on_the_root(comm, nodes):
    """The root makes each rank's part once and holds no earlier one while it makes the next."""
    made = []
    alive = []

    class Part:
        def __init__(self, rank):
            alive.append(rank)
            self.rank = rank

        def __reduce__(self):
            return int, (self.rank,)

        def __del__(self):
            alive.remove(self.rank)

    def make(rank):
        assert not alive
        made.append(rank)
        return Part(rank)

    assert scatter_parts(comm, 0, make, node_comm=nodes) == comm.rank
    assert sorted(made) == ([*range(comm.size)] if comm.rank == 0 else [])


def mapping_at(array):
    """Return device, inode and path of the file that an array lies in."""
    address = array.ctypes.data
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        begin, end = (int(each, 16) for each in fields[0].split("-"))
        if begin <= address < end:
            return fields[3], int(fields[4]), fields[5] if len(fields) > 5 else ""
    raise AssertionError("an array lies nowhere")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_ranks_of_a_node_read_one_copy(comm, nodes, directory):
    """What several parts have in common is one file's memory on a node, another's on another."""
    table = np.arange(100000.0)

    def make(rank):
        return rank, Common(table), Common(table), np.full(10000, rank)

    rank, common, again, own = scatter_parts(
        comm, 0, make, node_comm=nodes, directories=[directory]
    )
    assert rank == comm.rank
    assert (own == rank).all()
    assert common is again
    np.testing.assert_array_equal(common.value, table)
    device, inode, path = mapping_at(common.value)
    assert path.startswith(str(directory))
    assert path.endswith("(deleted)")
    assert mapping_at(own)[:2] == (device, inode)
    on_my_node = nodes.allgather(inode)
    assert set(on_my_node) == {inode}
    everywhere = comm.allgather_obj((nodes.allgather(comm.rank), inode))
    assert len({number for _, number in everywhere}) == len({tuple(who) for who, _ in everywhere})

    comm.mpi_comm.Barrier()
    common.value[:] = comm.rank
    comm.mpi_comm.Barrier()
    assert (common.value == comm.rank).all()
    if comm.rank == 0:
        np.testing.assert_array_equal(table, np.arange(100000.0))


def test_what_is_common_is_pickled_once(comm, nodes):
    """A common object is pickled once on the root and unpickled once on each rank."""
    pickled = []

    class Counted:
        def __reduce__(self):
            pickled.append(1)
            return list, ((1, 2),)

    common = Common([Common(Counted()), Counted()])
    part = scatter_parts(comm, 0, lambda rank: [common, common, rank], node_comm=nodes)
    assert part[0] is part[1]
    assert part[0].value[0].value == part[0].value[1] == [1, 2]
    assert part[2] == comm.rank
    assert len(pickled) == (2 if comm.rank == 0 else 0)


@pytest.mark.parametrize("failing", [0, -1])
def test_a_part_that_cannot_be_made_raises_everywhere(comm, nodes, directory, failing):
    """An error on the root, for the first or the last rank, is every rank's; no file is left."""
    failing %= comm.size

    def make(rank):
        if rank == failing:
            raise ArithmeticError(f"no part for {rank}")
        return np.zeros(100000)

    for root in range(comm.size):
        with pytest.raises(ArithmeticError, match=f"no part for {failing}"):
            scatter_parts(comm, root, make, node_comm=nodes, directories=[directory])
        comm.mpi_comm.Barrier()
        assert not [*directory.iterdir()]


@pytest.fixture(name="small_files")
def small_files_fixture():
    """Let this process write no file longer than 64 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_on_one_node_raises_everywhere(comm, nodes, directory, small_files):
    """If one node cannot store its parts, every rank is told how much, and where it was tried."""
    if comm.size - 1 in nodes.allgather(comm.rank):
        small_files()
    with pytest.raises(OSError, match=r"no room for \d{6,} bytes .*tried /.*TMPDIR") as caught:
        scatter_parts(
            comm,
            0,
            lambda rank: np.full(100000, rank, dtype=np.uint8),
            node_comm=nodes,
            directories=[directory / "missing", directory],
        )
    assert f"{directory / 'missing'}: No such file or directory" in str(caught.value)
    assert f"{directory}: File too large" in str(caught.value)
    comm.mpi_comm.Barrier()
    assert not [*directory.iterdir()]


def filled(directories, count):
    """Return a node file to which ``count`` pieces of 100000 bytes were appended."""
    file = NodeFile(directories)
    for number in range(count):
        file.append(memoryview(bytes([number]) * 100000))
    return file


def test_a_node_file_is_private_and_leaves_nothing(tmp_path):
    """The file holds what was appended, only its user may read it, and unlink takes it away."""
    file = filled([tmp_path], 5)
    assert file.position == 500000
    assert file.path.read_bytes() == b"".join(bytes([number]) * 100000 for number in range(5))
    assert file.path.stat().st_mode & 0o777 == 0o600
    file.unlink()
    file.unlink()
    assert not [*tmp_path.iterdir()]


def test_a_node_file_without_room_counts_what_it_needs(tmp_path, small_files):
    """Where no directory takes the file, the error names the bytes that all of it needs."""
    small_files()
    file = filled([tmp_path], 5)
    with pytest.raises(OSError, match="no room for 500000 bytes"):
        file.path  # noqa: B018 - raises
    assert not [*tmp_path.iterdir()]
    with pytest.raises(OSError, match="tried no directory"):
        filled([], 1).path  # noqa: B018 - raises


def test_shared_memory_comes_first(monkeypatch, tmp_path):
    """Node files are put in /dev/shm, then in the directory for temporary files, named once."""
    memory = Path("/dev/shm")  # noqa: S108 - only looked at
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shared = [memory] if memory.is_dir() else []
    assert default_directories() == [*shared, tmp_path]
    monkeypatch.setattr("tempfile.tempdir", str(memory))
    assert default_directories() == shared


IN_A_SMALL_TMPFS = """
import sys
from pathlib import Path
sys.path[:0] = {tests!r}
from test_node_shared import filled
small, large = Path({small!r}), Path({large!r})
file = filled([small, large], 8)
assert file.path.parent == small, file.path
file.unlink()
file = filled([small, large], 10)  # would fit, but leave MPI nothing
assert file.path.parent == large, file.path
assert file.path.read_bytes() == b"".join(bytes([number]) * 100000 for number in range(10))
assert not [*small.iterdir()]
file.unlink()
file = filled([large / "missing", small], 10)  # nowhere else to go
assert file.path.parent == small, file.path
file.unlink()
file = filled([large / "missing", small], 12)
try:
    file.path
except OSError as error:
    assert "no room for 1200000 bytes" in str(error), error
    assert f"{{small}}: No space left on device" in str(error), error
else:
    raise AssertionError("1.2 MB in 1 MiB")
print("all moved")
"""


@pytest.mark.mpi_skip
def test_a_full_shared_memory_is_left_for_a_disk(tmp_path):
    """Too small a /dev/shm makes the file move on with all that it holds, and no rank crash."""
    small, large = tmp_path / "small", tmp_path / "large"
    small.mkdir()
    large.mkdir()
    mounted = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=1m none {small}"
    if not shutil.which("unshare") or subprocess.run([*mounted, mount], check=False).returncode:
        pytest.skip("needs user namespaces, to mount a small tmpfs")
    here = Path(__file__).parent
    tests = [str(here), str(here.parent / "helpers")]
    script = IN_A_SMALL_TMPFS.format(tests=tests, small=str(small), large=str(large))
    done = subprocess.run(
        [*mounted, f'{mount} && exec "$0" -c "$1"', sys.executable, script],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "all moved\n", done.stderr

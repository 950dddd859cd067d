"""Memory that the ranks of a node share."""

from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import numpy as np
import pytest

from chainer_dist.communicators.shared_memory import memory as node_memory


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Put files into a folder of this test alone, and find it empty in the end."""
    monkeypatch.setattr(node_memory, "_SHARED_MEMORY", tmp_path / "shared")
    (tmp_path / "shared").mkdir()
    yield
    assert not list((tmp_path / "shared").iterdir())


def check(comm, nbytes=100_000):
    """Every rank of the node sees what one of them writes."""
    memory = node_memory.share_memory(comm, nbytes)
    assert memory.shape == (nbytes,)
    assert memory.dtype == np.uint8
    assert not memory.any()
    comm.mpi_comm.Barrier()
    if nbytes:
        memory[comm.rank :: comm.size] = comm.rank + 1
        comm.mpi_comm.Barrier()
        expected = np.arange(nbytes) % comm.size + 1
        np.testing.assert_array_equal(memory, expected)
    comm.mpi_comm.Barrier()


@pytest.mark.parametrize("nbytes", [0, 1, 4097, 5_000_000])
def test_all_ranks_see_it(comm, nbytes):
    """It is zeroed, and nothing has its name."""
    check(comm, nbytes)


@pytest.mark.parametrize("anonymous", [True, False])
def test_nobody_else_may_open_it(comm, monkeypatch, anonymous):
    """With a name or without."""
    if not anonymous:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    modes = []

    def look(path, size, token, original=node_memory._map):
        modes.append(path.stat().st_mode & 0o777)
        return original(path, size, token)

    monkeypatch.setattr(node_memory, "_map", look)
    check(comm)
    assert {*modes} == {0o600}


def test_a_file_where_there_is_no_anonymous_memory(comm, monkeypatch):
    """Systems other than Linux have files only."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    check(comm)


def test_a_file_where_a_rank_cannot_see_the_others(comm, monkeypatch):
    """All ranks use the file if one of them cannot open another rank's memory."""
    mapped = []

    def strict(path, size, token, original=node_memory._map):
        mapped.append(path)
        if path.is_relative_to("/proc") and comm.rank == comm.size - 1:
            raise PermissionError(errno.EACCES, "not for you", path)
        return original(path, size, token)

    monkeypatch.setattr(node_memory, "_map", strict)
    check(comm)
    assert not mapped[-1].is_relative_to("/proc")


def test_a_path_that_is_another_file(comm, monkeypatch, tmp_path):
    """Where ranks know other processes by the same number they do not share what is not theirs."""
    other = tmp_path / "other"
    other.write_bytes(bytes(200_000))

    def misled(path, size, token, original=node_memory._map):
        if path.is_relative_to("/proc") and comm.rank == comm.size - 1:
            path = other
        return original(path, size, token)

    monkeypatch.setattr(node_memory, "_map", misled)
    check(comm)
    assert not any(other.read_bytes())


def test_no_room(comm, monkeypatch):
    """Every rank is told how much was wanted."""
    monkeypatch.delattr(os, "memfd_create", raising=False)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if comm.rank == 0:
            patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"no room for the 12345 bytes"):
            node_memory.share_memory(comm, 12345)
        comm.mpi_comm.Barrier()
    check(comm)


def test_it_is_freed_with_the_last_array(comm):
    """It needs no call that all ranks would have to make together."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return
    gc.collect()
    before = maps.read_text().count("chainer_dist")
    memory = node_memory.share_memory(comm, 1000)
    view = memory[5:7].view(np.int8)
    del memory
    view[0] = 3
    assert maps.read_text().count("chainer_dist") == before + 1
    del view
    gc.collect()
    assert maps.read_text().count("chainer_dist") == before

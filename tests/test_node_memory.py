"""Memory that the ranks of a node share."""

from __future__ import annotations

import errno
import gc
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest

from chainer_dist.communicators import node_memory


def leftovers():
    """Return the names of our files where shared memory and temporary files are."""
    places = [node_memory._SHARED_MEMORY, Path(tempfile.gettempdir())]
    return {path for place in places if place.is_dir() for path in place.glob("chainer_dist-*")}


def check(comm, nbytes=100_000):
    """Every rank of the node sees what one of them writes."""
    before = leftovers()
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
    assert leftovers() <= before


@pytest.mark.parametrize("nbytes", [0, 1, 4097, 5_000_000])
def test_all_ranks_see_it(comm, nbytes):
    """It is zeroed, and nothing has its name."""
    check(comm, nbytes)


def test_a_file_where_there_is_no_anonymous_memory(comm, monkeypatch):
    """Systems other than Linux have files only."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    check(comm)


def test_a_file_where_a_rank_cannot_see_the_others(comm, monkeypatch):
    """All ranks use the file if one of them cannot open another rank's memory."""
    mapped = []

    def strict(path, size, original=node_memory._map):
        mapped.append(path)
        if path.startswith("/proc") and comm.rank == comm.size - 1:
            raise PermissionError(errno.EACCES, "not for you", path)
        return original(path, size)

    monkeypatch.setattr(node_memory, "_map", strict)
    check(comm)
    assert not mapped[-1].startswith("/proc")


def test_no_room(comm, monkeypatch):
    """Every rank is told how much was wanted."""
    monkeypatch.delattr(os, "memfd_create", raising=False)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = leftovers()
    with monkeypatch.context() as patch:
        if comm.rank == 0:
            patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(OSError, match=r"no room for the 12345 bytes"):
            node_memory.share_memory(comm, 12345)
        comm.mpi_comm.Barrier()
    assert leftovers() <= before
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

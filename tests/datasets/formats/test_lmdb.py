"""LMDB databases: keys, decoding, and the one environment that a process may have."""

from __future__ import annotations

import gc
import pickle

import lmdb
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.datasets import LMDBDataset

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks


def write(path, items, **options):
    """Write a database."""
    environment = lmdb.open(str(path), map_size=1 << 24, **options)
    with environment, environment.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key, value)
    return path


@given(
    items=st.dictionaries(st.binary(min_size=1, max_size=9), st.binary(max_size=20), min_size=1),
    subdir=st.booleans(),
)
def test_values_in_the_order_of_their_keys(tmp_path_factory, items, subdir):
    """Any keys and values, in a folder and in a file; the same after pickling."""
    path = write(tmp_path_factory.mktemp("lmdb") / "data", items, subdir=subdir)
    dataset = LMDBDataset(path)
    expected = [items[key] for key in sorted(items)]
    assert [*dataset] == expected
    assert pickle.loads(pickle.dumps(dataset))[:] == expected


def test_keys_may_be_chosen(tmp_path):
    """In their order, of one path; a key that is not there is told when it is read."""
    path = write(tmp_path / "data", {b"a": b"1", b"b": b"2", b"__len__": b"2"})
    dataset = LMDBDataset(path, keys=[b"b", b"a", b"c"])
    assert dataset[:2] == [b"2", b"1"]
    assert pickle.loads(pickle.dumps(dataset))[:2] == [b"2", b"1"]
    with pytest.raises(ValueError, match=r"data: samples 2 cannot be read: there is no key b'c'"):
        dataset[2]
    with pytest.raises(ValueError, match="paths is a list"):
        LMDBDataset([path], keys=[b"a"])


def test_named_databases_are_refused(tmp_path):
    """What the main database has in the place of their values is none; a value as long as that is one."""
    path = write(tmp_path / "data", {b"a": b"1" * 48, b"b": b""})
    assert LMDBDataset(path)[:] == [b"1" * 48, b""]
    environment = lmdb.open(str(path), map_size=1 << 24, max_dbs=1)
    with environment, environment.begin(write=True) as transaction:
        transaction.put(b"k", b"v", db=environment.open_db(b"train", txn=transaction))
    with pytest.raises(ValueError, match=r"data cannot be opened .* a database named b'train'"):
        LMDBDataset(path)
    assert LMDBDataset(path, keys=[b"b"])[0] == b""


def fail(value):
    """Decode nothing."""
    raise ZeroDivisionError(f"no sample in {value!r}")


def test_what_cannot_be_decoded_is_named(tmp_path):
    """By file and key, in an error of the same class."""
    path = write(tmp_path / "data", {b"a": b"1", b"b": b"2"})
    with pytest.raises(ZeroDivisionError, match=r"data: the value of b'b' .*no sample in b'2'"):
        LMDBDataset(path, fail)[1]


def test_datasets_of_a_process_share_the_environment(tmp_path):
    """As LMDB demands; the last one closes it, so that it can be written to again."""
    path = write(tmp_path / "data", {b"a": b"1"})
    first, second = LMDBDataset(path), LMDBDataset(path)
    assert first[0] == second[0] == b"1"
    first.close()
    assert second[0] == b"1"
    second.close()
    write(path, {b"a": b"2"})
    del first, second
    gc.collect()
    assert LMDBDataset(path)[0] == b"2"


def test_an_environment_of_the_script_is_told(tmp_path):
    """Whoever has the file open must close it."""
    path = write(tmp_path / "data", {b"a": b"1"})
    expected = pytest.raises(
        lmdb.Error, match=r"data cannot be opened by LMDBDataset: .*already open"
    )
    with lmdb.open(str(path), readonly=True, lock=False), expected:
        LMDBDataset(path)
    assert LMDBDataset(path)[0] == b"1"


def test_large_values(tmp_path):
    """Those that take pages of their own."""
    rows = np.random.RandomState(0).bytes(300_000), b"", np.random.RandomState(1).bytes(5000)
    path = write(tmp_path / "data", {bytes([i]): row for i, row in enumerate(rows)})
    assert LMDBDataset(path)[[2, 0, 1]] == [rows[2], rows[0], rows[1]]

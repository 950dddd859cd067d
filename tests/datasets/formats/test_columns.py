"""Named columns, dtypes and layouts of HDF5, Zarr and Parquet files, against what was written."""

from __future__ import annotations

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from chainer.dataset import concat_examples
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.datasets import HDF5Dataset, ParquetDataset, TarDataset, ZarrDataset
from dataset_kinds import assert_same_sample
from stored_files import FORMATS, create_zarr, make_samples

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks

DTYPES = ["?", "u1", "i2", ">i4", "i8", "f2", "f4", ">f8", "c8"]

CLASSES = {"hdf5": HDF5Dataset, "parquet": ParquetDataset, "zarr": ZarrDataset}


def write(name, path, **columns):
    """Write arrays as columns."""
    if name == "hdf5":
        with h5py.File(path, "w") as file:
            for key, column in columns.items():
                file[key] = column
    elif name == "zarr":
        group = zarr.open_group(str(path), mode="w")
        for key, column in columns.items():
            create_zarr(group, key, column, column.shape)
    else:
        pq.write_table(pa.table({key: [*column] for key, column in columns.items()}), path)


@pytest.fixture(params=CLASSES)
def name(request):
    """Return the name of a format."""
    return request.param


@pytest.mark.parametrize(("columns", "kind"), [(["x"], tuple), ("x", np.float32), (None, dict)])
def test_columns_say_what_a_sample_is(tmp_path, name, columns, kind):
    """A list of names makes tuples, a name the value, and none at all dicts; batches fit together."""
    write(name, tmp_path / "data", x=np.arange(3, dtype=np.float32), y=np.arange(3))
    dataset = CLASSES[name](tmp_path / "data", columns)
    assert type(dataset[1]) is kind
    x = np.arange(3, dtype=np.float32)
    batch = concat_examples(dataset[:])
    expected = {"x": x, "y": np.arange(3)} if kind is dict else (x,) if kind is tuple else x
    assert_same_sample(batch, expected)


def test_tuples_have_the_order_of_the_list(tmp_path, name):
    """Not that of the file."""
    write(name, tmp_path / "data", a=np.arange(3), b=np.arange(3) * 2.0)
    assert CLASSES[name](tmp_path / "data", ["b", "a"])[2] == (4.0, 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["hdf5", "zarr"])
def test_dtypes_are_kept(tmp_path, name, dtype):
    """Of either order of bytes, for rows and for scalars."""
    x = np.random.RandomState(0).randint(0, 2, (5, 2)).astype(dtype)
    write(name, tmp_path / "data", x=x, t=x[:, 0].copy())
    dataset = CLASSES[name](tmp_path / "data", ["x", "t"])
    for k in range(5):
        row, scalar = dataset[k]
        assert row.dtype.newbyteorder("=") == x.dtype.newbyteorder("=")
        np.testing.assert_array_equal(row, x[k])
        assert_same_sample(scalar, x[k, 0])


@pytest.mark.parametrize("name", ["hdf5", "zarr"])
def test_columns_may_be_in_groups(tmp_path, name):
    """By the path in the file; those at the top alone are taken by themselves."""
    write(
        name,
        tmp_path / "data",
        **{"train/x": np.arange(4), "test/x": np.arange(2), "x": np.arange(3)},
    )
    assert CLASSES[name](tmp_path / "data", "train/x")[:] == [0, 1, 2, 3]
    assert CLASSES[name](tmp_path / "data")[1] == {"x": 1}


@pytest.mark.parametrize("name", ["hdf5", "zarr"])
def test_columns_must_be_equally_long(tmp_path, name):
    """The error has the length of each."""
    write(name, tmp_path / "data", x=np.arange(3), t=np.arange(4))
    with pytest.raises(ValueError, match=r"data cannot .*numbers of rows: .*'t': 4"):
        CLASSES[name](tmp_path / "data")
    assert len(CLASSES[name](tmp_path / "data", ["x"])) == 3


@pytest.mark.parametrize("name", ["hdf5", "zarr"])
def test_a_scalar_is_no_column(tmp_path, name):
    """What has no rows is told by name."""
    write(name, tmp_path / "data", x=np.array(3))
    with pytest.raises(ValueError, match=r"data cannot .*'x' has no dimension"):
        CLASSES[name](tmp_path / "data")


def test_a_missing_column_is_named(tmp_path, name):
    """With those that there are."""
    write(name, tmp_path / "data", x=np.arange(3))
    with pytest.raises(ValueError, match=r"data cannot .*no column 'y', there are \['x'\]"):
        CLASSES[name](tmp_path / "data", ["x", "y"])


@pytest.mark.parametrize("name", [*CLASSES, "tar"])
def test_columns_are_names(tmp_path, name):
    """Each once, and one at least."""
    make = TarDataset if name == "tar" else CLASSES[name]
    for columns, error in [([], ValueError), (["x", "x"], ValueError), ([1], TypeError)]:
        with pytest.raises(error, match="columns is"):
            make(tmp_path / "data", columns)


def test_files_must_have_the_same_columns(tmp_path, name):
    """The second file is told by name, with both."""
    write(name, tmp_path / "a", x=np.arange(3))
    write(name, tmp_path / "b", x=np.arange(3.0))
    with pytest.raises(ValueError, match=r"b has .*, expected .* as in .*a"):
        CLASSES[name]([tmp_path / "a", tmp_path / "b"], ["x"])


@pytest.mark.parametrize("cache_bytes", [0, 100, 1 << 20])
def test_any_cache_gives_the_same(tmp_path, name, cache_bytes):
    """Of no blocks, of some, of all."""
    samples = make_samples(20)
    write_, _ = FORMATS[name]
    write_(tmp_path / "data", samples, 3)
    dataset = CLASSES[name](tmp_path / "data", ["x", "t"], cache_bytes=cache_bytes)
    order = np.random.RandomState(0).permutation(20)
    assert_same_sample(dataset[order], [samples[i] for i in order])
    assert_same_sample([dataset[i] for i in order], [samples[i] for i in order])


def test_compound_and_text_in_hdf5(tmp_path):
    """Records stay records, and texts are bytes, as h5py has them."""
    records = np.array([(1, 2.5), (3, 4.5)], dtype=[("a", "i4"), ("b", "f8")])
    with h5py.File(tmp_path / "data", "w") as file:
        file["r"] = records
        file["s"] = ["one", "zwölf"]
    dataset = HDF5Dataset(tmp_path / "data")
    assert dataset[1]["r"] == records[1]
    assert dataset[1]["r"].dtype == records.dtype
    assert dataset[1]["s"] == "zwölf".encode()


def test_a_zarr_array_without_a_group(tmp_path):
    """Its rows are the samples."""
    x = np.arange(15).reshape(5, 3)
    array = zarr.open(str(tmp_path / "data"), mode="w", shape=(5, 3), chunks=(2, 2), dtype=x.dtype)
    array[...] = x
    assert_same_sample(ZarrDataset(tmp_path / "data")[[4, 1]], [x[4], x[1]])
    with pytest.raises(ValueError, match=r"data cannot .*without a group"):
        ZarrDataset(tmp_path / "data", ["x"])


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_versions_of_the_zarr_format(tmp_path, zarr_format):
    """Both are read."""
    if zarr_format == 3 and zarr.__version__.startswith("2."):
        pytest.skip("version 2 of the library reads format 2 alone")
    options = {} if zarr.__version__.startswith("2.") else {"zarr_format": zarr_format}
    group = zarr.open_group(str(tmp_path / "data"), mode="w", **options)
    create_zarr(group, "x", np.arange(9), (4,))
    assert ZarrDataset(tmp_path / "data", "x")[[8, 0]] == [8, 0]


def test_a_zarr_group_in_a_zip_file(tmp_path):
    """Read as one in a folder is; closing it closes the file."""
    store = getattr(zarr, "storage", zarr).ZipStore(str(tmp_path / "data.zip"), mode="w")
    create_zarr(zarr.open_group(store, mode="w"), "x", np.arange(9), (4,))
    store.close()
    dataset = ZarrDataset(tmp_path / "data.zip", "x")
    assert dataset[[8, 0]] == [8, 0]
    dataset.close()
    assert dataset[3] == 3


def parquet(path, group=3, **columns):
    """Write columns, arrow's or Python's, and return the dataset."""
    pq.write_table(pa.table(columns), path, row_group_size=group)
    return ParquetDataset(path)


@pytest.mark.parametrize(
    "kind", ["int8", "uint16", "int32", "int64", "float16", "float32", "float64", "bool"]
)
@given(data=st.data())
def test_numbers_of_parquet_keep_their_type(tmp_path_factory, kind, data):
    """Rows, and lists of one and of any length."""
    path = tmp_path_factory.mktemp("parquet") / "data"
    numbers = st.integers(0, 1)
    dtype = np.dtype(kind).type
    kind = pa.from_numpy_dtype(dtype)
    rows = data.draw(st.lists(st.lists(numbers, max_size=4), min_size=1, max_size=8))
    rows = [np.array(row, dtype) for row in rows]
    fixed = np.arange(len(rows) * 6).reshape(len(rows), 2, 3).astype(dtype)
    nested = pa.list_(pa.list_(kind, 3), 2)
    dataset = parquet(
        path,
        single=pa.array([dtype(len(row) % 2) for row in rows], kind),
        ragged=pa.array(rows, pa.list_(kind)),
        fixed=pa.array([[[*map(dtype, line)] for line in row] for row in fixed], nested),
    )
    for k, row in enumerate(rows):
        expected = {"single": dtype(len(row) % 2), "ragged": row, "fixed": fixed[k]}
        assert_same_sample(dataset[k], expected)
        assert_same_sample(dataset[[k, k]], [expected, expected])


def test_other_values_of_parquet(tmp_path):
    """Texts, bytes, structures, moments and dictionaries."""
    moments = np.arange(4).astype("M8[ms]")
    images = [{"bytes": bytes([i]), "path": None} for i in range(4)]
    dataset = parquet(
        tmp_path / "data",
        text=["a", None, "c", "d"],
        image=images,
        moment=moments,
        word=pa.array(["x", "y", "x", "x"]).dictionary_encode(),
        lists=[[["a"], []], [], [["b", "c"]], [[]]],
    )
    assert [sample["text"] for sample in dataset] == ["a", None, "c", "d"]
    assert [sample["image"] for sample in dataset] == images
    assert [sample["moment"] for sample in dataset] == [*moments]
    assert [sample["word"] for sample in dataset] == ["x", "y", "x", "x"]
    assert [sample["lists"] for sample in dataset] == [[["a"], []], [], [["b", "c"]], [[]]]


@pytest.mark.parametrize("column", [[1, None], [None, 1.5], [[1], None], [[1], [None]]], ids=str)
def test_missing_numbers_are_refused(tmp_path, column):
    """They would change the type of the others; the error has the file and the column."""
    dataset = parquet(tmp_path / "data", x=column)
    with pytest.raises(
        ValueError, match=r"data: samples 1 cannot be read: column 'x' has 1 missing"
    ):
        dataset[1]


def test_only_wanted_columns_are_read(tmp_path):
    """A column that nothing can be made of is no matter as long as it is not asked for."""
    pq.write_table(pa.table({"x": [1, 2], "bad": pa.array([1, None])}), tmp_path / "data")
    assert ParquetDataset(tmp_path / "data", "x")[:] == [1, 2]

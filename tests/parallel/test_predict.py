"""A model on all ranks, against the same model in one process."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist import (
    FailedItem,
    FailedItemsError,
    RankMismatchError,
    predict,
    scatter_dataset,
)
from chainer_dist.datasets import FilesDataset
from dataset_kinds import assert_same_sample

N = 23


class Model(chainer.Chain):
    """Behaves differently in training, and returns what it is asked to."""

    def __init__(self, form="array"):
        super().__init__()
        self.form = form
        rng = np.random.RandomState(0)
        with self.init_scope():
            self.linear = L.Linear(4, 3, initialW=rng.randn(3, 4).astype(np.float32))
            self.norm = L.BatchNormalization(3)

    def forward(self, x):
        """Return scores of the batch, which must have no negative sample."""
        assert not chainer.config.train
        assert not chainer.config.enable_backprop
        if (np.asarray(x) < 0).any():
            raise ArithmeticError(f"a negative one among {len(x)}")
        y = F.dropout(self.norm(self.linear(x)))
        return {
            "array": lambda: y.array,
            "variable": lambda: y,
            "labels": lambda: y.array.argmax(axis=1),
            "tuple": lambda: (y, y.array[:, 0]),
            "dict": lambda: {"scores": y, "label": y.array.argmax(axis=1)},
        }[self.form]()


def samples(n=N, bad=()):
    """Return samples, of which some make the model raise."""
    x = np.random.RandomState(1).rand(n, 4).astype(np.float32)
    x[list(bad)] *= -1
    return x


def expected(model, x):
    """Return what the model alone returns for each sample."""
    results = []
    for each in x:
        with chainer.using_config("train", value=False), chainer.no_backprop_mode():
            y = model(each[None])
        arrays = y if isinstance(y, (tuple, dict)) else (y,)
        values = arrays.values() if isinstance(arrays, dict) else arrays
        rows = [getattr(array, "array", array)[0] for array in values]
        if isinstance(y, dict):
            results.append(dict(zip(y, rows)))
        else:
            results.append(tuple(rows) if isinstance(y, tuple) else rows[0])
    return results


def assert_close(got, wanted):
    """Compare samples within the rounding of a matrix product of another size."""

    def rounded(x):
        if isinstance(x, dict):
            return {key: rounded(each) for key, each in x.items()}
        if isinstance(x, tuple):
            return tuple(rounded(each) for each in x)
        return np.round(x, 4) + np.float32(0) if x.dtype == np.float32 else x

    assert len(got) == len(wanted)
    for one, other in zip(got, wanted):
        assert_same_sample(rounded(one), rounded(other))


@given(
    n=st.integers(0, N),
    batchsize=st.integers(1, 8),
    form=st.sampled_from(["array", "variable", "labels", "tuple", "dict"]),
    everywhere=st.booleans(),
    only_root=st.booleans(),
)
def test_it_is_the_model_alone(comm, n, batchsize, form, everywhere, only_root):
    """Every sample's result in order, on rank 0 or all, whoever has the dataset."""
    model = Model(form)
    dataset = None if only_root and comm.rank > 0 else samples(n)
    got = predict(model, dataset, comm, batchsize=batchsize, everywhere=everywhere)
    if comm.rank == 0 or everywhere:
        assert_close(got, expected(model, samples(n)))
    else:
        assert got is None


class Unreadable:
    """A dataset some of whose samples cannot be loaded."""

    def __init__(self, x, missing):
        self.x = x
        self.missing = missing

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        if index in self.missing:
            raise OSError(f"no sample {index}")
        return self.x[index]


@given(
    bad=st.sets(st.integers(0, N - 1)),
    missing=st.sets(st.integers(0, N - 1), max_size=4),
    batchsize=st.integers(1, 9),
    everywhere=st.booleans(),
    only_root=st.booleans(),
)
def test_only_the_culprits_are_lost(comm, bad, missing, batchsize, everywhere, only_root):
    """Samples that cannot be loaded or computed leave the rest of their batches alone."""
    model = Model("dict")
    dataset = Unreadable(samples(N, bad), missing)
    here = None if only_root and comm.rank > 0 else dataset
    options = {"batchsize": batchsize, "everywhere": everywhere}
    lost = bad | missing

    def check(got):
        if comm.rank > 0 and not everywhere:
            assert got is None
            return
        for number, each in enumerate(got):
            if number in lost:
                text = f"no sample {number}" if number in missing else "a negative one among 1"
                assert isinstance(each, FailedItem)
                assert each.index == number
                assert text in each.error
        good = [i for i in range(N) if i not in lost]
        assert_close([got[i] for i in good], expected(model, dataset.x[good]))

    check(predict(model, here, comm, on_error="return", **options))
    if lost:
        with pytest.raises(FailedItemsError, match=f"{len(lost)} of the items failed") as caught:
            predict(model, here, comm, **options)
        assert [each.index for each in caught.value.failures] == sorted(lost)
        check(caught.value.results)


def shared(comm, tmp_path):
    """Return one folder for all ranks."""
    return Path(comm.bcast_obj(str(tmp_path)))


@pytest.mark.parametrize("form", ["labels", "tuple", "dict"])
@pytest.mark.parametrize("bad", [(), (0, 7, 8, 9, 22)])
def test_files(comm, tmp_path, form, bad):
    """Each rank writes what it has computed; all files together are a dataset in order."""
    model = Model(form)
    out = shared(comm, tmp_path) / "new" / "scores"
    options = {"batchsize": 3, "out": out, "samples_per_file": 4}  # two batches, then
    if bad:
        with pytest.raises(FailedItemsError) as caught:
            predict(model, samples(N, bad), comm, **options)
        assert caught.value.results is None
        files = sorted(out.glob("*.npz"))
    else:
        files = predict(model, samples(), comm, **options)
        assert files == sorted(out.glob("*.npz"))
    rows = FilesDataset(files)
    good = [i for i in range(N) if i not in bad]
    assert [int(row["index"]) for row in rows] == good
    names = {
        "labels": lambda row: row["output"],
        "tuple": lambda row: (row["output/0"], row["output/1"]),
        "dict": lambda row: {"scores": row["output/scores"], "label": row["output/label"]},
    }
    assert_close([names[form](row) for row in rows], expected(model, samples()[good]))
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    assert index["length"] == N
    assert [each["file"] for each in index["files"]] == [file.name for file in files]
    assert [each["first"] for each in index["files"]] == list(range(0, N, 6))
    assert sum(each["n_samples"] for each in index["files"]) == len(good)
    assert [each["index"] for each in index["failures"]] == sorted(bad)
    assert not list(out.glob(".*"))
    with pytest.raises(FileExistsError, match="is not empty: remove it, or name another"):
        predict(model, samples(), comm, **options)


def test_files_of_a_dataset_on_rank_0(comm, tmp_path):
    """Where only rank 0 has the samples; an empty dataset has an index as well."""
    out = shared(comm, tmp_path)
    x = samples(200)
    here = x if comm.rank == 0 else None
    files = predict(Model(), here, comm, out=out / "a", batchsize=2)
    assert len(files) >= 8
    assert_close([row["output"] for row in FilesDataset(files)], expected(Model(), x))
    assert predict(Model(), here if here is None else x[:0], comm, out=out / "b") == []
    assert json.loads((out / "b" / "index.json").read_text(encoding="utf-8"))["length"] == 0


def test_a_file_that_cannot_be_written(comm, tmp_path):
    """Its samples are lost, no others, and no part of the file is left."""
    out = shared(comm, tmp_path) / "ragged"

    def ragged(x):
        return np.zeros((len(x), 1 + int(5 in np.asarray(x))))

    got = predict(
        ragged, np.arange(10), comm, out=out, batchsize=2, samples_per_file=4, on_error="return"
    )
    assert [file.name for file in got] == [
        "samples-0000000000-0000000003.npz",
        "samples-0000000008-0000000009.npz",
    ]
    index = json.loads((out / "index.json").read_text(encoding="utf-8"))
    assert [each["index"] for each in index["failures"]] == [4, 5, 6, 7]
    assert "dimension" in index["failures"][0]["error"]


@pytest.mark.parametrize(
    ("output", "text"),
    [
        (lambda x: x.sum(), r"shape \(\) for 1 samples, expected arrays of shape \(1, ...\)"),
        (lambda x: float(x.sum()), "float for 1 samples"),
        (lambda x: (x, x[:0]), r"shape \(0, 4\)"),
        (lambda _: {}, "an empty dict"),
    ],
)
def test_models_that_return_no_rows(comm, output, text):
    """Each sample fails, and the error says what is expected."""
    with pytest.raises(FailedItemsError, match=text):
        predict(output, samples(), comm, batchsize=5)


def test_converters_and_callables(comm):
    """A converter makes arguments, named ones too; any callable is a model."""
    dataset = [{"x": np.float32(i), "y": np.float32(i * i)} for i in range(N)]
    got = predict(lambda x, y: x + y, dataset, comm, everywhere=True, batchsize=4)
    assert got == [i + i * i for i in range(N)]
    model = L.Classifier(Model())

    def images(batch, device=None):
        assert device is None
        return np.stack([image for image, _ in batch])

    pairs = chainer.datasets.TupleDataset(samples(), np.zeros(N))
    got = predict(model.predictor.forward, pairs, comm, everywhere=True, converter=images)
    assert_close(got, expected(Model(), samples()))


def test_models_that_differ(comm):
    """Ranks with other parameters or running statistics would make results a matter of chance."""
    if comm.size == 1:
        pytest.skip("one model cannot differ")
    last = comm.size - 1
    model = Model()
    if comm.rank == last:
        model.linear.W.array[0, 0] += 1
    with pytest.raises(RankMismatchError, match=rf"rank {last}: /linear/W is \(3, 4\) float32"):
        predict(model, samples(), comm)
    comm.bcast_data(model)
    if comm.rank == last:
        model.norm.avg_mean += 1
    with pytest.raises(RankMismatchError, match=rf"rank {last}: /norm/avg_mean"):
        predict(model, samples(), comm)


class Unprintable:
    """A value that cannot be described."""

    def __repr__(self):
        raise OSError("no words")


def test_persistent_values_of_any_dtype(comm):
    """They are compared, whether or not another library could share their memory; an error is one of all ranks."""
    last = comm.size - 1
    for value in (
        np.array(["2026-01-01", "NaT"], "M8[D]"),
        np.timedelta64(3, "s"),
        np.array(["a", "bc"]),
        np.zeros((0, 3), ">f4"),
        np.array([1, None], object),
        np.array([(1, 2.0)], [("a", "i2"), ("b", "f8")]),
    ):
        model = Model()
        model.add_persistent("value", value)
        assert_close(predict(model, samples(), comm, everywhere=True), expected(Model(), samples()))
        if comm.size > 1 and np.size(value):
            if comm.rank == last:
                model.value = value[:0] if np.ndim(value) else value + 1
            with pytest.raises(RankMismatchError, match=rf"rank {last}: /value is"):
                predict(model, samples(), comm)
    model = Model()
    model.add_persistent("value", Unprintable() if comm.rank == last else 3)
    with pytest.raises(OSError, match=f"rank {last}: no words" if comm.size > 1 else "no words"):
        predict(model, samples(), comm)


def test_wrong_arguments_are_errors_on_all(comm):
    """Whatever is wrong on one rank, every rank says so."""
    last = comm.size - 1
    call = functools.partial(predict, Model(), comm=comm)
    for options, kind, text in (
        ({"batchsize": 0}, ValueError, "batchsize is 0, expected 1 or more"),
        ({"samples_per_file": 0}, ValueError, "samples_per_file is 0"),
        ({"on_error": None}, ValueError, "on_error is None, expected 'raise' or 'return'"),
    ):
        with pytest.raises(kind, match=text):
            call(samples(), **(options if comm.rank == last else {}))
    with pytest.raises(ValueError, match="dataset is None, which it may be on other ranks"):
        call(None)
    with pytest.raises(TypeError, match="a rank's part of a dataset, expected all samples"):
        call(scatter_dataset(samples(), comm))
    with pytest.raises(TypeError, match="has no len"):
        call(iter(samples()))
    with pytest.raises(ValueError, match="/W is not initialized: load the model, or call it once"):
        predict(L.Linear(None, 2), samples(), comm)
    if comm.size > 1:
        with pytest.raises(
            RankMismatchError, match=rf"rank {last}: the length of the dataset is 3"
        ):
            call(samples(3 if comm.rank == last else N))
        with pytest.raises(RankMismatchError, match="batchsize is"):
            call(samples(), batchsize=1 + comm.rank)
    with pytest.raises(NotADirectoryError):
        call(samples(), out=Path(__file__) / "scores")


def test_progress(comm, capsys):
    """Rank 0 alone shows a bar."""
    pytest.importorskip("tqdm")
    predict(Model(), samples(), comm, progress=True, batchsize=4)
    assert (f"{N}/{N}" in capsys.readouterr().err) == (comm.rank == 0)

"""Datasets of some samples of a dataset."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
from chainer import datasets
from chainer.dataset import DatasetMixin
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.datasets import take
from chainer_dist.datasets.scattered import ScatteredDataset
from dataset_kinds import KINDS, LazyDataset, assert_same_sample, double

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_samples_are_those_at_the_indices(kind, data):
    """Sample k is the dataset's sample indices[k], for every kind, order and repetition."""
    n = data.draw(st.integers(1, 12), label="samples")
    indices = data.draw(st.lists(st.integers(0, n - 1), max_size=15), label="indices")
    dataset = KINDS[kind](n)
    part = take(dataset, indices)
    assert len(part) == len(indices)
    for k, i in enumerate(indices):
        assert_same_sample(part[k], dataset[i])


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_part_of_a_part_is_a_part(kind, data):
    """Taking twice, and after a trip through pickle, gives the same as taking once."""
    n = data.draw(st.integers(1, 8), label="samples")
    first = np.array(data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=9)))
    second = np.array(data.draw(st.lists(st.integers(0, len(first) - 1), max_size=9)), dtype=int)
    dataset = KINDS[kind](n)
    part = pickle.loads(pickle.dumps(take(take(dataset, first), second)))
    assert len(part) == len(second)
    for k, i in enumerate(first[second]):
        assert_same_sample(part[k], dataset[int(i)])


@pytest.mark.parametrize(
    "kind", ["matrix", "list", "tuples", "dicts", "permuted", "transformed", "concatenated"]
)
@pytest.mark.parametrize("order", ["interval", "shuffled"])
def test_a_part_holds_no_other_samples(kind, order):
    """What is pickled for a tenth of the samples is about a tenth of the dataset."""
    n = 1000
    indices = np.arange(300, 400)
    if order == "shuffled":
        indices = np.random.RandomState(0).permutation(n)[:100]
    whole = len(pickle.dumps(KINDS[kind](n)))
    part = len(pickle.dumps(take(KINDS[kind](n), indices)))
    assert part < whole / 10 + 1500


def test_an_interval_of_an_array_is_a_view():
    """Nothing is copied where nothing has to be."""
    array = np.arange(20.0).reshape(10, 2)
    assert np.shares_memory(take(array, np.arange(3, 7)), array)
    assert not np.shares_memory(take(array, [3, 5, 4]), array)


@pytest.mark.parametrize("kind", ["matrix", "Fortran order", "strided", "memmap"])
def test_taken_arrays_are_contiguous(kind):
    """A part of an array of any layout is an ordinary array, contiguous in memory."""
    for indices in ([2, 3, 4], [4, 1]):
        part = take(KINDS[kind](6), indices)
        assert type(part) is np.ndarray
        assert part.flags.c_contiguous


def test_masked_arrays_stay_masked():
    """A subclass of array that indexes itself keeps its class."""
    array = np.ma.masked_equal(np.arange(6), 2)
    part = take(array, [2, 4])
    assert part.mask.tolist() == [True, False]


def test_nothing_is_loaded():
    """Neither a transform nor a dataset of unknown kind is asked for a sample."""
    lazy = LazyDataset(9)
    for dataset in (
        lazy,
        datasets.TransformDataset(lazy, pytest.fail),
        datasets.SubDataset(lazy, 0, 9, np.arange(9)[::-1]),
        datasets.ConcatenatedDataset(lazy, lazy),
    ):
        take(dataset, [8, 1, 2])
    assert lazy.loads == 0
    take(lazy, [8, 1, 2])[0]
    assert lazy.loads == 1


@pytest.fixture(name="images")
def images_fixture(tmp_path):
    """Return the names of ten grey images in a directory and in a zip file, and their arrays."""
    Image = pytest.importorskip("PIL.Image")
    names = [f"{i}.png" for i in range(10)]
    for i, name in enumerate(names):
        Image.fromarray(np.full((2, 3), 10 * i, dtype=np.uint8)).save(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name in names:
            archive.write(tmp_path / name, name)
    pairs = [(name, i) for i, name in enumerate(names)]
    lines = "".join(f"{name} {label}\n" for name, label in pairs)
    (tmp_path / "labels.txt").write_text(lines, encoding="ascii")
    return tmp_path, names, pairs


@pytest.mark.parametrize("kind", ["files", "labeled", "zipped", "labeled and zipped"])
def test_image_datasets_stay_lazy(images, kind):
    """Of datasets of image files only the file names are taken; files are read when asked for."""
    root, names, pairs = images
    dataset, listed = {
        "files": lambda: (datasets.ImageDataset(names, str(root)), "_paths"),
        "labeled": lambda: (datasets.LabeledImageDataset(pairs, str(root)), "_pairs"),
        "zipped": lambda: (datasets.ZippedImageDataset(str(root / "all.zip")), "_paths"),
        "labeled and zipped": lambda: (
            datasets.LabeledZippedImageDataset(str(root / "all.zip"), str(root / "labels.txt")),
            "_pairs",
        ),
    }[kind]()
    part = pickle.loads(pickle.dumps(take(dataset, [7, 2])))
    assert type(part) is type(dataset)
    assert len(getattr(part, listed)) == 2
    assert b"5.png" not in pickle.dumps(part)
    for k, i in enumerate([7, 2]):
        assert_same_sample(part[k], dataset[i])
    if "zipped" not in kind:
        (root / "2.png").unlink()
        with pytest.raises(FileNotFoundError):
            part[1]


class OwnPaths(DatasetMixin):
    """A user's dataset, which `take` is taught below."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)

    def get_example(self, i):
        """Return the path instead of reading it."""
        return self.paths[i]


def test_take_learns_classes():
    """A registered class is cut as its author says, also within Chainer's datasets."""

    @take.register(OwnPaths)
    def _(dataset, indices):
        return OwnPaths([dataset.paths[i] for i in indices])

    part = take(datasets.TransformDataset(OwnPaths(["a", "b", "c"]), double), [2, 0])
    assert part._dataset.paths == ["c", "a"]
    assert [*part] == ["cc", "aa"]


def test_a_scattered_dataset_can_be_taken_from():
    """A rank's part is cut like any SubDataset."""
    part = take(ScatteredDataset(list(range(10)), 2, 8, np.arange(10)[::-1], n_own=5), [0, 5])
    assert part == [7, 2]


def test_negative_entries_of_an_order_count_from_the_end():
    """An order of a SubDataset may hold negative positions, as indexing allows them."""
    dataset = datasets.SubDataset([5, 6, 7], 0, 3, [-1, 0, -2])
    assert [*take(dataset, [0, 2])] == [dataset[0], dataset[2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("indices", "error"),
    [([4], IndexError), ([-1], IndexError), ([0.5], TypeError), ([[1]], TypeError)],
)
def test_bad_indices_are_refused(kind, indices, error):
    """Indices that are no positions in the dataset raise, whatever the kind."""
    with pytest.raises(error):
        take(KINDS[kind](4), indices)

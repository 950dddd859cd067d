"""Tar files in the layout of WebDataset, against Python's own extraction of them."""

from __future__ import annotations

import gzip
import io
import pickle
import tarfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.datasets import TarDataset, decode_member
from dataset_kinds import assert_same_sample
from stored_files import add_member, npy

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks


def write(path, *members, **options):
    """Write files, given as (name, bytes), into a tar file."""
    with tarfile.open(path, "w", **options) as archive:
        for name, data in members:
            add_member(archive, name, data)
    return path


def as_bytes(extension, data):
    """Decode nothing."""
    del extension
    return data


FORMATS = {"pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT, "ustar": tarfile.USTAR_FORMAT}


@pytest.mark.parametrize("format_", FORMATS)
@given(
    samples=st.lists(
        st.tuples(st.binary(max_size=1500), st.binary(max_size=9)), min_size=1, max_size=6
    ),
    folder=st.sampled_from(["", "a/", "./", "a.b/c/", "f" * 99 + "/" + "g" * 40 + "/"]),
)
def test_samples_are_the_files_of_one_name(tmp_path_factory, format_, samples, folder):
    """In folders or not, of names of any length, with files of no sample, links and folders between."""
    path = tmp_path_factory.mktemp("tar") / "data.tar"
    with tarfile.open(path, "w", format=FORMATS[format_]) as archive:
        directory = tarfile.TarInfo("a")
        directory.type = tarfile.DIRTYPE
        archive.addfile(directory)
        for number, (image, label) in enumerate(samples):
            add_member(archive, f"{folder}{number:03}.seg.png", image)
            add_member(archive, f"{folder}{number:03}.bin", label)
            add_member(archive, f"{folder}.hidden{number}", b"no sample")
            link = tarfile.TarInfo(f"{folder}{number:03}.link")
            link.type, link.linkname = tarfile.SYMTYPE, "elsewhere"
            archive.addfile(link)
    dataset = TarDataset(path, ["bin", "seg.png"], as_bytes)
    with tarfile.open(path) as archive:
        extracted = [
            tuple(
                archive.extractfile(f"{folder}{number:03}.{end}").read()
                for end in ("bin", "seg.png")
            )
            for number in range(len(samples))
        ]
    assert extracted == [(label, image) for image, label in samples]
    assert dataset[:] == extracted
    assert pickle.loads(pickle.dumps(dataset))[:] == extracted


def test_columns_say_what_a_sample_is(tmp_path):
    """A list of endings makes tuples, one the value, and none at all dicts."""
    path = write(tmp_path / "data", ("0.cls", b"7"), ("0.txt", b"seven"))
    assert TarDataset(path, ["txt", "cls"])[0] == ("seven", 7)
    assert TarDataset(path, "cls")[0] == 7
    assert TarDataset(path)[0] == {"cls": 7, "txt": "seven"}


def image(kind, array):
    """Return the bytes of an image file."""
    Image = pytest.importorskip("PIL.Image")
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind)
    return file.getvalue()


def test_files_are_decoded_by_their_endings():
    """Numbers, texts, arrays and images; images have their channels first, as Chainer has them."""
    x = np.arange(24, dtype=np.float16).reshape(2, 3, 4)
    assert_same_sample(decode_member("cls", b"12"), np.int32(12))
    assert_same_sample(decode_member("x.npy", npy(x)), x)
    file = io.BytesIO()
    np.savez(file, x=x, y=np.arange(3))
    assert_same_sample(decode_member("npz", file.getvalue()), {"x": x, "y": np.arange(3)})
    assert decode_member("json", b'{"a": [1, null]}') == {"a": [1, None]}
    assert decode_member("txt", "zwölf".encode()) == "zwölf"
    assert decode_member("strange", b"\0") == b"\0"
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert_same_sample(decode_member("seg.png", image("PNG", grey)), grey[None])
    color = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)
    got = decode_member("png", image("PNG", color))
    assert_same_sample(got, color.transpose(2, 0, 1))
    assert got.flags.c_contiguous
    assert got.flags.writeable


@pytest.mark.parametrize(
    ("extension", "data"), [("pkl", b""), ("npy", npy(np.array([{}], object)))]
)
def test_pickles_are_refused(tmp_path, extension, data):
    """Loading one can run any code; a function of the user's may do it."""
    path = write(tmp_path / "data", ("0." + extension, data))
    with pytest.raises(ValueError, match=rf"data: .{extension} of sample 0 .*pickle"):
        TarDataset(path, extension)[0]
    assert TarDataset(path, extension, as_bytes)[0] == data


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.a", b""), ("0.b", b""), ("1.a", b"")], r"sample '1' has no .b, but \['a'\]"),
        ([("d/0.a", b""), ("0.b", b"")], r"sample 'd/0' has no .b"),
        ([("0.a", b""), ("0.A", b"")], "sample '0' has two files .a"),
        ([("README", b"")], "no samples"),
        ([], "no samples"),
    ],
)
def test_incomplete_samples_are_named(tmp_path, members, message):
    """When the dataset is made."""
    with pytest.raises(ValueError, match=f"data cannot .*{message}"):
        TarDataset(write(tmp_path / "data", *members), None if members else "a")


def test_compressed_files_are_told_by_their_method(tmp_path):
    """Nothing in them can be found without reading all."""
    path = write(tmp_path / "data.tar", ("0.cls", b"7"))
    (tmp_path / "data.tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(ValueError, match=r"data.tar.gz cannot .*compressed by gzip.*unpack"):
        TarDataset(tmp_path / "data.tar.gz", "cls")


def test_a_damaged_header_is_no_end(tmp_path):
    """Python takes it for the end of the file, and the samples behind it would be lost."""
    path = write(tmp_path / "data", *((f"{i}.cls", b"7") for i in range(9)))
    content = bytearray(path.read_bytes())
    content[4 * 1024 + 5] ^= 1  # each file takes a header and a block
    path.write_bytes(content)
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == 4
    with pytest.raises(tarfile.ReadError, match=r"data cannot .*damaged: .*byte 4096"):
        TarDataset(path, "cls")


def test_a_file_without_an_end_is_whole(tmp_path):
    """Some programs leave the blocks of zeros out."""
    path = write(tmp_path / "data", ("0.cls", b"7"), ("1.cls", b"8"))
    content = path.read_bytes()
    path.write_bytes(content[: 2 * 1024])
    assert TarDataset(path, "cls")[:] == [7, 8]

"""Files on disk: written beside one another without harm, and read with nothing but arrays in them."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import signal
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import chainer.links as L
import numpy as np
import pytest
from chainer import serializers

from chainer_dist import _files
from chainer_dist._files import open_appending, open_regular, read_regular, replacing
from chainer_dist.datasets.files import open_arrays
from chainer_dist.serialization.npz import ArrayFile, PickleRefusedError, check_npz, write_npz
from chainer_dist.serialization.target import load_npz
from damage import Attack

pytestmark = pytest.mark.mpi_skip  # there is nothing to do together


def names(folder):
    """Return what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def write(path, text="new"):
    """Write a file."""
    with replacing(path) as file:
        file.write(text)


def test_permissions_are_those_of_the_older_file(tmp_path):
    """A new file gets those of any new file; while it is written nobody sees more than of the older one."""
    before = os.umask(0o027)
    try:
        write(tmp_path / "new")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
        for mode in (0o600, 0o666, 0o444):
            (tmp_path / "new").chmod(mode)
            with replacing(tmp_path / "new") as file:
                file.write("x")
                (temporary,) = (path for path in tmp_path.iterdir() if path.name != "new")
                assert stat.S_IMODE(temporary.stat().st_mode) == mode
            assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode
    finally:
        os.umask(before)


@pytest.mark.parametrize("how", ["symbolic link", "file", "pipe"])
def test_what_is_planted_at_the_temporary_name(tmp_path, monkeypatch, how):
    """Even if the name is guessed, nothing is written through a link, and nothing waits."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    tokens = iter(["0" * 16, "1" * 16])
    monkeypatch.setattr(_files.secrets, "token_hex", lambda _: next(tokens))
    planted = tmp_path / f".target.{'0' * 16}.tmp"
    if how == "symbolic link":
        planted.symlink_to(victim)
    elif how == "pipe":
        os.mkfifo(planted)
    else:
        planted.write_text("there")
        planted.chmod(0o000)
        monkeypatch.setattr(_files.os, "geteuid", lambda: 12345)  # it is somebody else's
    with pytest.raises(FileExistsError):
        write(tmp_path / "target")
    assert victim.read_text() == "precious"
    write(tmp_path / "target")
    assert (tmp_path / "target").read_text() == "new"


def test_a_target_that_is_a_link_is_replaced(tmp_path):
    """Not the file that it leads to."""
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "target").symlink_to(tmp_path / "victim")
    write(tmp_path / "target")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "target").is_symlink()


@pytest.mark.parametrize("path", [".", "/"])
def test_a_folder_is_not_replaced(path):
    """By an error of the system, as for any other folder."""
    with pytest.raises(OSError, match="directory"):
        write(path)


def test_several_writers_at_once(tmp_path):
    """Neither removes the other's file; the last to end wins."""
    with replacing(tmp_path / "x") as first:
        first.write("first")
        write(tmp_path / "x", "second")
        assert len(names(tmp_path)) == 2
    assert (tmp_path / "x").read_text() == "first"
    assert names(tmp_path) == ["x"]


def test_leftovers_of_killed_writers_go(tmp_path):
    """With the next file of that name; not those of other files, nor of writers that live."""
    code = (
        "import sys, pathlib, runpy\n"
        "replacing = runpy.run_path(sys.argv[2])['replacing']\n"  # Chainer takes long to import
        "with replacing(pathlib.Path(sys.argv[1])) as file:\n"
        "    file.write('half'); file.flush(); print('ready', flush=True); sys.stdin.read()\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, tmp_path / name, _files.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for name in ("x", "x", "x.y")
    ]
    try:
        for process in processes:
            assert process.stdout.readline() == b"ready\n"
        for process in processes[1:]:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert len(names(tmp_path)) == 3
        write(tmp_path / "x")
        assert len([name for name in names(tmp_path) if name.startswith(".x.y.")]) == 1
        assert len(names(tmp_path)) == 3
        processes[0].communicate()
        assert (tmp_path / "x").read_text() == "half"
        write(tmp_path / "x.y")
        assert names(tmp_path) == ["x", "x.y"]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("how", ["a full disk", "an exception"])
def test_nothing_is_left_of_what_failed(tmp_path, how):
    """The older file stays, and there is no other."""
    write(tmp_path / "x", "old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if how == "a full disk":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises((OSError, TypeError)):
            write(tmp_path / "x", "y" * 2000 if how == "a full disk" else 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_long_names(tmp_path):
    """A name of as many bytes as there may be has a temporary one, too."""
    name = "ä" * 127
    write(tmp_path / name)
    assert names(tmp_path) == [name]


def test_only_plain_files_are_opened(tmp_path):
    """No pipe, which would wait for a writer; no device, folder or link."""
    (tmp_path / "file").write_bytes(b"12345")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    (tmp_path / "link to a pipe").symlink_to(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path / "link to a pipe", Path(os.devnull), tmp_path):
        with pytest.raises(OSError, match=r"not a regular file|symbolic link|directory"):
            read_regular(path, follow=path.name != "link to a pipe")
        with pytest.raises(OSError, match=r"not a regular|symbolic|directory|No such device"):
            open_appending(path)
    with pytest.raises(OSError, match="symbolic link") as caught:
        open_regular(tmp_path / "link")
    assert caught.value.errno == errno.ELOOP
    assert read_regular(tmp_path / "link", follow=True) == b"12345"
    with pytest.raises(ValueError, match="longer than 4 bytes"):
        read_regular(tmp_path / "file", limit=4)
    with pytest.raises(OSError, match="not a regular file"):
        open_arrays(tmp_path / "pipe")


# Arrays


def save(path, **values):
    """Write arrays as NumPy and Chainer do, with pickles where they need them."""
    np.savez(path.open("wb"), **values)
    return path


def test_no_pickle_is_loaded(tmp_path):
    """Not from a dataset, a snapshot, or an array of objects within; None is no such thing."""
    marker = tmp_path / "marker"
    evil = np.array([Attack(marker)], object)
    save(tmp_path / "x.npz", evil=evil, none=np.asarray(None))
    with open_regular(tmp_path / "x.npz") as file:
        arrays = ArrayFile(file)
        assert arrays["none"][()] is None
        with pytest.raises(
            PickleRefusedError, match=r"evil was saved as a pickle.*allow_pickle=True"
        ):
            arrays["evil"]
        assert not marker.exists()
        ArrayFile(file, allow_pickle=True)["evil"]
        assert marker.exists()
    marker.unlink()
    np.save(tmp_path / "x.npy", evil, allow_pickle=True)
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Attack(marker)))
    for name in ("x.npy", "pickle.npy", "x.npz"):
        with pytest.raises((ValueError, TypeError)):
            open_arrays(tmp_path / name)[0]
    link = L.Linear(1, 1)
    save(tmp_path / "link", W=np.array(Attack(marker), object), b=np.zeros(1, np.float32))
    with pytest.raises(PickleRefusedError):
        load_npz(tmp_path / "link", link, restart_epoch=False)
    (tmp_path / "pickle").write_bytes(pickle.dumps(Attack(marker)))
    with pytest.raises(zipfile.BadZipFile):
        load_npz(tmp_path / "pickle", link, restart_epoch=False)
    assert not marker.exists()


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_none_is_recognized(tmp_path, protocol, compressed):
    """However NumPy has pickled it, and only it: an attack within an array of no dimension is not."""
    content = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        content, {"descr": "|O", "fortran_order": False, "shape": ()}
    )
    marker = tmp_path / "marker"
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(tmp_path / "x", "w", kind) as archive:
        pickled = pickle.dumps(np.asarray(None), protocol)
        for name, each in (
            ("none", pickled),
            (
                "older",
                pickled.replace(b"numpy._core", b"numpy.core").replace(
                    b"\x8c\x16num", b"\x8c\x15num"
                ),
            ),
            ("evil", pickle.dumps(np.array(Attack(marker), object), protocol)),
            ("nothing", b""),
            ("longer", pickled + pickle.dumps(Attack(marker))),
        ):
            archive.writestr(f"{name}.npy", content.getvalue() + each)
    with open_regular(tmp_path / "x") as file:
        arrays = ArrayFile(file)
        assert arrays["none"][()] is None
        assert arrays["older"][()] is None
        for name in ("evil", "nothing"):
            with pytest.raises(PickleRefusedError):
                arrays[name]
        arrays["longer"]  # nothing behind the end is looked at
    assert not marker.exists()


def test_headers_that_lie(tmp_path):
    """An array that claims to be larger than the file, or than its place, takes no memory."""
    content = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 50,)}
    np.lib.format.write_array_header_1_0(content, header)
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("W.npy", content.getvalue() + b"1234")
    with open_regular(tmp_path / "x") as file, pytest.raises(ValueError, match="W has 4 bytes"):
        ArrayFile(file)["W"]
    with (tmp_path / "bomb").open("wb") as file:
        np.savez_compressed(file, W=np.zeros((1 << 20, 1), np.float32), b=np.zeros(1, np.float32))
    with pytest.raises(ValueError, match=r"could not broadcast W of shape \(1048576, 1\)"):
        load_npz(tmp_path / "bomb", L.Linear(1, 1), restart_epoch=False)
    with open_regular(tmp_path / "bomb") as file, pytest.raises(zipfile.BadZipFile):
        ArrayFile(file, compressed=False)


def test_arrays_are_what_numpy_reads(tmp_path):
    """Every dtype and layout, from Chainer's files too."""
    values = {
        "a": np.arange(6, dtype=">i2").reshape(2, 3).T,
        "f": np.asfortranarray(np.random.RandomState(0).rand(3, 4)),
        "empty": np.zeros((0, 3)),
        "number": np.float16(3),
        "text": np.asarray("ä"),
        "nothing": np.asarray(""),
        "record": np.zeros(2, [("x", "f4"), ("y", "i8")]),
    }
    write_npz(tmp_path / "x", values)
    check_npz(tmp_path / "x")
    with open_regular(tmp_path / "x") as file, np.load(tmp_path / "x") as theirs:
        ours = ArrayFile(file)
        assert [*ours] == [*theirs]
        for key in theirs:
            np.testing.assert_array_equal(ours[key], theirs[key])
            assert ours[key].dtype == theirs[key].dtype
            assert ours.shape(key) == theirs[key].shape
    link, again = L.Linear(None, 3), L.Linear(None, 3)
    for step in range(2):
        serializers.save_npz(str(tmp_path / "link"), link)
        check_npz(tmp_path / "link")
        load_npz(tmp_path / "link", again, restart_epoch=False)
        assert again.W.is_initialized == bool(step)
        link(np.ones((1, 2), np.float32))
    with pytest.raises(PickleRefusedError, match="x is an array of objects"):
        write_npz(tmp_path / "y", {"x": np.array([set()])})

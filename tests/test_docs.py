"""What the documentation is made of: measured tables, and a reference that lacks nothing."""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import docutils.core
import pytest

import chainer_dist
import fault_cases
import fault_table
import mpi_job
import prose
from architecture import LAYERS, MODULES, imports

# They start processes of their own.
pytestmark = pytest.mark.mpi_skip

DOCS = mpi_job.ROOT / "docs"
CONF = f"""
import sys
sys.path[:0] = [{str(DOCS / "_ext")!r}, {str(mpi_job.ROOT / "tests" / "helpers")!r}]
extensions = ["sphinx.ext.autodoc", "front", "layers", "measured", "pictures", "public_names"]
exclude_patterns = ["out"]
"""
MEASURED = """
Title
=====

.. measured:: threads
   :bars: default, ms; fair share, ms

   What the bars are.
"""


@pytest.fixture
def extension(monkeypatch):
    """Import one of the extensions of Sphinx that the documentation has."""
    monkeypatch.syspath_prepend(DOCS / "_ext")
    return importlib.import_module


def build(folder, page):
    """Build one page, and return what Sphinx prints and the page as text."""
    (folder / "conf.py").write_text(CONF)
    (folder / "index.rst").write_text(page)
    options = ["-q", "--no-color", "-b", "html"]
    command = [sys.executable, "-m", "sphinx", *options, str(folder), str(folder / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    page = (folder / "out" / "index.html").read_text()
    return done.stderr, re.sub("<[^>]*>", "", page)


def test_measured_tables(tmp_path, extension):
    """A script's file becomes bars and a table that says where it is from; what is not there is an error."""
    plain = extension("measured").plain
    errors, _ = build(tmp_path, MEASURED)
    assert "docs/measured/ has no threads.json: run make bench" in errors
    file = tmp_path / "measured" / "threads.json"
    script = mpi_job.ROOT / "scripts" / "benchmarks" / "bench_threads.py"
    options = f"--units 8 --steps 1 --batch-size 1 --json {file}"
    job = mpi_job.run([sys.executable, str(script), *options.split()], 2, timeout=100, cwd=tmp_path)
    assert job.status == 0, job.output
    content = json.loads(file.read_text())
    assert content["command"] == (
        "mpiexec -n 2 python scripts/benchmarks/bench_threads.py --units 8 --steps 1 --batch-size 1"
    )
    assert content["machine"]["versions"]["chainer_dist"] == chainer_dist.__version__
    (table,) = content["tables"]
    ((units, *numbers),) = table["rows"]
    assert len(table["columns"]) == 1 + len(numbers)
    assert units == "8"
    for text in (table["title"], *numbers):  # what is kept is what was printed
        assert text in job.output
    errors, page = build(tmp_path, MEASURED)
    assert "docs/measured" not in errors
    for text in (*map(plain, table["columns"]), content["command"], "What the bars are."):
        assert text in page
    for number in numbers:
        assert page.count(number) >= 1 + (number in numbers[:2])  # in the table, and beside its bar
    errors, _ = build(tmp_path, MEASURED.replace("default, ms", "defualt, ms"))
    assert "no table of threads has the columns ['defualt, ms', 'fair share, ms']" in errors


def test_the_table_of_faults(tmp_path):
    """What the tests of faults have found becomes a table, which says why there may be no answer."""
    crash = fault_cases.Result(3.14159, 137, named=True, equal=True, output="")
    end = fault_cases.Result(12.3, 0, named=None, equal=False, output="")
    rows = [("SIGKILL", 2, crash), ("SIGKILL", 3, crash), ("the end", 3, end)]
    columns, *lines = fault_table.table(rows)
    assert columns == [
        "fault",
        "2 ranks, s",
        "3 ranks, s",
        "exit status",
        "culprit named",
        "result equal",
    ]
    assert lines[0] == ["SIGKILL", "3.1", "3.1", "137", "yes", "yes"]
    assert lines[1] == ["the end", "", "12", "0", "", "no"]
    (tmp_path / "measured").mkdir()
    fault_table.write(tmp_path / "measured" / "faults.json", columns, lines)
    errors, page = build(tmp_path, "Title\n=====\n\n.. measured:: faults\n")
    assert "docs/measured" not in errors
    for text in (*columns, *lines[0], "not measured", "there is none", "make test-faults"):
        assert text in page


def test_headings_are_words(extension):
    """What a script abbreviates for a terminal, a page says in full."""
    plain = extension("measured").plain
    assert plain("ChainerMN / it") == "times as fast as ChainerMN"
    assert plain("Adam, batch 64 a rank, 2 ranks") == "Adam, batch 64 per rank, 2 ranks"
    assert plain("a step of Adam on 2 ranks") == "a step of Adam on 2 ranks"


def test_labels_do_not_overlap(extension):
    """Numbers at the ends of lines that end in almost the same place are moved apart, in their order."""
    curves = {name: {1: 10.0, 2: 20.0 + number / 10} for number, name in enumerate("abc")}
    parts, height = extension("charts").lines(curves, unit="examples")
    ends = {
        name: float(re.search(rf'y="([-\d.]+)"[^>]*>{name} 20<', "".join(parts))[1])
        for name in "abc"
    }
    assert ends["a"] - ends["b"] >= 17
    assert ends["b"] - ends["c"] >= 17
    assert all(0 < y < height for y in ends.values())


def test_bars_are_as_long_as_their_numbers(extension):
    """A bar for half the number is half as long, and where there is no number the reason is written."""
    charts = extension("charts")
    groups = {
        "a": [charts.Bar(2.0, "2")],
        "b": [charts.Bar(1.0, "1")],
        "c": [charts.Bar(None, "no")],
    }
    parts, _ = charts.bars(groups, ["ms"])
    text = "".join(parts)
    long, short = (float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', text))
    assert long == pytest.approx(2 * short, abs=0.1)
    assert ">no<" in text


def test_the_readme_shows_what_was_measured(extension):
    """Its picture and its numbers are what docs/measured/ has: ``make pictures`` writes them."""
    front = extension("front")
    folder = DOCS / "measured"
    assert front.SVG.read_text() == front.standalone(folder)
    readme = front.README.read_text()
    between = readme[readme.index(front.BEGIN) + len(front.BEGIN) : readme.index(front.END)]
    assert between == front.for_readme(folder)


def test_every_public_name_must_be_documented(tmp_path):
    """Sphinx warns of those that no page has; the name of the subpackage does as well."""
    page = "Title\n=====\n\n.. autofunction:: chainer_dist.optimizers.create_multi_node_optimizer\n"
    warnings, _ = build(tmp_path, page)
    lacking = [line for line in warnings.splitlines() if "docs/api" in line]
    assert any(
        line.endswith("chainer_dist.Join or chainer_dist.optimizers.Join") for line in lacking
    )
    assert not any("create_multi_node_optimizer" in line for line in lacking)
    assert not any("__version__" in line for line in lacking)


def test_the_version_is_the_same_everywhere():
    """The file for citations has that of the package."""
    lines = Path(mpi_job.ROOT, "CITATION.cff").read_text().splitlines()
    assert f"version: {chainer_dist.__version__}" in lines


def test_what_is_named_is_there():
    """Tests that the guarantees rest on, and files that the README leads to, exist."""
    text = (DOCS / "concepts" / "guarantees.rst").read_text()
    named = re.findall(r"``(test_\w+)``", text)
    tests = "".join(file.read_text() for file in (mpi_job.ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in tests] == []
    files = re.findall(r"``(test_\w+\.py)``", text)
    there = {file.name for file in (mpi_job.ROOT / "tests").rglob("test_*.py")}
    assert {*files} <= there
    files = re.findall(r"[ <](docs/[\w/]+\.rst)", (mpi_job.ROOT / "README.rst").read_text())
    assert len(files) > 5
    assert [name for name in files if not (mpi_job.ROOT / name).is_file()] == []


def test_contributors_see_the_layers_that_there_are():
    """The map of layers has the names of the list, in its order."""
    text = (mpi_job.ROOT / "CONTRIBUTING.rst").read_text()
    block = text.partition("\nLayers\n")[2].partition("::\n\n")[2].partition("\n\n")[0]
    rows = [line[4:42].strip() for line in block.splitlines()]
    shown = [set(row.split(",")) for row in " ".join(rows).replace(", ", ",").split()]
    assert shown == [set(layer) for layer in reversed(LAYERS)]


def test_a_picture_of_the_layers_has_all_imports(tmp_path):
    """Each package is named once, and has a dot for each package that it imports."""
    page = "Title\n=====\n\n.. picture:: layers\n"
    build(tmp_path, page)
    picture = (
        (tmp_path / "out" / "index.html").read_text().partition("<svg")[2].partition("</svg")[0]
    )
    named = re.findall(r"<text[^>]*>(\w+)</text>", picture)
    above = [each for layer in LAYERS[1:] for each in layer if not each.startswith("__")]
    assert sorted(named) == sorted([*above, "ground"])
    found = set()
    for name in MODULES:
        for each in imports(name):
            pair = [part.partition(".")[0] for part in (name, each)]
            pair = ["ground" if part in LAYERS[0] else part for part in pair]
            if pair[0] != pair[1] and {*pair} <= {*named}:
                found.add(tuple(pair))
    assert picture.count("<circle") == len(found) > len(named)


@pytest.mark.parametrize("name", ["README.rst", "CHANGELOG.rst", "CONTRIBUTING.rst"])
def test_files_that_are_read_as_they_are(name):
    """Sites that show them do it with docutils, which finds nothing to warn of."""
    told = io.StringIO()
    docutils.core.publish_string(
        (mpi_job.ROOT / name).read_text(),
        writer="null",
        settings_overrides={"warning_stream": told, "report_level": 2, "halt_level": 5},
    )
    assert told.getvalue() == ""


LONGEST = 35  # words


def test_sentences_are_short():
    """No sentence of the README, of CONTRIBUTING and of the pages is longer than a reader can hold."""
    root = mpi_job.ROOT
    pages = [file for file in DOCS.rglob("*.rst") if "_build" not in file.parts]
    assert len(pages) > 40
    long = [
        f"{file.relative_to(root)}: {sentence}"
        for file in (root / "README.rst", root / "CONTRIBUTING.rst", *pages)
        for sentence in prose.sentences(file.read_text())
        if len(sentence.split()) > LONGEST
    ]
    assert long == []


def test_sentences_are_found():
    """Those of paragraphs, items and explanations, without code, tables, directives and headings."""
    text = (
        "Title\n=====\n\nOne sentence here. Two are ``c o d e``\nand a :doc:`text <page>`, see::\n\n"
        "    no. Code.\n\n.. note::\n\n   Of a note.\n\n.. image:: no\n   :alt: No.\n\n"
        "* item one\n  goes on\n* item two\n\nterm\n    Is explained. To the end\n\n=== ===\na   b\n\n=== ===\n\nLast."
    )
    assert [*prose.sentences(text)] == [
        "One sentence here.",
        "Two are code and a text, see::",
        "Of a note.",
        "item one goes on",
        "item two",
        "term",
        "Is explained.",
        "To the end",
        "Last.",
    ]


def test_what_is_shown_is_measured():
    """Each file that a page shows is one that ``make bench`` or ``make bench-nodes`` writes."""
    shown = set()
    for page in DOCS.rglob("*.rst"):
        for names in re.findall(r"^\.\. measured:: (.*)$", page.read_text(), re.MULTILINE):
            shown |= {*names.split()}
    makefile = (mpi_job.ROOT / "Makefile").read_text()
    assert shown == {*re.findall(r"\$\(MEASURED\)/([\w-]+)\.json", makefile)}
    assert shown

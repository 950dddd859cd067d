"""Progress bars, in a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from chainer_dist import _progress

pytestmark = pytest.mark.mpi_skip


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        """Say so."""
        return True


def steps(monkeypatch, stream, n=50):
    """Return what is written of some steps."""
    pytest.importorskip("tqdm")
    monkeypatch.setattr(_progress.sys, "stderr", stream)
    for _ in _progress.bar(iterable=range(n), mininterval=0, miniters=1):
        pass
    return stream.getvalue()


def test_a_file_gets_whole_lines(monkeypatch):
    """None is drawn over another, and the last says that all is done."""
    written = steps(monkeypatch, io.StringIO())
    assert "\r" not in written
    assert "\x1b" not in written
    assert "50/50" in written.splitlines()[-1]
    monkeypatch.setattr(_progress, "SECONDS_BETWEEN_LINES", 1000.0)
    stream = io.StringIO()
    monkeypatch.setattr(_progress.sys, "stderr", stream)
    for _ in _progress.bar(iterable=range(5000)):
        pass
    assert len(stream.getvalue().splitlines()) <= 2


def test_a_terminal_gets_a_bar(monkeypatch):
    """As tqdm draws it."""
    written = steps(monkeypatch, Terminal())
    assert written.count("\r") > 40
    assert "50/50" in written

"""What is shown of the lines of ranks, and what is kept of them: bars, colours, files a rank, some ranks only."""

from __future__ import annotations

import os
import pty
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.launcher import printing
from chainer_dist.launcher.printing import PlainLines
from launcher import Launched, run, write

pytestmark = [pytest.mark.mpi_skip, pytest.mark.faults]

BAR = b"\x1b[J   total [###....]  5.00%\nthis epoch [#......] 10.00%\n   3 iter, 0 epoch\n\x1b[3A"


class Screen:
    """Takes the lines of one stream, and has nothing called later until it is asked to."""

    def __init__(self, *, styled=False):
        self.lines, self.due = [], []
        self.plain = PlainLines(
            self.lines.append, lambda _, call: self.due.append(call), styled=styled
        )

    def show(self, *pieces):
        """Return the lines that pieces of output end up as."""
        for piece in pieces:
            self.plain.add(piece)
        self.plain.end()
        return b"".join(self.lines).decode(errors="replace").splitlines()


@given(
    lines=st.lists(
        st.text(st.characters(exclude_characters="\r\n\x1b", codec="utf-8"), max_size=9)
    ),
    cut=st.lists(st.integers(0, 60)),
)
def test_ordinary_lines_stay_as_they_are(lines, cut):
    """Wherever the stream is cut."""
    whole = "".join(f"{line}\n" for line in lines).encode()
    ends = sorted({0, len(whole), *(each for each in cut if each < len(whole))})
    screen = Screen()
    screen.show(*(whole[begin:end] for begin, end in zip(ends, ends[1:])))
    assert b"".join(screen.lines) == whole


@given(st.lists(st.binary(max_size=30)), st.booleans())
def test_whatever_is_printed(pieces, styled):
    """Whole lines without a cursor that moves come of it, and nothing is raised."""
    screen = Screen(styled=styled)
    screen.show(*pieces)
    for line in screen.lines:
        assert line.endswith(b"\n")
        assert b"\n" not in line[:-1]
        assert not re.search(rb"\x1b\[\d*[A-HJK]", line)


def test_a_bar_of_tqdm(monkeypatch):
    """A line now and then, and its last state."""
    now = [0.0]
    monkeypatch.setattr(printing.time, "monotonic", lambda: now[0])
    screen = Screen()
    for percent in range(101):
        screen.plain.add(b"\r%3d%%|###|" % percent)
        now[0] += 1
    assert screen.show(b"\n", b"after\n") == [
        *(f"{percent:3}%|###|" for percent in (0, 30, 60, 90)),
        "100%|###|",
        "after",
    ]


def test_a_bar_of_chainer_beside_a_log(monkeypatch):
    """The log is whole, and the bar a line now and then, in one line; however the stream is cut."""
    monkeypatch.setattr(printing.time, "monotonic", lambda: 0.0)
    log = [f"{epoch}  0.{epoch}" for epoch in range(3)]
    whole = BAR * 3 + b"".join(b"\x1b[J" + line.encode() + b"\n" + BAR for line in log) + b"\x1b[J"
    expected = ["total [###....] 5.00% this epoch [#......] 10.00% 3 iter, 0 epoch", *log]
    for size in (1, 7, 50, len(whole)):
        pieces = [whole[begin : begin + size] for begin in range(0, len(whole), size)]
        assert Screen().show(*pieces) == expected


def test_a_line_after_a_cleared_screen_is_not_kept_back():
    """What might have been a bar is shown soon, when nothing follows."""
    screen = Screen()
    screen.plain.add(b"\x1b[J1  0.5\n")
    assert screen.lines == []
    for call in screen.due:
        call()
    assert screen.lines == [b"1  0.5\n"]


def test_colours_are_kept_for_terminals():
    """And nothing else that begins with an escape."""
    line = b"\x1b[31mred\x1b[0m \x1b[2K\x1b[1Agreen\n"
    assert Screen(styled=True).show(line) == ["\x1b[31mred\x1b[0m green"]
    assert Screen().show(line) == ["red green"]


def test_a_file_a_rank(tmp_path):
    """Has all lines of the rank, whole, of all attempts and jobs; the terminal has them as well."""
    code = "print('out', rank); print('err', rank, file=sys.stderr); print('no end', end='')"
    for jobs in (1, 2):
        job = run(tmp_path, code, "--log-dir", tmp_path / "new" / "logs")
        assert job.status == 0, job
        assert sorted(job.stdout.splitlines())[:2] == ["[0] no end", "[0] out 0"]
        for rank in range(2):
            lines = (tmp_path / "new" / "logs" / f"rank.{rank}.log").read_text().splitlines()
            assert len([line for line in lines if line.startswith("==== 20")]) == jobs
            assert sorted(line for line in lines if not line.startswith("====")) == sorted(
                [f"out {rank}", f"err {rank}", "no end"] * jobs
            )


def test_some_ranks_only(tmp_path):
    """Of the others the last words are shown if they fail."""
    code = """
print("out", rank)
if rank == 1:
    raise ValueError("broken")
time.sleep(60)
"""
    job = run(tmp_path, code, "--only-rank", "0", "--output-filename", tmp_path)
    assert job.status == 1
    assert job.stdout == "[0] out 0\n"
    assert "[1] Traceback (most recent call last):" in job.stderr
    assert job.reason.endswith("failed first: ValueError: broken (exit status 1)")
    assert "out 1\n" in (tmp_path / "rank.1.log").read_text()


def test_a_terminal_of_one_rank_gets_everything_at_once(tmp_path):
    """Bars, colours, and lines that have not ended."""
    code = "print('\\x1b[31m50%', end='\\r'); time.sleep(60)"
    master, terminal = pty.openpty()
    job = Launched("run", "-n", 1, write(tmp_path, code), stdout=terminal, stderr=terminal)
    os.close(terminal)
    seen = b""
    while b"\x1b[31m50%\r" not in seen:
        seen += os.read(master, 100)
    job.process.terminate()
    assert job.end().status == 143
    os.close(master)


def test_a_log_folder_that_cannot_be_written_any_more(tmp_path):
    """The job goes on, and it is said once."""
    logs = tmp_path / "logs"
    code = f"""
import shutil
if rank == 0:
    while not os.path.exists({str(logs)!r} + "/rank.1.log"): time.sleep(0.01)
    shutil.rmtree({str(logs)!r}, ignore_errors=True)
while os.path.exists({str(logs)!r}): time.sleep(0.01)
print("still here")
"""
    job = run(tmp_path, code, "--log-dir", logs)
    assert job.status == 0, job
    assert job.stdout.count("still here") == 2
    assert job.stderr.count("cannot be written") == 1

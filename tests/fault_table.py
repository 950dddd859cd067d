"""A pytest plugin that prints what jobs did in which faults were planted, as a table in reStructuredText."""

from __future__ import annotations

import pytest

import mpi_job

ROWS = pytest.StashKey()
HEAD = ("fault", "ranks", "seconds", "status", "culprit named", "result equal")
WORDS = {True: "yes", False: "no", None: ""}


@pytest.fixture
def fault_table(request):
    """Return the rows of the table, which a test adds one to."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter, config):
    """Print the table, if there is one."""
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    found = mpi_job.find_mpi()
    terminalreporter.section(f"faults, {found.family} {found.version}")
    terminalreporter.write(table(rows))


def table(rows):
    """Return the table.

    Args:
        rows: Name of the fault, number of ranks, and a :class:`fault_cases.Result`.
    """
    lines = [HEAD]
    for name, ranks, result in rows:
        seconds = f"{result.seconds:.1f}" if result.seconds < 10 else f"{result.seconds:.0f}"
        status, named, equal = str(result.status), WORDS[result.named], WORDS[result.equal]
        lines.append((name, str(ranks), seconds, status, named, equal))
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = " ".join("=" * width for width in widths)
    text = [
        " ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines
    ]
    return "\n".join([rule, text[0], rule, *text[1:], rule]) + "\n"

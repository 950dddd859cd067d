"""A pytest plugin that prints what jobs did in which faults were planted, as a table in reStructuredText."""

from __future__ import annotations

import pytest

import mpi_job

ROWS = pytest.StashKey()
WORDS = {True: "yes", False: "no", None: ""}


@pytest.fixture
def fault_table(request):
    """Return the rows of the table, to which a test adds name, ranks and a ``fault_cases.Result``."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_terminal_summary(terminalreporter, config):
    """Print the table, if there is one."""
    rows = config.stash.get(ROWS, [])
    if rows:
        found = mpi_job.find_mpi()
        terminalreporter.section(f"faults, {found.family} {found.version}")
        terminalreporter.write(table(rows))


def table(rows):
    """Return the table: a line for each fault, and a column of seconds for each number of ranks."""
    results = {}
    for name, ranks, result in rows:
        results.setdefault(name, {})[ranks] = result
    sizes = sorted({ranks for _, ranks, _ in rows})
    lines = [
        ("fault", *(f"{ranks} ranks" for ranks in sizes), "status", "culprit named", "result equal")
    ]
    for name, by_ranks in results.items():
        seconds = [words_of_seconds(by_ranks.get(ranks)) for ranks in sizes]
        found = by_ranks.values()
        words = [
            ", ".join(dict.fromkeys(each))
            for each in (
                [str(result.status) for result in found],
                [WORDS[result.named] for result in found],
                [WORDS[result.equal] for result in found],
            )
        ]
        lines.append((name, *seconds, *words))
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = " ".join("=" * width for width in widths)
    text = [
        " ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines
    ]
    return "\n".join([rule, text[0], rule, *text[1:], rule]) + "\n"


def words_of_seconds(result):
    """Return the seconds of a result with two digits."""
    if result is None:
        return ""
    return f"{result.seconds:.1f} s" if result.seconds < 10 else f"{result.seconds:.0f} s"

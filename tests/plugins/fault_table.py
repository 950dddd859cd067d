"""A pytest plugin that prints what jobs did in which faults were planted, and keeps it for the documentation."""

from __future__ import annotations

from pathlib import Path

import pytest

import mpi_job

ROWS = pytest.StashKey()
WORDS = {True: "yes", False: "no", None: ""}


def pytest_addoption(parser):
    """Add the name of a file."""
    parser.addoption("--fault-table", type=Path, help="write the table of faults there, as JSON")


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
        columns, *lines = table(rows)
        widths = [max(map(len, column)) + 2 for column in zip(columns, *lines)]
        for line in (columns, *lines):
            words = (word.ljust(width) for word, width in zip(line, widths))
            terminalreporter.write_line("".join(words).rstrip())
        file = config.getoption("--fault-table")
        if file is not None:
            write(file, columns, lines)


def table(rows):
    """Return the heads of columns, and a line for each fault, with the seconds on each number of ranks."""
    results = {}
    for name, ranks, result in rows:
        results.setdefault(name, {})[ranks] = result
    sizes = sorted({ranks for _, ranks, _ in rows})
    seconds = [f"{ranks} ranks, s" for ranks in sizes]
    lines = [["fault", *seconds, "exit status", "culprit named", "result equal"]]
    for name, by_ranks in results.items():
        found = by_ranks.values()
        words = [
            ", ".join(dict.fromkeys(each))
            for each in (
                [str(result.status) for result in found],
                [WORDS[result.named] for result in found],
                [WORDS[result.equal] for result in found],
            )
        ]
        lines.append([name, *(seconds_of(by_ranks.get(ranks)) for ranks in sizes), *words])
    return lines


def seconds_of(result):
    """Return the seconds of a result with two digits."""
    if result is None:
        return ""
    return f"{result.seconds:.1f}" if result.seconds < 10 else f"{result.seconds:.0f}"


def write(file, columns, lines):
    """Write the table as the benchmarks write theirs."""
    from chainer_dist.scaling.experiment import machine
    from chainer_dist.scaling.results import write_json

    content = {
        "command": "make test-faults ARGS=tests/launcher/test_faults.py",
        "machine": machine(),
        "tables": [
            {
                "title": "from the fault until nothing is left of the job",
                "columns": columns,
                "rows": lines,
            }
        ],
    }
    write_json(file, content)

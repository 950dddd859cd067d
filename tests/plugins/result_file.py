"""A pytest plugin that writes how each test ended, for ``tests/run.py``."""

from __future__ import annotations

import json
from pathlib import Path

WHERE = ".where"  # suffix of the file that says which test runs, or why the job was aborted
SEVERITY = ("passed", "skipped", "failed")


def pytest_addoption(parser):
    """Add the name of the file."""
    parser.addoption("--result-file", type=Path, help="write each test's outcome as JSON")


def pytest_configure(config):
    """Collect outcomes on the first rank."""
    path = config.getoption("--result-file")
    if path is not None and config.getoption("--with-mpi"):
        from mpi4py import MPI

        path = path if MPI.COMM_WORLD.rank == 0 else None
    if path is not None:
        config.pluginmanager.register(ResultFile(path), "result-file")


class ResultFile:
    """The worst outcome of each test's phases; to fail as expected is to pass."""

    def __init__(self, path) -> None:
        """Start with nothing."""
        self.path = path
        self.outcomes = {}

    def pytest_runtest_logstart(self, nodeid):
        """Say what to blame if the job ends here."""
        self.path.with_suffix(WHERE).write_text(nodeid, encoding="utf-8")

    def pytest_runtest_logreport(self, report):
        """Take note of one phase."""
        expected = report.skipped and hasattr(report, "wasxfail")
        outcome = "passed" if expected else report.outcome
        before = self.outcomes.get(report.nodeid, "passed")
        self.outcomes[report.nodeid] = max(before, outcome, key=SEVERITY.index)

    def pytest_collectreport(self, report):
        """Take note of a file that could not be collected, or that skips itself."""
        if not report.passed:
            self.outcomes[report.nodeid] = report.outcome

    def pytest_sessionfinish(self):
        """Write the file."""
        self.path.write_text(json.dumps(self.outcomes), encoding="utf-8")

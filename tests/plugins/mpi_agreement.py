"""A pytest plugin that keeps the ranks of an mpiexec run in step.

After every phase of every test the ranks tell one another the outcome. A test that fails on one
rank is then reported as failed by all, with that rank's traceback, and the next test starts
together. A rank that failed while the others wait for it in a collective prints its traceback and
aborts the job after a time of grace; a test that takes too long on any rank ends the job with
every thread's stack. So a run may fail, but it never hangs.
"""

from __future__ import annotations

import faulthandler
import functools
import io
import os
import struct
import sys
import time
import traceback
import zlib
from typing import NamedTuple, NoReturn

import hypothesis.errors
import pytest

from result_file import WHERE

TEXT_BYTES = 8_000  # of a traceback, that travel to the other ranks
HEADER = struct.Struct("=16sIIi")  # outcome, digest of the place, bytes of text, a number


def pytest_addoption(parser):
    """Add the two time limits."""
    group = parser.getgroup("mpi agreement")
    group.addoption(
        "--mpi-grace", type=float, default=20, help="seconds a failed rank waits for its peers"
    )
    group.addoption(
        "--mpi-limit", type=float, default=120, help="seconds a phase of a test may take"
    )


@pytest.hookimpl(trylast=True)
def pytest_configure(config):
    """Limit the time of every test, and take part if pytest-mpi was asked to."""
    rank = 0
    if config.getoption("--with-mpi"):
        from mpi4py import MPI

        config.pluginmanager.register(Agreement(config, MPI), "mpi-agreement")
        rank = MPI.COMM_WORLD.rank
    config.pluginmanager.register(Limit(config.getoption("--mpi-limit"), rank), "mpi-limit")


class Limit:
    """Ends a phase, or the collection of tests, that takes too long, with all stacks.

    The first rank to exit takes the others with it, so rank 0 leaves a second for their stacks.
    """

    def __init__(self, seconds, rank) -> None:
        """Keep the standard error that pytest captures during tests."""
        self.stderr = os.dup(2)
        self.options = {"exit": rank == 0, "file": self.stderr}
        self.seconds = seconds + (rank == 0)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection(self):
        """Start the clock."""
        faulthandler.dump_traceback_later(self.seconds, **self.options)

    pytest_runtest_setup = pytest_runtest_call = pytest_runtest_teardown = pytest_collection

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self):
        """Stop the clock when the ranks have agreed."""
        faulthandler.cancel_dump_traceback_later()

    pytest_runtestloop = pytest_sessionfinish = pytest_runtest_logreport


class Record(NamedTuple):
    """What a rank says of itself."""

    outcome: str
    place: int
    number: int
    text: str

    def to_bytes(self):
        """Return a message of fixed size, with the end of the text, which tells most."""
        text = self.text.encode(errors="replace")[-TEXT_BYTES:]
        header = HEADER.pack(self.outcome.encode(), self.place, len(text), self.number)
        return bytearray(header + text.ljust(TEXT_BYTES, b"\0"))

    @classmethod
    def from_bytes(cls, data):
        """Read what :meth:`to_bytes` wrote."""
        outcome, place, length, number = HEADER.unpack_from(data)
        text = bytes(data[HEADER.size : HEADER.size + length]).decode(errors="replace")
        return cls(outcome.rstrip(b"\0").decode(), place, number, text)


class Agreement:
    """One rank's part in the agreement."""

    def __init__(self, config, mpi) -> None:
        """Duplicate the world, so that no message of a test is mistaken for ours."""
        self.world = mpi.COMM_WORLD
        self.comm = self.world.Dup()
        self.byte = mpi.BYTE
        self.grace = config.getoption("--mpi-grace")
        self.stderr = os.dup(2)
        self.result_file = config.getoption("--result-file")
        self.collect_errors = []
        if self.comm.rank != 0:  # rank 0 reports for all
            config.pluginmanager.unregister(name="terminalreporter")
            silent = pytest.TerminalReporter(config, io.StringIO())
            config.pluginmanager.register(silent, "terminalreporter")

    def exchange(self, where, outcome, text="", number=0):
        """Return what all ranks say here; abort if this one failed and others stay away."""
        mine = Record(outcome, zlib.crc32(where.encode()), number, text)
        sent = mine.to_bytes()
        received = bytearray(len(sent) * self.comm.size)
        request = self.comm.Iallgather([sent, self.byte], [received, self.byte])
        started, pause = time.monotonic(), 0.0
        while not request.Test():
            if outcome == "failed" and time.monotonic() - started > self.grace:
                self.abort(f"failed in {where}; other ranks did not come there", text)
            time.sleep(pause)
            pause = min(pause + 1e-5, 1e-3)
        size = len(sent)
        records = [Record.from_bytes(received[i : i + size]) for i in range(0, len(received), size)]
        if len({record.place for record in records}) > 1:
            self.abort(f"is in {where}, others elsewhere", text)
        return records

    def abort(self, what, text) -> NoReturn:
        """End the job, saying why."""
        who = f"rank {self.comm.rank} {what}"
        message = f"\n==== {who} ====\n{text}\n==== aborting the job ====\n"
        os.write(self.stderr, message.encode(errors="replace"))
        if self.result_file is not None:
            where = self.result_file.with_suffix(WHERE)
            where.write_text(f"{who}\n{text}", encoding="utf-8")
        time.sleep(0.5)  # the launcher may drop what it has not read when the job ends
        self.world.Abort(1)
        os._exit(1)

    def pytest_collectreport(self, report):
        """Keep errors for rank 0 to show."""
        if report.failed:
            self.collect_errors.append(report.longreprtext)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_finish(self, session):
        """Stop everywhere if the ranks collected different tests."""
        for item in session.items:
            # Hypothesis calls this function for each example, for plugins to replace.
            test = getattr(getattr(item, "obj", None), "hypothesis", None)
            if test is not None and not hasattr(test.inner_test, "agreeing"):
                test.inner_test = self.agreeing(test.inner_test)
        names = "\n".join(item.nodeid for item in session.items)
        digest = zlib.crc32(names.encode()) & 0x7FFFFFFF
        outcome = "failed" if self.collect_errors else "passed"
        text = "\n\n".join(self.collect_errors)
        records = self.exchange("collection", outcome, text, digest)
        if len({(record.outcome, record.number) for record in records}) > 1:
            # Every rank would print the same.
            what = "the ranks collected different tests", disagreement(records)
            raise pytest.UsageError(*(what if self.comm.rank == 0 else ()))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        """Make one outcome of all ranks' outcomes of a phase."""
        report = yield
        text = "" if report.passed else str(report.longrepr)
        records = self.exchange(f"{item.nodeid} ({call.when})", report.outcome, text)
        outcomes = {record.outcome for record in records}
        if len(outcomes) == 1:
            return report
        if report.outcome == "failed":
            report.sections.append(("MPI ranks", summary(records)))
        else:
            report.longrepr = disagreement(records)
            report.outcome = "failed"
            report.__dict__.pop("wasxfail", None)
        return report

    def agreeing(self, test):
        """Wrap what Hypothesis runs for each example, so that it fails on all ranks or on none.

        Otherwise a failed rank would try its example again while the others go on to the next.
        """

        @functools.wraps(test)
        def wrapped(*args, **kwargs):
            error, outcome, text = None, "passed", ""
            try:
                result = test(*args, **kwargs)
            except (KeyboardInterrupt, pytest.exit.Exception):
                raise
            except BaseException as caught:  # noqa: BLE001 - raised again below
                error = caught
                control = isinstance(error, hypothesis.errors.HypothesisException)
                known = (Exception, pytest.fail.Exception)
                failed = isinstance(error, known) and not control
                outcome = "failed" if failed else type(error).__name__[:16]
                text = traceback.format_exc() if failed else ""
            records = self.exchange(f"an example in {test.__qualname__}", outcome, text)
            if outcome != "failed" and len({record.outcome for record in records}) > 1:
                raise AssertionError(disagreement(records)) from None
            if error is not None:
                raise error
            return result

        wrapped.agreeing = True
        return wrapped

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        """Leave with one status."""
        status = int(session.exitstatus)
        outcome = "failed" if status else "passed"
        records = self.exchange("the end of the session", outcome, f"status {status}", status)
        session.exitstatus = max(record.number for record in records)

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self):
        """Wait until rank 0 has printed its report, then let every rank exit in peace."""
        self.exchange("the exit", "passed")
        hook = sys.modules.get("chainer_dist.global_except_hook")
        if hook is not None:  # it would take the status of failed tests for a crash
            hook.remove_hook()
        self.comm.Free()

    @pytest.hookimpl(trylast=True)
    def pytest_internalerror(self, excrepr):
        """Do not leave the others waiting."""
        self.abort("had an internal error of pytest", str(excrepr))

    @pytest.hookimpl(trylast=True)
    def pytest_keyboard_interrupt(self, excinfo):
        """Do not leave the others waiting, be it an interrupt or ``pytest.exit``."""
        self.abort("was interrupted", excinfo.exconly())


def summary(records):
    """Return which ranks had which outcome."""
    kinds = dict.fromkeys(record.outcome for record in records)
    ranks = {
        kind: ", ".join(str(r) for r, record in enumerate(records) if record.outcome == kind)
        for kind in kinds
    }
    return "; ".join(f"{kind} on rank {which}" for kind, which in ranks.items())


def disagreement(records):
    """Return which ranks had which outcome, and what the first to fail, or else to skip, says."""
    order = sorted(range(len(records)), key=lambda r: (records[r].outcome != "failed", r))
    texts = [f"---- rank {r}:\n{records[r].text}" for r in order if records[r].text]
    return "\n\n".join([f"The ranks disagree: {summary(records)}", *texts[:1]])

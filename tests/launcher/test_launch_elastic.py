"""Jobs whose hosts come and go."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from test_launch_restarts import two_hosts  # noqa: F401 - a fixture

import chainer_dist
import elastic_training
from chainer_dist.launcher import cli, elastic
from chainer_dist.launcher.elastic import Discovery
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.hostfiles import Host
from elastic_training import N_SAMPLES
from launcher import Launched, launch, write

pytestmark = [pytest.mark.mpi_skip, pytest.mark.faults]

TRAINING = Path(elastic_training.__file__)


@pytest.fixture
def script(tmp_path):
    """Return a script that prints what a file has, and the file."""
    hosts = tmp_path / "hosts"
    program = tmp_path / "discover.sh"
    program.write_text(f"#!/bin/sh\ncat {hosts}\n")
    program.chmod(0o755)
    return program, hosts


def change(hosts, text):
    """Write a file as a whole."""
    new = hosts.with_suffix(".new")
    new.write_text(text)
    new.rename(hosts)


@pytest.mark.parametrize(
    ("least", "most", "text", "n_ranks", "places"),
    [
        (1, None, "a:2\nb:3\n", 5, [Host("a", 2), Host("b", 3)]),
        (1, 3, "a:2\nb:3\n", 3, [Host("a", 2), Host("b", 1)]),
        (2, 2, "a:2\nb:3\n", 2, [Host("a", 2)]),
        (1, None, "# none\na\n\n", 1, [Host("a", 1)]),
    ],
)
def test_where_ranks_run(script, least, most, text, n_ranks, places):
    """As many as there are slots, within the limits, on the first hosts."""
    program, hosts = script
    hosts.write_text(text)
    discovery = Discovery(str(program), least, most)
    assert discovery.first(time.monotonic()) == (n_ranks, places)
    assert discovery.change(n_ranks, places) == ""


def test_what_is_a_change(script):
    """A host that must be left, or room for more ranks; nothing else."""
    program, hosts = script
    discovery = Discovery(str(program), 1, 4)
    job = (2, [Host("a", 2)])
    for text, expected in (
        ("a:2\n", ""),
        ("b:1\na:2\n", "there is room for 3 ranks in place of 2"),
        ("a:8\n", "there is room for 4 ranks in place of 2"),
        ("a:1\n", "a must be left"),
        ("b:2\n", "a must be left"),
        ("", "a must be left"),
        ("a:x\n", ""),  # the script cannot be read, which is said
    ):
        hosts.write_text(text)
        assert discovery.change(*job) == expected
    full = (4, [Host("a", 4)])
    hosts.write_text("a:4\nb:4\n")
    assert discovery.change(*full) == ""


def test_a_script_that_fails(script, monkeypatch):
    """Before the start that is an error; later the hosts stay as they are, and it is said once."""
    program, hosts = script
    said = []
    monkeypatch.setattr(elastic.output, "say", said.append)
    discovery = Discovery(str(program), 1, None)
    with pytest.raises(LaunchError, match="not started without hosts"):
        discovery.first(time.monotonic() + 60)
    for _ in range(3):
        assert discovery.change(1, [Host("a")]) == ""
    assert len(said) == 1
    assert re.search(r"discover.sh failed with status 1: .*No such file", said[0])
    hosts.write_text("")
    with pytest.raises(
        LaunchError, match="the time limit is reached, and there are not enough hosts"
    ):
        discovery.first(time.monotonic())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-ranks", "2"], "want --host-discovery-script"),
        (["--host-discovery-script", "/no/file"], "there is no file '/no/file'"),
        (["--host-discovery-script", __file__], "is not executable: chmod +x"),
        (
            ["--host-discovery-script", "SCRIPT", "-n", "2"],
            "hosts come from --host-discovery-script",
        ),
        (
            ["--host-discovery-script", "SCRIPT", "--min-ranks", "3", "--max-ranks", "2"],
            "are less than",
        ),
        (["--host-discovery-script", "SCRIPT", "--dry-run"], "--dry-run"),
    ],
)
def test_wrong_calls(script, arguments, message, capsys):
    """One line, and status 2."""
    words = [str(script[0]) if each == "SCRIPT" else each for each in arguments]
    with pytest.raises(SystemExit) as left:
        cli.main(["run", *words, __file__])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def elastic_job(tmp_path, program, settings, *arguments, epochs, seconds):
    """Start a training whose hosts come and go."""
    options = ["--host-discovery-script", program, "--address", "127.0.0.1", *arguments]
    training = [TRAINING, "--out", tmp_path, "--epochs", epochs, "--seconds", seconds]
    return Launched("run", *options, *training, env=settings)


def wait_for_starts(job, tmp_path, n, seconds=60):
    """Wait until training has started so many times, and return with how many ranks each time."""
    deadline = time.monotonic() + seconds
    started = tmp_path / "started"
    while True:
        lines = started.read_text().splitlines() if started.exists() else []
        if len(lines) >= n:
            return [int(line.split()[0]) for line in lines]
        assert job.process.poll() is None, job.end()
        assert time.monotonic() < deadline, lines
        time.sleep(0.05)


def check_counts(ended, epochs):
    """Compare how often each sample was seen with what one process without a break sees.

    The last batch may reach into the epoch after the last one.
    """
    counts = np.array(
        re.findall(r"^\[0\] counts (.*)$", ended.stdout, re.MULTILINE)[0].split(), int
    )
    assert epochs * N_SAMPLES <= counts.sum() < epochs * N_SAMPLES + 6, counts
    comm = chainer_dist.create_communicator("naive")
    iterator = chainer_dist.iterators.DistributedIterator(np.arange(N_SAMPLES), 1, comm, seed=0)
    seen = [next(iterator)[0] for _ in range(counts.sum())]
    assert counts.tolist() == np.bincount(seen, minlength=N_SAMPLES).tolist()


@pytest.mark.parametrize("n_changes", [4])
def test_each_sample_once(tmp_path, script, two_hosts, n_changes):  # noqa: F811 - the fixture
    """However often hosts come and go, no sample of an epoch is lost or seen twice."""
    program, hosts = script
    choices = {"nodea:2\nnodeb:1\n": 3, "nodea:1\n": 1, "nodeb:2\n": 2, "nodea:1\nnodeb:1\n": 2}
    texts, draw = ["nodea:1\n"], random.Random(n_changes)
    while len(texts) <= n_changes:
        # What is no change to a running job is left out: other hosts that have no more room.
        texts.append(draw.choice([each for each in choices if not is_the_same(texts[-1], each)]))
    hosts.write_text(texts[0])
    job = elastic_job(tmp_path, program, two_hosts, epochs=n_changes * 3, seconds=0.06)
    for n, text in enumerate(texts[1:], 1):
        assert wait_for_starts(job, tmp_path, n)[-1] == choices[texts[n - 1]]
        time.sleep(draw.random())
        change(hosts, text)
    wait_for_starts(job, tmp_path, len(texts))
    ended = job.end(200)
    assert ended.status == 0, ended
    check_counts(ended, n_changes * 3)
    assert ended.stderr.count("asked to save and to end") == n_changes


def is_the_same(before, after):
    """Tell whether a job on hosts stays as it is when these are there."""
    old, new = (
        {h.split(":")[0]: int(h.split(":")[1]) for h in each.split()} for each in (before, after)
    )
    return all(new.get(name, 0) >= n for name, n in old.items()) and sum(new.values()) <= sum(
        old.values()
    )


def test_a_host_that_is_lost(tmp_path, script, two_hosts):  # noqa: F811 - the fixture
    """Its ranks die before the script knows; that is no failure of the job's own."""
    program, hosts = script
    hosts.write_text("nodea:1\nnodeb:1\n")
    job = elastic_job(tmp_path, program, two_hosts, epochs=6, seconds=0.03)
    wait_for_starts(job, tmp_path, 1)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "checkpoints").glob("*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    change(hosts, "nodea:1\n")
    victims = [pid for pid, command in job.processes().items() if b"elastic_training" in command]
    os.kill(victims[-1], signal.SIGKILL)
    ended = job.end(120)
    assert ended.status == 0, ended
    check_counts(ended, 6)
    assert "starting again on 1 ranks" in ended.stderr


def test_waiting_for_hosts(tmp_path, script):
    """The job starts when there are enough."""
    program, hosts = script
    hosts.write_text("")
    code = "print('started')"
    job = Launched(
        "run", "--host-discovery-script", program, "--min-ranks", 2, write(tmp_path, code)
    )
    time.sleep(2)
    change(hosts, "localhost:2\n")
    ended = job.end()
    assert ended.status == 0, ended
    assert sorted(ended.stdout.splitlines()) == ["[0] started", "[1] started"]
    assert "waiting for hosts: there is room for 0 of 2 ranks" in ended.stderr
    hosts.write_text("")
    words = ("run", "--host-discovery-script", program, "--timeout", 3, write(tmp_path, code))
    ended = launch(*words)
    assert ended.status == 1
    assert ended.reason.endswith("the time limit is reached, and there are not enough hosts")
    job = Launched("run", "--host-discovery-script", program, write(tmp_path, code))
    time.sleep(2)
    job.process.send_signal(signal.SIGINT)
    ended = job.end()
    assert ended.status == 130
    assert ended.reason.endswith("SIGINT came while there were no hosts")

"""Every command that the documentation names as the same as one of another launcher does what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from test_launch_restarts import two_hosts  # noqa: F401 - a fixture

from launcher import RANK, launch

pytestmark = [pytest.mark.mpi_skip, pytest.mark.faults]

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "other_launchers.rst"
COMMANDS = re.findall(r"     - ``chainer-dist (run .*?)``", PAGE.read_text(encoding="utf-8"))


def test_there_are_ten():
    """And each row has its command."""
    assert len(COMMANDS) >= 10
    assert len(COMMANDS) == PAGE.read_text(encoding="utf-8").count("   * - ``")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command(command, tmp_path, two_hosts):  # noqa: F811 - the fixture
    """It starts as many ranks as the page says, where it says, with the script's own arguments."""
    package = tmp_path / "package"
    package.mkdir()
    code = (
        RANK + "import socket; print(socket.gethostname(), sys.argv[1:], os.environ.get('LEVEL'))"
    )
    for script in (tmp_path / "train.py", package / "train.py"):
        script.write_text(code)
    (tmp_path / "hosts").write_text("node1:8\nnode2:8\n")
    program = tmp_path / "hosts.sh"
    program.write_text("#!/bin/sh\necho node1:2; echo node2:3\n")
    program.chmod(0o755)
    words = shlex.split(command)
    settings = {**two_hosts, "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_TASKS_PER_NODE": "2(x2)"}
    if words != ["run", "train.py"]:
        settings = two_hosts
    job = launch("run", "--address", "127.0.0.1", *words[1:], cwd=tmp_path, env=settings)
    assert job.status == 0, job
    lines = sorted(job.stdout.splitlines())
    n_ranks = 2 if "-np 2" in command or "--nproc-per-node 2 --max" in command else 4
    assert [int(line[1]) for line in lines] == [*range(n_ranks)]
    several = any(each in command for each in ("node1", "hosts", "run train.py"))
    if several:
        assert [line.split()[1] for line in lines] == ["node1", "node1", "node2", "node2"]
    assert all(line.endswith("3") == ("LEVEL" in command) for line in lines)
    assert all(("['--epochs', '3']" in line) == ("--epochs" in command) for line in lines)
    assert (tmp_path / "logs" / "rank.3.log").exists() == ("logs" in command)

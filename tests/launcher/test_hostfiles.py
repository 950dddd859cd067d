"""Hostfiles of MPICH and Open MPI, and the lists of hosts that schedulers give."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chainer_dist.launcher.allocations import allocation
from chainer_dist.launcher.errors import LaunchError
from chainer_dist.launcher.hostfiles import (
    Host,
    expand,
    n_slots,
    parse_hostfile,
    parse_hosts,
    read_hostfile,
)

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks

ROOT = Path(__file__).resolve().parents[2]
RESUMABLE = "scripts/examples/train_resumable.py"
NAMES = st.from_regex(r"[a-z][a-z0-9]{0,4}(-[a-z]+)?", fullmatch=True)
HOSTS = st.lists(
    st.builds(
        lambda name, slots, more: Host(name, slots, None if more is None else slots + more),
        NAMES,
        st.integers(1, 99),
        st.none() | st.integers(0, 9),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda host: host.name,
)
PADDING = st.sampled_from(["", " ", "\t", "  "])


@st.composite
def hostfiles(draw):
    """Draw hosts and a file that names them, a line in either format."""
    hosts = draw(HOSTS)
    lines = []
    for name, slots, max_slots in hosts:
        lines.append(draw(st.sampled_from(["", "  ", "# a comment", "\t# b:c slots=0"])))
        equals = draw(PADDING) + "=" + draw(PADDING)
        if max_slots is not None:
            option = draw(st.sampled_from(["max_slots", "max-slots"]))
            settings = [f"slots{equals}{slots}", f"{option}{equals}{max_slots}"]
            line = f"{name} {' '.join(draw(st.permutations(settings)))}"
        else:
            forms = [f"{name}:{slots}", f"{name} slots{equals}{slots}"]
            line = draw(st.sampled_from(forms + [name] * (slots == 1)))
        lines.append(draw(PADDING) + line + draw(PADDING) + draw(st.sampled_from(["", "# end"])))
    return hosts, "\n".join(lines)


HUGE = "9" * 5000


@pytest.mark.parametrize(
    "text", ["", ",", "a,", ":2", f"a:{HUGE}", f"a[{HUGE}]", f"a[1-{HUGE}]", "a:٣", "a\0"]
)
def test_hosts_that_cannot_be_read(text):
    """It is an error of the launcher's, whatever is wrong."""
    with pytest.raises(LaunchError):
        parse_hosts(text)


@pytest.mark.parametrize(
    "text",
    ["", "\n", "\0", "a\x1cb", f"a:{HUGE}", "a slots=", "a slots=1_0", "a slots=-1", "\x1b[2J"],
)
def test_hostfiles_that_cannot_be_read(tmp_path, text):
    """So it is of a file."""
    file = tmp_path / "hosts"
    file.write_text(text)
    with pytest.raises(LaunchError, match="hosts"):
        read_hostfile(str(file))


def test_what_is_no_hostfile():
    """A device that never ends is not read to its end; a name may be none."""
    for file in ("/dev/zero", "nul\0", ".", ""):
        with pytest.raises(LaunchError):
            read_hostfile(file)


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_NODELIST": ""},
        {"SLURM_JOB_NODELIST": f"a[1-{HUGE}]"},
        {"SLURM_JOB_NODELIST": "a", "SLURM_TASKS_PER_NODE": ""},
        {"SLURM_JOB_NODELIST": "a", "SLURM_TASKS_PER_NODE": HUGE},
        {"SLURM_JOB_NODELIST": "a", "SLURM_TASKS_PER_NODE": "٣"},
        {"SLURM_JOB_NODELIST": "a", "SLURM_TASKS_PER_NODE": ",".join(["1(x99999)"] * 9999)},
        {"PBS_NODEFILE": ""},
        {"PBS_NODEFILE": "/dev/zero"},
    ],
)
def test_schedulers_that_say_what_cannot_be_read(environ):
    """The error names the variable."""
    with pytest.raises(LaunchError, match=[*environ][-1]):
        allocation(environ)


@given(hostfiles())
def test_either_format_gives_the_hosts(drawn):
    """Comments, spaces and empty lines mean nothing."""
    hosts, text = drawn
    assert parse_hostfile(text, "file") == hosts


@given(HOSTS)
def test_hosts_in_one_line(hosts):
    """As for mpiexec's -hosts and --host."""
    text = ", ".join(f"{host.name}:{host.slots}" for host in hosts)
    assert parse_hosts(text) == [Host(host.name, host.slots) for host in hosts]
    assert n_slots(hosts) == sum(host.slots for host in hosts)


@given(first=st.integers(0, 200), more=st.integers(0, 50), width=st.integers(0, 5), end=NAMES)
def test_a_range_counts_up(first, more, width, end):
    """Every number of the range, in order, as wide as its first."""
    zero = str(first).zfill(width)
    names = expand(f"n[{zero}-{first + more}]{end}")
    assert [int(re.match(r"n(\d+)", name)[1]) for name in names] == [
        *range(first, first + more + 1)
    ]
    assert len(names[0]) == 1 + len(zero) + len(end)
    assert names[0] == f"n{zero}{end}"


@pytest.mark.parametrize(
    ("nodelist", "names"),
    [
        ("node1", "node1"),
        ("node[01-03,7]", "node01 node02 node03 node7"),
        ("a,b[1-2],c", "a b1 b2 c"),
        ("r[1-2]n[0-1]", "r1n0 r1n1 r2n0 r2n1"),
        ("n[098-101].x.org", "n098.x.org n099.x.org n100.x.org n101.x.org"),
        ("10.0.0.[8-10]", "10.0.0.8 10.0.0.9 10.0.0.10"),
    ],
)
def test_slurm_lists(nodelist, names):
    """As ``scontrol show hostnames`` expands them."""
    assert expand(nodelist) == names.split()


def test_hosts_that_are_named_again_take_more():
    """PBS names a host once a rank."""
    assert parse_hostfile("a\nb\na\na:2\n", "") == [Host("a", 4), Host("b", 1)]
    text = "a slots=1 max_slots=2\na slots=2 max_slots=4"
    assert parse_hostfile(text, "") == [Host("a", 3, 6)]
    assert parse_hostfile("a slots=1 max_slots=2\na", "") == [Host("a", 2, None)]


WRONG_LINES = {
    "a:two": "slots are a number from 1 up, not 'two'",
    "a:0": "slots are a number from 1 up, not '0'",
    "a:": "slots are a number from 1 up, not ''",
    "a slots=-1": "not '-1'",
    "a slots=٣": "not '٣'",
    "a slots=4 max_slots=2": "max_slots=2 is less than slots=4",
    "a:4 slots=4": "neither node1:4 nor node1 slots=4",
    "a user=me": "'user' is not known",
    "a b": "'b' is not known",
    "a slots": "'slots' is not known",
    "^a slots=2": "'^a' is no host",
    "a[1-2": "is no host",
    "a[2-1]": "2-1 runs backward",
    "a[x]": "[x] is no list of numbers",
    "a[1-9999999999]": "more than 100,000 hosts",
    "a[1-999][1-999]": "more than 100,000 hosts",
    ":4": "'' is no host",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_line(line, tmp_path):
    """The error names the file and the line, and says what is wrong."""
    file = tmp_path / "hosts"
    file.write_text(f"# hosts\n\nb:2\n{line}\n", encoding="utf-8")
    with pytest.raises(LaunchError) as caught:
        read_hostfile(str(file))
    assert str(caught.value).startswith(f"{file}, line 4: ")
    assert WRONG_LINES[line] in str(caught.value)


@given(text=st.text(alphabet="ab1:[]-, =#slot\n", max_size=30))
def test_any_text_is_read_or_refused(text):
    """With the launcher's own error, and no other."""
    try:
        hosts = parse_hostfile(text, "file")
    except LaunchError:
        return
    assert n_slots(hosts) >= len(hosts) > 0


def test_files_that_cannot_be_read(tmp_path):
    """Not there, or empty, or not text."""
    with pytest.raises(LaunchError, match=r"hostfile .*nosuch: No such file"):
        read_hostfile(str(tmp_path / "nosuch"))
    with pytest.raises(LaunchError, match="names no host"):
        parse_hostfile("# nothing\n", "file")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(LaunchError, match=r"binary: .*decode"):
        read_hostfile(str(tmp_path / "binary"))


@pytest.mark.parametrize("file", sorted(ROOT.glob("mpi_hostfiles/*.*[!rst]")), ids=lambda p: p.name)
def test_the_examples(file):
    """The hostfiles of this repository are read."""
    slots = {host.slots for host in read_hostfile(str(file))}
    assert slots == ({2} if "localhost" in file.name else {4})


def test_slurm():
    """Hosts and tasks, repeated or not."""
    environ = {"SLURM_JOB_NODELIST": "n[1-4]", "SLURM_TASKS_PER_NODE": "2(x3),1"}
    assert allocation(environ) == (
        "Slurm",
        [Host("n1", 2), Host("n2", 2), Host("n3", 2), Host("n4", 1)],
    )
    assert allocation({"SLURM_JOB_NODELIST": "n1"}) == ("Slurm", [Host("n1", 1)])
    assert allocation({}) is None


@given(counts=st.lists(st.tuples(st.integers(1, 64), st.integers(1, 5)), min_size=1, max_size=5))
def test_slurm_counts(counts):
    """The hosts take as many ranks as Slurm has tasks."""
    n_hosts = sum(times for _, times in counts)
    tasks = ",".join(f"{n}(x{times})" if times > 1 else str(n) for n, times in counts)
    environ = {"SLURM_JOB_NODELIST": f"n[1-{n_hosts}]", "SLURM_TASKS_PER_NODE": tasks}
    _, hosts = allocation(environ)
    assert [host.slots for host in hosts] == [n for n, times in counts for _ in range(times)]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("2(x3)", "is for 3 hosts, SLURM_JOB_NODELIST=n[1-2] has 2"),
        ("two", "is 'two', expected a list such as 2(x3),1"),
        ("2,0", "is '2,0', expected"),
    ],
)
def test_slurm_lists_that_do_not_fit(tasks, message):
    """The error names the variables."""
    with pytest.raises(LaunchError, match=r"^SLURM_TASKS_PER_NODE") as caught:
        allocation({"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": tasks})
    assert message in str(caught.value)
    with pytest.raises(LaunchError, match="SLURM_JOB_NODELIST: "):
        allocation({"SLURM_JOB_NODELIST": "n[", "SLURM_TASKS_PER_NODE": tasks})


def test_pbs(tmp_path):
    """A line a rank."""
    file = tmp_path / "nodes"
    file.write_text("n1\nn1\nn2\nn2\n")
    assert allocation({"PBS_NODEFILE": str(file)}) == ("PBS", [Host("n1", 2), Host("n2", 2)])
    with pytest.raises(LaunchError, match=r"PBS_NODEFILE: .*No such file"):
        allocation({"PBS_NODEFILE": str(tmp_path / "nosuch")})


@pytest.mark.parametrize("script", ["slurm_job.sh", "pbs_job.sh"])
def test_job_scripts(script):
    """The shell can read them, and they start a script that goes on from its checkpoints."""
    file = ROOT / "scripts" / "cluster" / script
    subprocess.run([shutil.which("bash"), "-n", file], check=True)
    text = file.read_text()
    assert f"chainer-dist run --max-restarts 3 {RESUMABLE}" in text
    assert "checkpoint.resume(trainer)" in (ROOT / RESUMABLE).read_text()


def test_the_job_of_kubernetes():
    """It starts the same script, and keeps the checkpoints on a volume that outlives the workers."""
    text = (ROOT / "scripts" / "cluster" / "kubernetes_mpijob.yaml").read_text()
    arguments = re.findall(r"^ +- (\S+)$", text[text.index("args:") :], re.MULTILINE)
    assert arguments[1:4] == ["--max-restarts=3", RESUMABLE, "--out=/result"]
    assert "{name: result, mountPath: /result}" in text
    assert "persistentVolumeClaim" in text


def test_hosts_of_lsf():
    """A list of hosts, each followed by its slots; several queues may name a host twice."""
    environ = {"LSB_MCPU_HOSTS": "n1 2 n2 4 n1 1"}
    assert allocation(environ) == ("LSF", [Host("n1", 3), Host("n2", 4)])
    for wrong in ("", "n1", "n1 2 n2", "n1 x", "n1 0", "-x 2"):
        with pytest.raises(LaunchError, match=r"^LSB_MCPU_HOSTS is"):
            allocation({"LSB_MCPU_HOSTS": wrong})


FLUX = '{"version": 1, "execution": {"R_lite": %s, "nodelist": ["n[01-02]", "big"]}}'


@pytest.mark.skipif(sys.platform == "win32", reason="the command is a script")
def test_hosts_of_flux(tmp_path):
    """Its command is asked; hosts may differ, and one whose broker has no cores is left out."""
    command = tmp_path / "flux"

    def answer(text, status=0):
        command.write_text(
            f"#!/bin/sh\ntest \"$*\" = 'resource R' || exit 9\necho '{text}'\nexit {status}\n"
        )
        command.chmod(0o755)
        return allocation({"FLUX_URI": "local:///x", "PATH": f"{tmp_path}:/bin:/usr/bin"})

    lite = (
        '[{"rank": "0-1", "children": {"core": "0-3,7"}}, {"rank": "2", "children": {"core": "0"}}]'
    )
    assert answer(FLUX % lite) == ("Flux", [Host("n01", 5), Host("n02", 5), Host("big", 1)])
    lite = '[{"rank": "1", "children": {"core": "0-1"}}]'
    assert answer(FLUX % lite) == ("Flux", [Host("n02", 2)])
    for wrong in (
        "",
        "{}",
        "[]",
        FLUX % "[{}]",
        FLUX % '[{"rank": "0-99999999", "children": {"core": "0"}}]',
    ):
        with pytest.raises(LaunchError, match="flux resource R prints what is no resource set"):
            answer(wrong)
    with pytest.raises(LaunchError, match="flux resource R: status 3"):
        answer("{}", 3)
    command.unlink()
    with pytest.raises(LaunchError, match="no command flux on PATH"):
        allocation({"FLUX_URI": "local:///x", "PATH": str(tmp_path)})

"""Jobs that ``chainer-dist run`` starts: what they print, how they end, and that nothing is left of them."""

from __future__ import annotations

import mmap
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import mpi_job
from chainer_dist.launcher import cli, cores, leftovers, options, output
from chainer_dist.launcher import job as job_module
from chainer_dist.watch import settings
from launcher import LAUNCHER, MARK, Launched, launch, run, write

# These start jobs of their own.
pytestmark = [pytest.mark.mpi_skip, pytest.mark.faults]

HANG = "time.sleep(1000)"

# What rank 1 does while the others sleep, the launcher's status, and its reason.
FAILURES = {
    "exit": ("sys.exit(3)", 3, "exit status 3"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", 137, "killed by SIGKILL"),
    "no memory": (
        "os.kill(os.getpid(), signal.SIGBUS)",
        135,
        "killed by SIGBUS (most often as /dev/shm is full",
    ),
    "segfault": ("import ctypes; ctypes.string_at(0)", 139, "killed by SIGSEGV"),
    "exception": (
        "\n  try: raise ValueError('boom')\n  except ValueError as e: raise KeyError('why') from e",
        1,
        "KeyError: 'why' (exit status 1)",
    ),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_the_reason_is_the_first_rank_that_failed(tmp_path, kind):
    """Its exception, status or signal; the others, which would never end, are ended."""
    statement, status, reason = FAILURES[kind]
    job = run(tmp_path, f"if rank == 1: {statement}\n{HANG}", ranks=3)
    assert job.status == status, job
    assert job.reason.startswith("chainer-dist: rank 1 on "), job
    assert reason in job.reason


ABORTS = {
    "MPI_Abort": ("from mpi4py import MPI", "MPI.COMM_WORLD.Abort(7)", 7, "exit status 7"),
    "exception": ("import chainer_dist", "raise ValueError('boom')", 1, "ValueError: boom"),
}


@pytest.mark.parametrize("kind", ABORTS)
def test_the_reason_is_the_rank_that_aborted(tmp_path, kind):
    """MPI kills all ranks then; the status is still that of the one that called it."""
    module, statement, status, reason = ABORTS[kind]
    code = (
        f"{module}\nfrom mpi4py import MPI\nMPI.COMM_WORLD.Barrier()\nif rank == 1: {statement}\n"
    )
    job = run(tmp_path, code + "MPI.COMM_WORLD.Barrier()", ranks=3)
    assert job.status == status, job
    assert job.reason.startswith("chainer-dist: rank 1 on "), job
    assert reason in job.reason


def test_a_job_that_ends_well(tmp_path):
    """Every rank is one of all, and gets the arguments, even such as the launcher has itself."""
    code = "from mpi4py import MPI\nprint(MPI.COMM_WORLD.allreduce(rank), *sys.argv[1:])"
    script = write(tmp_path, code)
    job = launch("run", "-n", 3, script, "-n", "7", "--timeout", "x y")
    assert job.status == 0, job
    assert sorted(job.stdout.splitlines()) == [f"[{n}] 3 -n 7 --timeout x y" for n in range(3)]


def test_a_module(tmp_path):
    """As with python -m, the rest of the command line is the module's."""
    (tmp_path / "some_module.py").write_text("import sys; print(sys.argv[1:], __name__)")
    job = launch("run", "-n", 1, "-m", "some_module", "-n", "7", cwd=tmp_path)
    assert (job.status, job.stdout) == (0, "['-n', '7'] __main__\n")


def test_lines_are_whole(tmp_path):
    """However fast ranks print, each line is one rank's, and says which."""
    code = """
for i in range(2000):
    print(f"{rank} {i} {'x' * (i * 7 % 200)} {rank}", file=(sys.stdout, sys.stderr)[i % 2])
sys.stdout.write("no end")
"""
    job = run(tmp_path, code, ranks=3)
    assert job.status == 0
    for text, remainder in ((job.stdout, 0), (job.stderr, 1)):
        seen = {(rank, i) for rank in range(3) for i in range(remainder, 2000, 2)}
        for line in text.splitlines():
            if line.startswith("chainer-dist: warning: 3 ranks share"):
                continue  # a machine of two cores
            match = re.fullmatch(r"\[(\d)\] (?:(\d) (\d+) (x*) (\d)|no end)", line)
            assert match, line
            if match[2]:
                assert match[1] == match[2] == match[5]
                assert len(match[4]) == int(match[3]) * 7 % 200
                seen.remove((int(match[1]), int(match[3])))
        assert not seen
    assert job.stdout.count("no end") == 3


def test_no_prefix(tmp_path):
    """Then output is passed on as it comes."""
    job = run(tmp_path, "sys.stdout.write(f'<{rank}>')", "--no-prefix")
    assert sorted(job.stdout.replace(">", "> ").split()) == ["<0>", "<1>"]


def test_standard_input_is_rank_0s(tmp_path):
    """All of it, however slowly it is read; the others see its end at once."""
    code = "time.sleep(rank == 0)\nprint(len(sys.stdin.buffer.read()))"
    job = run(tmp_path, code, stdin=b"x" * 1_000_001)
    assert sorted(job.stdout.splitlines()) == ["[0] 1000001", "[1] 0"], job


def test_a_script_that_reads_no_input_ends(tmp_path):
    """What nobody reads keeps nobody waiting."""
    assert run(tmp_path, "sys.stdin.close()", stdin=b"x" * 1_000_000).status == 0


@pytest.mark.parametrize("status", [0, 4])
def test_nothing_is_left_of_what_a_script_started(tmp_path, status):
    """Data-loader processes, say, whose parent has gone."""
    code = f"import subprocess; subprocess.Popen(['sleep', '1000']); sys.exit({status} * rank)"
    assert run(tmp_path, code).status == status


def test_time_limit(tmp_path):
    """The job ends with status 124, and each rank says in which line it was."""
    job = run(tmp_path, f"def here():\n  {HANG}\nhere()", "--timeout", "2")
    assert job.status == 124
    assert job.reason == "chainer-dist: the time limit is reached; rank 0, 1 had not ended"
    for rank in range(2):
        assert re.search(rf"\[{rank}\] .*script.py\", line \d+ in here", job.stderr), job


def test_time_limit_of_ranks_that_do_not_listen(tmp_path, monkeypatch):
    """They are killed."""
    code = f"""
for number in (signal.SIGTERM, signal.SIGABRT):
    signal.signal(number, signal.SIG_IGN)
open({str(tmp_path)!r} + f"/{{rank}}", "w").write(str(os.getpid()))
{HANG}"""
    monkeypatch.setattr(job_module, "SECONDS_TO_OBEY", 1)
    script = write(tmp_path, code)
    assert cli.main(["run", "-n", "2", "--timeout", "2", str(script)]) == 124
    for rank in range(2):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / str(rank)).read_text()), 0)


def signalled(tmp_path, code, *numbers, to_group=False):
    """Run a script, send signals to the launcher when it is ready, and return how it ended."""
    ready = tmp_path / "ready"
    code += f"\nif rank == 1: open({str(ready)!r}, 'w').write('ready')\n{HANG}"
    job = Launched("run", "-n", 2, write(tmp_path, code))
    job.wait_for(ready, "ready")
    time.sleep(0.3)  # rank 0 should be there too
    for number in numbers:
        (os.killpg if to_group else os.kill)(job.process.pid, number)
        time.sleep(0.3)
    return job.end()


@pytest.mark.parametrize(
    ("number", "to_group"),
    [
        (signal.SIGINT, True),
        (signal.SIGTERM, True),
        (signal.SIGTERM, False),
        (signal.SIGUSR1, False),
    ],
)
def test_signals_reach_the_scripts(tmp_path, number, to_group):
    """A script may use them to write a checkpoint, also if mpiexec gets them from the terminal."""
    code = f"""
def save(*_):
    time.sleep(0.5)
    print("saved")
    os._exit(0)
signal.signal({int(number)}, save)
"""
    job = signalled(tmp_path, code, number, to_group=to_group)
    assert job.status == 0, job
    assert sorted(job.stdout.splitlines()) == ["[0] saved", "[1] saved"]


def test_ctrl_c(tmp_path):
    """Ranks see a KeyboardInterrupt."""
    job = signalled(tmp_path, "", signal.SIGINT)
    assert job.status == 130, job
    assert "the ranks are asked to end" in job.stderr
    assert "[0] KeyboardInterrupt" in job.stderr
    assert "[1] KeyboardInterrupt" in job.stderr


def test_ctrl_c_twice(tmp_path):
    """The second one kills."""
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    job = signalled(tmp_path, code, signal.SIGINT, signal.SIGINT)
    assert (job.status, job.reason) == (
        130,
        "chainer-dist: interrupted twice: the ranks were killed",
    )


def test_no_rank_survives_the_launcher(tmp_path):
    """Nor its killing."""
    assert signalled(tmp_path, "", signal.SIGKILL).status == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("n_above", [1, 2])
def test_no_script_survives_its_monitor(tmp_path, n_above):
    """Nor what mpiexec takes for the rank; the job fails, and says which rank it was."""
    code = f"""
if rank == 1:
    pid = os.getpid()
    for _ in range({n_above}):
        pid = int(open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[1])
    os.kill(pid, signal.SIGKILL)
{HANG}"""
    job = run(tmp_path, code)
    assert job.status != 0, job
    assert "rank 1 on" in job.reason or "mpiexec ended the job" in job.reason


# How rank 1 leaves, while all ranks share memory.
LEAVES_MEMORY = {
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "aborts": "MPI.COMM_WORLD.Abort(3)",
    "monitor killed": "os.kill(os.getppid(), signal.SIGKILL)",
    "workers": "os.kill(os.getppid(), signal.SIGKILL)",
    "launcher killed": "pass",
}


@pytest.mark.skipif(not leftovers.SHARED_MEMORY.is_dir(), reason="finds shared memory in /dev/shm")
@pytest.mark.parametrize("how", LEAVES_MEMORY)
def test_no_shared_memory_is_left(tmp_path, how):
    """What MPI and multiprocessing would have removed goes when the job ends, and so do folders."""
    code = f"""
import multiprocessing
from mpi4py import MPI
MPI.COMM_WORLD.Barrier()
if {how == "workers"}:
    lock = multiprocessing.get_context("spawn").Lock()
used = {{line.split()[5] for line in open("/proc/self/maps") if "/dev/shm/" in line}}
if {how == "workers"}:
    used.add("/dev/shm/sem." + lock._semlock.name[1:])
print(*used, flush=True)
MPI.COMM_WORLD.Barrier()
open({str(tmp_path)!r} + f"/{{rank}}", "w").write("ready")
if rank == 1: time.sleep(0.5); {LEAVES_MEMORY[how]}
{HANG}"""
    folders = tmp_path / "folders"
    folders.mkdir()
    job = Launched("run", "-n", 3, write(tmp_path, code), env={"TMPDIR": str(folders)})
    for rank in range(3):
        job.wait_for(tmp_path / str(rank), "ready")
    if how == "launcher killed":
        job.process.kill()
    ended = job.end()
    assert ended.status != 0
    used = {name for line in ended.stdout.splitlines() for name in line.split()[1:]}
    assert used
    if how == "workers":
        assert any("sem" in name for name in used)
    assert not [name for name in used if Path(name).exists()]
    assert not [*folders.iterdir()]


@pytest.fixture
def shared_folder(monkeypatch):
    """Return a folder in shared memory that is taken for all of it."""
    with tempfile.TemporaryDirectory(dir=leftovers.SHARED_MEMORY) as folder:
        monkeypatch.setattr(leftovers, "SHARED_MEMORY", Path(folder))
        yield Path(folder)


def clean_up_elsewhere(folder):
    """Clean up as a process does that sees no process of this one's namespace."""
    code = "import sys, pathlib; from chainer_dist.launcher import __main__, leftovers\n"
    code += "leftovers.SHARED_MEMORY = pathlib.Path(sys.argv[1]); leftovers.remove_shared_memory(0)"
    unshare = [shutil.which("unshare") or "unshare", "--pid", "--fork", "--mount-proc"]
    if os.geteuid() != 0:
        unshare += ["--user", "--map-root-user"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not make a namespace of processes")
    subprocess.run([*unshare, sys.executable, "-c", code, folder], check=True)


@pytest.mark.skipif(not leftovers.SHARED_MEMORY.is_dir(), reason="uses shared memory in /dev/shm")
@pytest.mark.parametrize("elsewhere", [False, True])
def test_shared_memory_of_others_stays(shared_folder, elsewhere):
    """What a process maps or has open, here or in another container, what is older, and other names."""
    names = ["mpich_shm_mapped", "mpich_shm_open", "mpich_shm_unused", "sem.mp-unused", "mine"]
    names += ["psm_read", "ucx_shm_read only"]
    for name in names:
        (shared_folder / name).write_bytes(bytes(mmap.PAGESIZE))
    (shared_folder / "psm_folder").mkdir()
    (shared_folder / "psm_link").symlink_to(shared_folder / "mine")
    os.mkfifo(shared_folder / "psm_pipe")
    others = ["psm_folder", "psm_link", "psm_pipe"]
    with (shared_folder / names[0]).open("r+b") as file:
        memory = mmap.mmap(file.fileno(), 0)
    with (shared_folder / "ucx_shm_read only").open("rb") as file:
        read_only = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    (shared_folder / names[0]).rename(shared_folder / "sem.mp-mapped")  # as semaphores are made
    names[0] = "sem.mp-mapped"
    with (
        (shared_folder / names[1]).open("r+b"),
        (shared_folder / "psm_read").open("rb"),
        memory,
        read_only,
    ):
        leftovers.remove_shared_memory(time.time() + 5)
        assert sorted(path.name for path in shared_folder.iterdir()) == sorted([*names, *others])
        if elsewhere:
            clean_up_elsewhere(shared_folder)
        else:
            leftovers.remove_shared_memory(time.time() - 5)
        left = sorted(path.name for path in shared_folder.iterdir())
        used = ["mpich_shm_open", "sem.mp-mapped", "psm_read", "ucx_shm_read only"]
        assert left == sorted(["mine", *used, *others])


def test_nobody_reads_the_output(tmp_path):
    """As with ``| head -1``: the job ends."""
    code = "while True: print(rank)"
    job = subprocess.Popen(
        [*LAUNCHER, "run", "-n", "2", write(tmp_path, code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=mpi_job.environment(),
    )
    job.stdout.readline()
    job.stdout.close()
    assert job.wait(30) == 128 + signal.SIGPIPE
    assert b"Traceback" not in job.stderr.read()
    job.stderr.close()


# Calls mpiexec, once many have connected to the launcher who say nothing, or nothing sensible. They stay until
# the launcher has had enough of them.
MPIEXEC_AMID_STRANGERS = """#!{python}
import os, resource, socket, sys
if "--version" not in sys.argv:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    secret, where = os.environ["CHAINER_DIST_LAUNCHER"].split(",")
    address, port = where.split("/")
    assert address == "127.0.0.1"
    ours, its = os.pipe()
    if os.fork() == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        strangers = []
        for words in (b"GET / HTTP/1.0", bytes.fromhex(secret) * 3, b"H" + b"\\xff" * 200, *[b""] * 400):
            strangers.append(socket.create_connection((address, int(port))))
            strangers[-1].sendall(words)
        os.write(its, b".")
        os.dup2(os.open(os.devnull, os.O_RDWR), 1)
        os.dup2(1, 2)
        os.close(its)
        for each in strangers:
            each.settimeout(30)
            try:
                while each.recv(100):
                    pass
            except ConnectionError:
                pass
        os._exit(0)
    os.read(ours, 1)
os.execv({mpiexec!r}, [{mpiexec!r}, *sys.argv[1:]])
"""


def test_strangers_are_turned_away(tmp_path):
    """However many come before the ranks: these get through, also when the job is started again."""
    mpiexec = tmp_path / "mpiexec"
    mpiexec.write_text(
        MPIEXEC_AMID_STRANGERS.format(python=sys.executable, mpiexec=mpi_job.find_mpi().mpiexec)
    )
    mpiexec.chmod(0o755)
    code = "if os.environ['CHAINER_DIST_RESTART'] == '0': sys.exit(rank)\nprint('fine')"
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (200, before[1]))
    try:
        job = run(tmp_path, code, "--mpiexec", mpiexec, "--max-restarts", "1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert job.status == 0, job
    assert sorted(job.stdout.splitlines()) == ["[0] fine", "[1] fine"]
    assert "Traceback" not in job.stderr
    assert job.stderr.count("starting again") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="finds the address in /proc")
def test_a_job_hears_its_own_ranks_alone(tmp_path):
    """Who knows the secret and is no rank that is missing is not heard; with all ranks there nobody is."""
    code = """
import json, pathlib
from chainer_dist.launcher import rank as monitor
parent = open(f"/proc/{os.getppid()}/environ").read().split("\\0")
where = next(v for v in parent if v.startswith("CHAINER_DIST_LAUNCHER=")).partition("=")[2]
assert "CHAINER_DIST_LAUNCHER" not in os.environ
secret = where.partition(",")[0]
for line in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
        assert secret not in line.read_text()
    except OSError:
        pass
time.sleep(1)
try:
    monitor.connect(where, 1)
except OSError as error:
    assert "refused" in str(error), error
    print("fine")
"""
    job = run(tmp_path, f"if rank == 0: time.sleep(3); sys.exit()\n{code}")
    assert (job.status, job.stdout) == (0, "[1] fine\n"), job


def test_environment(tmp_path):
    """--env sets variables."""
    options = ("--env", "A=b=c", "--env", MARK)
    job = run(tmp_path, "print(os.environ['A'])", *options, ranks=1, cwd=tmp_path)
    assert job.stdout == "b=c\n", job


def test_watching(tmp_path):
    """Options set what the ranks read; the path of a timeline is then absolute."""
    code = """
from chainer_dist.watch import settings
print(settings.from_environment())
"""
    options = ("--timeline", "trace.json", "--stall-abort", "90.5", "--checked")
    job = run(tmp_path, code, *options, ranks=1, cwd=tmp_path)
    wanted = settings.Settings(60.0, 90.5, checked=True, timeline=str(tmp_path / "trace.json"))
    assert job.stdout == f"{wanted}\n", job
    job = run(tmp_path, code, ranks=1)
    assert job.stdout == f"{settings.Settings(60.0, None, checked=False, timeline=None)}\n", job


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no binding on this system")
def test_ranks_share_the_cores(tmp_path):
    """Each has its own, together all, and as many threads as cores; the communicator agrees."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core cannot be shared out")
    code = """
import threadpoolctl, chainer_dist
before = os.environ["OMP_NUM_THREADS"]
chainer_dist.create_communicator()
threads = {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}
print(before, os.environ["OMP_NUM_THREADS"], *threads, "cores", *os.sched_getaffinity(0))
"""
    free = dict.fromkeys(mpi_job.THREAD_VARIABLES)
    job = run(tmp_path, code, env=free)
    assert job.status == 0, job
    seen = set()
    for line in job.stdout.splitlines():
        threads, _, cores = line[4:].partition("cores")
        assert len(set(threads.split())) == 1, job
        assert not seen & set(cores.split())
        seen |= set(cores.split())
    assert {*map(int, seen)} == os.sched_getaffinity(0)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no binding on this system")
def test_users_decide_themselves(tmp_path):
    """On threads by their variable, on binding by --no-pin."""
    code = "print(os.environ.get('MKL_NUM_THREADS'), len(os.sched_getaffinity(0)) if rank else 'x')"
    settings = {**dict.fromkeys(mpi_job.THREAD_VARIABLES), "OPENBLAS_NUM_THREADS": "5"}
    job = run(tmp_path, code, "--no-pin", env=settings)
    assert f"[1] None {len(os.sched_getaffinity(0))}\n" in job.stdout, job


def test_dry_run(tmp_path):
    """It prints a command that does the same by itself, and does nothing."""
    code = "from mpi4py import MPI; os.write(1, b'size %d %s\\n' % (MPI.COMM_WORLD.size, sys.argv[1].encode()))"
    script = write(tmp_path, code)
    job = launch("run", "-n", 2, "--dry-run", script, "a b")
    assert (job.status, job.stderr) == (0, "")
    again = mpi_job.run(shlex.split(job.stdout), timeout=60)
    assert again.status == 0
    assert again.output.count("size 2 a b") == 2


# Words behind the script's name or the module's, as on the command line of a script that has such options.
WORDS = [
    ["-n", "5", "--hosts", "a", "--dry-run", "--help", "--version", "--max-restarts", "x"],
    ["--n", "5", "--host", "db", "--time", "60", "--no", "--m", "0.9", "--h=3", "-m", "mod"],
    ["--", "-n", "2"],
    ["a b", "", "*", "-", "é", "-nX", "-x=y", "x.py", "--", "--"],
    [],
]
LINES = [
    ([], ["x.py"], ["x.py"]),
    (["-n", "2", "--timeout=3", "--no-pin"], ["x.py"], ["x.py"]),
    (["-n2", "--env", "A=-m", "--env=x.py"], ["--", "x.py"], ["x.py"]),
    (["--checked"], ["--", "-x.py"], ["-x.py"]),
    (["--hosts", "x.py"], ["-m", "mod"], ["-m", "mod"]),
    ([], ["-mmod"], ["-m", "mod"]),
    (["--no-prefix"], ["--", "-m", "mod"], ["-m", "mod"]),
    (["-np", "2", "-N", "2", "-H", "a:2"], ["x.py"], ["x.py"]),
    (["-N2", "-Ha:2", "--nproc-per-node=2", "--only-rank", "0"], ["x.py"], ["x.py"]),
    (["--log-dir", "-", "--ssh-port", "22", "--verbose"], ["x.py"], ["x.py"]),
]


@pytest.mark.parametrize("line", LINES, ids=[str(n) for n in range(len(LINES))])
@pytest.mark.parametrize("words", WORDS, ids=[str(n) for n in range(len(WORDS))])
def test_options_of_the_script(line, words):
    """What is behind its name is the script's, however it is called and whatever the launcher has itself."""
    ours, script, wanted = line
    _, run = options.make_parser({})
    assert options.divide(["run", *ours, *script, *words], run) == (
        ["run", *ours],
        [*wanted, *words],
    )


def test_a_script_with_the_name_of_an_option(tmp_path):
    """It can be run, and so can a folder, and what they get is theirs."""
    (tmp_path / "-x.py").write_text("import sys; print(sys.argv[1:])")
    job = launch("run", "-n", 1, "--", "-x.py", "--n", "--", "-m", cwd=tmp_path)
    assert (job.status, job.stdout) == (0, "['--n', '--', '-m']\n"), job
    (tmp_path / "-x.py").rename(tmp_path / "__main__.py")
    job = launch("run", "-n", 1, tmp_path, "--host", "x")
    assert (job.status, job.stdout) == (0, "['--host', 'x']\n"), job


HUGE = "9" * 5000

WRONG_CALLS = [
    (["run", "nosuch.py"], "there is no script 'nosuch.py'"),
    (["run"], "no script is given"),
    (["run", "-m"], "-m wants the name of a module"),
    (["run", "-n", "0", "x.py"], "'0' is no number from 1 up"),
    (["run", "--max-restarts", "-1", "x.py"], "'-1' is no number from 0 up"),
    (["run", "--timeout", "soon", "x.py"], "'soon' is no number of seconds"),
    (["run", "--stall-abort", "0", "x.py"], "'0' is no number of seconds"),
    (["run", "--hosts", "a:0", __file__], "hosts 'a:0': slots are a number from 1 up, not '0'"),
    (["run", "--hosts", "a", "--hostfile", "b", __file__], "not allowed with"),
    (["run", "--hostfile", "nosuch", __file__], "hostfile nosuch: No such file"),
    (["run", "--env", "NO_SUCH_NAME", __file__], "give NAME=VALUE"),
    (["run", "--hosts", ",", __file__], "hosts ',': '' is no host"),
    (["run", "--hosts", "", __file__], "argument -H/--hosts/--host: there is nothing in it"),
    (["run", "--hosts", f"a:{HUGE}", __file__], "hosts 'a:9999"),
    (["run", "--hosts", f"a[1-{HUGE}]", __file__], "hosts 'a[1-9999"),
    (["run", "-n", HUGE, __file__], "argument -n/-np: '9999"),
    (["run", "-n", "99999999999", __file__], "99999999999 ranks are more than 1,000,000"),
    (["run", "-n", "٣", __file__], "'٣' is no number from 1 up"),
    (["run", "--hosts", "a\n\x1b[2Jb", __file__], r"'a\n\x1b[2Jb'"),
    (["run", "--hostfile", "", __file__], "argument --hostfile: there is nothing in it"),
    (["run", "--hostfile", "a\nb", __file__], r"hostfile a\nb: No such file"),
    (["run", "--hostfile", "/dev/zero", __file__], "hostfile /dev/zero: "),
    (["run", "--mpiexec", "", __file__], "argument --mpiexec: there is nothing in it"),
    (["run", "--address", "a,b", __file__], "'a,b' is no name or address of a host"),
    (["run", "--timeline", "", __file__], "argument --timeline: there is nothing in it"),
    (["run", "--timeout", "٣", __file__], "'٣' is no number of seconds"),
    (["run", "--stall-abort", "inf", __file__], "--stall-abort inf"),
    (["run", "--env", "", __file__], "--env ''"),
    (["run", "--env", "\n", __file__], r"--env '\n'"),
    (["run", "--tim", "3", __file__], "unrecognized arguments: --tim"),
    (["run", "--hots", "a", __file__], "unrecognized arguments: --hots; did you mean --hosts?"),
    (["run", "--nproc_per_node", "2", __file__], "did you mean --nproc-per-node?"),
    (["run", "--num_processes=2", __file__], "did you mean -n?"),
    (["run", "-f", "hosts", __file__], "did you mean --hostfile?"),
    (["run", "--bind-to", "core", __file__], "it is not needed: ranks are bound to cores"),
    (["run", "--zzz", __file__], "unrecognized arguments: --zzz; see"),
    (["run", "--hosts", ",", __file__], "hosts ',': "),
    (["run", "--hosts", "a:1", "--hostfile", "b", __file__], "not allowed with argument"),
    (
        ["run", "--hosts", "a:2,b:2", "-N", "3", "-n", "7", __file__],
        "7 ranks do not fit: -N 3 makes 6",
    ),
    (["run", "-N", "0", __file__], "argument -N/--nproc-per-node: '0' is no number from 1 up"),
    (["run", "--only-rank", "1,x", __file__], "argument --only-rank: 'x' is no number from 0 up"),
    (["run", "--ssh-port", "70000", __file__], "70000 is no port"),
    (["run", "--ssh-identity", "/no/key", __file__], "there is no file '/no/key'"),
    (["run", "--log-dir", "/dev/null/logs", __file__], "--log-dir /dev/null/logs: Not a directory"),
    (["run", "--timeline", "/no/such/trace.json", __file__], "there is no folder /no/such"),
    (["run", "--timeline", "/", __file__], "--timeline /: it is a folder, expected a file"),
    (["run", "python", "x.py", "-n", "3"], "did you mean chainer-dist run x.py -n 3?"),
    (["run", sys.executable, "x.py"], "no Python script; did you mean chainer-dist run x.py?"),
    (["run", "nul\0"], "script 'nul"),
    (["run", "-n"], "argument -n/-np: expected one argument"),
    (["info", "--js"], "unrecognized arguments: --js"),
    (["info", "x.py"], "unrecognized arguments: x.py"),
    (["start"], "invalid choice: 'start'; choose from run, info, scale, predict"),
    (["rnu", "x.py"], "invalid choice: 'rnu'; did you mean chainer-dist run?"),
    (["train.py", "--epoch", "3"], "did you mean chainer-dist run train.py --epoch 3?"),
    (["-n", "2", "x.py"], "did you mean chainer-dist run -n 2 x.py?"),
    ([], "are required: run | info"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), WRONG_CALLS, ids=[str(n) for n in range(len(WRONG_CALLS))]
)
def test_wrong_calls(arguments, message, capsys):
    """One line, and status 2."""
    with pytest.raises(SystemExit) as left:
        cli.main(arguments)
    assert left.value.code == 2
    said = capsys.readouterr()
    assert message in said.err
    assert (said.err.count("\n"), said.out) == (1, "")


@pytest.mark.parametrize("option", ["--log-dir", "--timeline"])
def test_a_folder_that_was_removed(tmp_path, monkeypatch, capsys, option):
    """The current one is, so that no path is below it."""
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(SystemExit) as left:
        cli.main(["run", option, "here", __file__])
    assert left.value.code == 2
    assert f"{option} here: the current folder was removed" in capsys.readouterr().err


def test_a_wrong_line_in_a_hostfile(tmp_path, capsys):
    """The message names the file and the line."""
    file = tmp_path / "hosts"
    file.write_text("# two\na:2\nb:two\n")
    with pytest.raises(SystemExit) as left:
        cli.main(["run", "--hostfile", str(file), __file__])
    assert left.value.code == 2
    assert f"{file}, line 3: slots are a number from 1 up, not 'two'" in capsys.readouterr().err


def test_more_ranks_than_max_slots(tmp_path, capsys):
    """Somebody has forbidden them."""
    file = tmp_path / "hosts"
    file.write_text("localhost slots=1 max_slots=2\n")
    with pytest.raises(SystemExit) as left:
        cli.main(["run", "--hostfile", str(file), "-n", "3", __file__])
    assert left.value.code == 2
    assert "more than the max_slots" in capsys.readouterr().err


def test_more_ranks_than_cores(capfd):
    """Are started, with a warning; not more slots than cores, as on hosts that are not here."""

    def said():
        output.finish(10)  # of an earlier job in this process
        return capfd.readouterr().err

    n_cores = len(cores.physical_cores())
    assert cli.main(["run", "--dry-run", "-np", str(n_cores + 1), __file__]) == 0
    assert f"warning: {n_cores + 1} ranks share the {n_cores} cores" in said()
    assert cli.main(["run", "--dry-run", "-n", "3", "--hosts", "a:1,b:1", __file__]) == 0
    assert "warning: 3 ranks share the 2 slots of the hosts" in said()
    for enough in (["-n", str(n_cores)], ["-H", "a:8,b:8"]):
        assert cli.main(["run", "--dry-run", *enough, __file__]) == 0
        assert "warning" not in said()


def test_ranks_a_host(capfd):
    """Their number times that of the hosts, whatever slots these have; or as many as -n says."""
    for more, n_ranks in (([], 6), (["-n", "5"], 5)):
        words = ["run", "--dry-run", "-N", "3", *more, "--host", "a:8,b", __file__]
        assert cli.main(words) == 0
        command = shlex.split(capfd.readouterr().out)
        assert command[command.index("-n") + 1] == str(n_ranks)
        assert "a:3,b:3" in command
    assert cli.main(["run", "--dry-run", "--nproc-per-node", "1", __file__]) == 0
    assert " -n 1 " in capfd.readouterr().out


def test_what_it_does_is_said_when_asked_for(tmp_path):
    """The MPI, and the command; and what a misspelt variable may have meant is said in any case."""
    script = write(tmp_path, "")
    job = launch("run", "-n", 2, "--verbose", script, env={"CHAINER_DIST_STALL_ABROT": "9"})
    assert job.status == 0
    assert re.search(r"chainer-dist: (MPICH|Open MPI|Intel MPI) \d", job.stderr)
    assert re.search(rf"chainer-dist: running \S+mpiexec.* {script}\n", job.stderr)
    hint = "CHAINER_DIST_STALL_ABROT has no meaning; did you mean CHAINER_DIST_STALL_ABORT?"
    assert job.stderr.count(hint) == 1


def test_slots_are_the_number_of_ranks(tmp_path):
    """Unless -n says otherwise."""
    job = launch("run", "--hosts", "localhost:3", write(tmp_path, "print(rank)"))
    assert sorted(job.stdout.split()) == ["0", "1", "2", "[0]", "[1]", "[2]"], job


def test_an_unknown_host():
    """Its mpiexec says what is wrong with it, and the job has failed."""
    job = launch("run", "--hosts", "no-such-host.invalid:2", "--address", "x", __file__)
    assert job.status not in (0, 2)
    assert "no-such-host.invalid" in job.stderr
    assert "no-such-host.invalid" in job.reason or "before any rank had started" in job.reason


NO_WAY = [
    "ssh: Could not resolve hostname nodec: Name or service not known",
    "ssh: connect to host nodec port 22: Connection refused",
]


@pytest.mark.parametrize("words", NO_WAY)
@pytest.mark.parametrize("option", ["--hosts", "--hostfile"])
def test_a_host_that_cannot_be_reached_ends_the_job(tmp_path, words, option):
    """In seconds, where mpiexec of MPICH 4.0 waits for ever: here as long as what it calls in the place of ssh."""
    shell = tmp_path / "ssh"
    shell.write_text(
        f"#!/bin/sh\nprintf '{words}\\r\\n' >&2\nwhile kill -0 $PPID; do sleep 0.1; done\n"
    )
    shell.chmod(0o755)
    (tmp_path / "hosts").write_text("nodec:2")
    named = "nodec:2" if option == "--hosts" else str(tmp_path / "hosts")
    names = ("HYDRA_LAUNCHER_EXEC", "PRTE_MCA_plm_ssh_agent", "OMPI_MCA_plm_rsh_agent")
    settings = {"HYDRA_LAUNCHER": "ssh", **dict.fromkeys(names, str(shell))}
    job = launch("run", option, named, "--address", "127.0.0.1", __file__, env=settings)
    assert job.status == 1, job
    assert job.reason == f"chainer-dist: a host of {option} {named} cannot be reached: {words}"


def test_the_launcher_cannot_be_reached(tmp_path):
    """The rank says so, and which option helps."""
    script = write(tmp_path, "")
    call = launch("run", "-n", 1, "--dry-run", script).stdout
    env = mpi_job.environment(CHAINER_DIST_LAUNCHER="00,127.0.0.1/9")
    job = mpi_job.run(shlex.split(call), timeout=60, env=env)
    assert job.status != 0
    assert "the launcher cannot be reached (127.0.0.1 port 9" in job.output
    assert "chainer-dist run --address" in job.output


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--dry-run", "-n", "2", __file__]])
def test_the_launcher_is_quick(arguments):
    """It imports no Chainer, no NumPy and no MPI, which take a second."""
    command = [sys.executable, "-X", "importtime", *LAUNCHER[1:], *arguments]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = set(re.findall(r"\| +(\S+)$", answer.stderr, re.MULTILINE))
    assert "argparse" in imported
    assert not imported & {"chainer", "numpy", "mpi4py", "threadpoolctl"}


def test_three_ways_to_call_it():
    """The command, and python -m with and without .launch."""
    wanted = launch("--version").stdout
    ways = [["-m", "chainer_dist"], ["-m", "chainer_dist.launcher"]]
    script = Path(sys.executable).parent / "chainer-dist"
    if script.exists():  # not where the package is only on the path
        ways.append([str(script)])
    for way in ways:
        answer = subprocess.run(
            [sys.executable, *way, "--version"], capture_output=True, text=True, check=True
        )
        assert answer.stdout == wanted

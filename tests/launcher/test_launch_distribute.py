"""Scripts that know nothing of other ranks, on several of them, as ``chainer-dist run --distribute`` has it."""

from __future__ import annotations

import json
import sys

import pytest

import mpi_job
from launcher import launch

# These start jobs of their own.
pytestmark = pytest.mark.mpi_skip

# What a script of any of these kinds begins and ends with.
BEGIN = """
import hashlib, sys
import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
from chainer import iterators, training
from chainer.training import extensions

np.random.seed(4)


class Net(chainer.Chain):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.l1 = L.Linear(None, 8)
            self.bn = L.BatchNormalization(8)
            self.l2 = L.Linear(8, 3)

    def forward(self, x):
        return self.l2(F.dropout(F.relu(self.bn(self.l1(x))), 0.3))


def data(n, seed):
    draws = np.random.RandomState(seed)
    return chainer.datasets.TupleDataset(
        draws.uniform(-1, 1, (n, 5)).astype(np.float32), draws.randint(0, 3, n).astype(np.int32)
    )


def done(model):
    found = hashlib.blake2b(digest_size=8)
    for _, value in sorted([*model.namedparams()], key=lambda item: item[0]):
        found.update(value.array.tobytes())
    print("parameters", found.hexdigest(), flush=True)
"""

TRAINER = """
def main():
    model = L.Classifier(Net())
    optimizer = chainer.optimizers.Adam().setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-3))
    train, rest = chainer.datasets.split_dataset_random(data(60, 0), 48, seed=1)
    train_iter = KIND(train, 4)
    trainer = training.Trainer(
        training.StandardUpdater(train_iter, optimizer), (2, "epoch"), out=sys.argv[1]
    )
    trainer.extend(extensions.Evaluator(iterators.SerialIterator(rest, 5, repeat=False), model))
    trainer.extend(extensions.LogReport())
    trainer.extend(extensions.PrintReport(["epoch", "main/loss", "validation/main/loss"]))
    trainer.extend(extensions.snapshot(), trigger=(1, "epoch"))
    trainer.extend(extensions.ExponentialShift("alpha", 0.5), trigger=(1, "epoch"))
    if len(sys.argv) > 2:
        chainer.serializers.load_npz(sys.argv[2], trainer)
    LINE
    trainer.run()
    done(model)
    chainer.serializers.save_npz(sys.argv[1] + "/model", model)


if __name__ == "__main__":
    main()
"""

LOOP = """
def main():
    model = L.Classifier(Net())
    optimizer = chainer.optimizers.Adam()
    optimizer.setup(model)
    train_iter = iterators.SerialIterator(data(48, 0), 4)
    batches = 0
    while train_iter.epoch < 2:
        x, t = chainer.dataset.concat_examples(train_iter.next())
        optimizer.update(model, x, t)
        batches += 1
    print("batches", batches, len(x))
    done(model)
    chainer.serializers.save_npz(sys.argv[1], model)
    chainer.serializers.load_npz(sys.argv[1], model)
    done(model)


main()
"""


def write(folder, text, name="script.py"):
    """Write a script."""
    script = folder / name
    script.write_text(BEGIN + text, encoding="utf-8")
    return script


def distribute(script, *arguments, ranks=2, options=()):
    """Run a script that knows nothing of other ranks on several, and return what it printed."""
    job = launch("run", "-n", ranks, "--distribute", *options, script, *arguments)
    assert job.status == 0, job
    return job.stdout


def of(printed, word):
    """Return what all ranks have printed after a word."""
    return [line.split(f"{word} ")[1] for line in printed.splitlines() if f"] {word} " in line]


@pytest.mark.parametrize(
    ("kind", "options"),
    [("SerialIterator", ()), ("MultithreadIterator", ("--distribute-batch", "global"))],
    ids=["rank", "global"],
)
def test_a_script_with_a_trainer(tmp_path, kind, options):
    """Parameters are those with the one line written, to the bit; rank 0 reports for all."""
    text = TRAINER.replace("KIND", f"iterators.{kind}")
    printed = distribute(
        write(tmp_path, text.replace("LINE", "")), tmp_path / "a", ranks=2, options=options
    )
    batch = "global" if options else "rank"
    line = f'import chainer_dist; chainer_dist.distribute(trainer, batch="{batch}")'
    written = launch("run", "-n", 2, write(tmp_path, text.replace("LINE", line)), tmp_path / "b")
    assert written.status == 0, written
    found = {*of(printed, "parameters")}
    assert found == {*of(written.stdout, "parameters")}
    assert len(found) == 1
    assert printed.count("validation/main/loss") == 1
    logs = [json.loads((tmp_path / name / "log").read_text()) for name in "ab"]
    for log in logs:
        for entry in log:
            del entry["elapsed_time"]
    assert logs[0] == logs[1]
    assert [entry["iteration"] for entry in logs[0]] == ([12, 24] if options else [6, 12])


def test_parts_that_are_left_to_chance(tmp_path):
    """They are drawn alike on all ranks."""
    text = TRAINER.replace("KIND", "iterators.SerialIterator").replace(", seed=1", "")
    printed = distribute(write(tmp_path, text.replace("LINE", "")), tmp_path)
    assert len({*of(printed, "parameters")}) == 1


def test_a_snapshot_is_resumed(tmp_path):
    """By a script that loads it before the trainer runs, which ends with the same parameters."""
    script = write(
        tmp_path, TRAINER.replace("KIND", "iterators.SerialIterator").replace("LINE", "")
    )
    whole = distribute(script, tmp_path / "whole")
    resumed = distribute(script, tmp_path / "part", tmp_path / "whole" / "snapshot_iter_12")
    assert {*of(whole, "parameters")} == {*of(resumed, "parameters")}


def test_a_loop_of_the_scripts_own(tmp_path):
    """Its iterator and its optimizer are distributed; what it saves is whole, and the same for all ranks."""
    printed = distribute(write(tmp_path, LOOP), tmp_path / "model.npz", ranks=3)
    assert len(of(printed, "parameters")) == 6
    assert len({*of(printed, "parameters")}) == 1
    assert of(printed, "batches") == ["8 4"] * 3
    assert not [*tmp_path.glob("*.tmp")]
    divided = distribute(
        write(tmp_path, LOOP),
        tmp_path / "model.npz",
        options=("--distribute-batch", "global"),
    )
    assert of(divided, "batches") == ["24 2"] * 2


SAVES = """
import pathlib
model = L.Classifier(Net())
optimizer = chainer.optimizers.SGD(0.1).setup(model)
batch = next(iterators.SerialIterator(data(12, 0), 4))
optimizer.update(model, *chainer.dataset.concat_examples(batch))
write = np.savez_compressed

def note(file, **arrays):
    print("wrote", pathlib.Path(file).name)
    write(file, **arrays)

np.savez_compressed = note
chainer.serializers.save_npz(pathlib.Path(sys.argv[1], "model.npz"), model)
chainer.serializers.save_hdf5(filename=sys.argv[1] + "/model.h5", obj=model)
chainer.serializers.load_npz(sys.argv[1] + "/model.npz", model)
chainer.serializers.load_hdf5(sys.argv[1] + "/model.h5", model)
done(model)
"""


def test_files_by_any_kind_of_path_and_format(tmp_path):
    """Rank 0 alone writes them, and the others can read them at once."""
    pytest.importorskip("h5py")
    printed = distribute(write(tmp_path, SAVES), tmp_path)
    assert of(printed, "wrote") == ["model.npz"]
    assert len({*of(printed, "parameters")}) == 1


REFUSED = {
    "own batches": (
        """
model = L.Classifier(L.Linear(5, 3))
optimizer = chainer.optimizers.SGD(0.1).setup(model)
x, t = chainer.dataset.concat_examples(data(12, 0)[:])
optimizer.update(model, x, t)
""",
        "chainer.iterators.SerialIterator(dataset, batch_size)",
    ),
    "its own communicator": (
        "import chainer_dist\nchainer_dist.create_communicator()\n",
        "start it without --distribute",
    ),
    "other data on each rank": (
        "import os\niterators.SerialIterator(data(12, os.getpid()), 4)\n",
        "numpy.random.seed(0)",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_done_is_refused(tmp_path, what):
    """The job ends, and says what to write."""
    text, words = REFUSED[what]
    job = launch("run", "-n", 2, "--distribute", write(tmp_path, text))
    assert job.status == 1, job
    assert words in job.reason


def test_the_option_of_the_batch_needs_the_other(tmp_path):
    """By itself it would do nothing."""
    job = launch("run", "--distribute-batch", "global", write(tmp_path, ""))
    assert job.status == 2
    assert "--distribute-batch needs --distribute" in job.stderr


def test_it_needs_no_launcher(tmp_path):
    """The variable will do, under mpiexec by hand; programs that the script starts do not find it."""
    script = write(
        tmp_path, "import os\nassert 'CHAINER_DIST_DISTRIBUTE' not in os.environ\n" + LOOP
    )
    command = [sys.executable, str(script), str(tmp_path / "model.npz")]
    env = mpi_job.environment(CHAINER_DIST_DISTRIBUTE="1")
    job = mpi_job.run(command, 2, timeout=60, env=env)
    assert job.status == 0, job.output
    assert job.output.count("batches 12 4") == 2
    env = mpi_job.environment(CHAINER_DIST_DISTRIBUTE="all")
    job = mpi_job.run(command, timeout=60, env=env)
    assert job.status != 0
    assert "expected 1, rank or global" in job.output


ALONE = "2 independent copies of the script have run"
TWICE = "both write"


def test_copies_that_do_not_communicate(tmp_path):
    """The job says so at its end, and how to make them one; files of two ranks are told of once."""
    text = TRAINER.replace("KIND", "iterators.SerialIterator").replace("LINE", "")
    job = launch("run", "-n", 2, write(tmp_path, text), tmp_path / "out")
    assert job.status == 0
    assert job.stderr.count(ALONE) == 1
    assert "chainer-dist run --distribute" in job.reason
    assert job.stderr.count(TWICE) == 1
    assert "rank 0 and rank 1 both write" in job.stderr
    job = launch("run", "-n", 1, write(tmp_path, text), tmp_path / "out")
    assert not job.stderr


def test_ranks_that_communicate_are_no_copies(tmp_path):
    """Nothing is said of them; nor of a job that fails, or of a script without Chainer."""
    both = write(tmp_path, "import chainer_dist\nchainer_dist.create_communicator()\n")
    assert not launch("run", "-n", 2, both).stderr
    plain = tmp_path / "plain.py"
    plain.write_text("print(1)")
    assert not launch("run", "-n", 2, plain).stderr
    fails = write(tmp_path, "sys.exit(3)\n")
    assert ALONE not in launch("run", "-n", 2, fails).stderr


def test_files_of_two_ranks(tmp_path):
    """With two lines for training and none for reports both ranks write the log: one warning."""
    line = (
        "import chainer_dist; comm = chainer_dist.create_communicator(); "
        "trainer.extend(lambda _: comm.bcast_obj(0), name='meet')"
    )
    text = TRAINER.replace("KIND", "iterators.SerialIterator")
    job = launch("run", "-n", 2, write(tmp_path, text.replace("LINE", line)), tmp_path / "out")
    assert job.stderr.count(TWICE) == 1
    assert "chainer_dist.on_rank_zero(trainer, comm)" in job.stderr
    assert ALONE not in job.stderr
    line += "; chainer_dist.on_rank_zero(trainer, comm)"
    job = launch("run", "-n", 2, write(tmp_path, text.replace("LINE", line)), tmp_path / "out")
    assert not job.stderr, job

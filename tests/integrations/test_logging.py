"""The code on the page "TensorBoard and MLflow", with the real libraries."""

from __future__ import annotations

import re
import struct
import textwrap
import time
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.training import extensions

import chainer_dist

PAGE = Path(__file__).parents[2] / "docs" / "howto" / "logging.rst"
TENSORBOARD, MLFLOW = (
    textwrap.dedent(block)
    for block in re.findall(
        r"\.\. code-block:: python\n\n(.*?)(?=\n\S)", PAGE.read_text(encoding="utf-8"), re.DOTALL
    )
)
STEPS = 3  # iterations in an epoch


@pytest.fixture(autouse=True)
def folder(comm, tmp_path, monkeypatch):
    """Work in one new folder on all ranks."""
    folder = Path(comm.bcast_obj(str(tmp_path)))
    monkeypatch.chdir(folder)
    return folder


@chainer.training.make_extension(
    trigger=(1, "iteration"), priority=chainer.training.PRIORITY_WRITER
)
def observe(trainer):
    """Report what differs between ranks and iterations."""
    rank = chainer_dist.create_communicator().rank
    trainer.observation["observed"] = 100.0 * rank + trainer.updater.iteration


observe.on_rank_zero = False


def run(code, comm, epochs):
    """Run the code of the page for a trainer that ends after some epochs, and return its names."""
    x = np.random.RandomState(0).rand(6 * comm.size, 3).astype(np.float32)
    model = L.Classifier(L.Linear(3, 1), lossfun=F.mean_squared_error)
    model.compute_accuracy = False
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(0.01), comm)
    optimizer.setup(model)
    data = chainer_dist.scatter_dataset(list(zip(x, x[:, :1])), comm)
    iterator = chainer.iterators.SerialIterator(data, 2)
    updater = chainer.training.StandardUpdater(iterator, optimizer)
    trainer = chainer.training.Trainer(updater, (epochs, "epoch"), out="result")
    trainer.extend(observe)
    names = {
        "chainer": chainer,
        "chainer_dist": chainer_dist,
        "extensions": extensions,
        "comm": comm,
        "trainer": trainer,
    }
    exec(code, names)  # noqa: S102 - our own page
    return names


def expected(comm, epochs):
    """Return the means of what is observed, over ranks and the iterations of each epoch, by iteration."""
    return {
        STEPS * epoch: 100.0 * (comm.size - 1) / 2
        + np.mean(range(STEPS * (epoch - 1) + 1, STEPS * epoch + 1))
        for epoch in range(1, epochs + 1)
    }


def events(file):
    """Yield the events in a file of TensorBoard's: length, its checksum, event, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    content = file.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def test_tensorboard(comm, folder):
    """Rank 0 writes means of all ranks; what a resumed job makes again takes the place of what was there."""
    names = run(TENSORBOARD, comm, 3)
    assert names["iteration"] == 0
    assert ("writer" in names) == (comm.rank == 0)
    time.sleep(1)  # a file is named after the second in which it is made
    again = run(TENSORBOARD, comm, 4)
    assert again["iteration"] == 2 * STEPS
    if comm.rank == 0:
        names["writer"].close()
        again["writer"].close()
    comm.allgather_obj("written")
    files = sorted((folder / "tensorboard").iterdir())
    assert len(files) == 2
    points, starts = {}, []
    for file in files:
        for event in events(file):
            if event.HasField("session_log"):  # as TensorBoard reads it
                starts.append(event.step)
                points = {step: value for step, value in points.items() if step < event.step}
            for value in event.summary.value:
                if value.tag == "observed":
                    assert event.step not in points
                    points[event.step] = value.simple_value
    assert starts == [1, 2 * STEPS + 1]
    assert points == pytest.approx(expected(comm, 4))


@pytest.mark.mlflow
@pytest.mark.filterwarnings("ignore")
def test_mlflow(comm, folder):
    """A resumed job adds to the run what is not there yet, and one that begins anew has its own."""
    names = run(MLFLOW, comm, 3)
    again = run(MLFLOW, comm, 4)
    assert again["iteration"] == 2 * STEPS
    if comm.rank == 0:
        (folder / "checkpoints").rename(folder / "old checkpoints")
    comm.allgather_obj("gone")
    anew = run(MLFLOW, comm, 1)
    assert anew["iteration"] == 0
    if comm.rank != 0:
        assert "run" not in again
        return
    assert names["run"].info.run_id == again["run"].info.run_id != anew["run"].info.run_id
    client = names["mlflow"].MlflowClient()
    for job, epochs in ((again, 4), (anew, 1)):
        run_id = job["run"].info.run_id
        history = client.get_metric_history(run_id, "observed")
        assert len(history) == epochs
        points = {point.step: point.value for point in history}
        assert points == pytest.approx(expected(comm, epochs))
        data = client.get_run(run_id)
        assert data.data.params == {"ranks": str(comm.size)}
        assert data.info.status == "FINISHED"

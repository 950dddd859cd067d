"""Examples in docstrings of public functions and classes, run as they are by all ranks."""

from __future__ import annotations

import inspect
import pathlib
import textwrap

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.training import extensions

import chainer_dist

NAMES = [
    "create_communicator",
    "create_empty_dataset",
    "create_local_sgd_optimizer",
    "create_multi_node_evaluator",
    "create_multi_node_optimizer",
    "create_multi_node_updater",
    "datasets.FilesDataset",
    "datasets.shard_files",
    "errors.FailedItemsError",
    "exchange.mean_grad",
    "extensions.AllreducePersistent",
    "extensions.GenericMultiNodeEvaluator",
    "extensions.MultiNodeEarlyStoppingTrigger",
    "extensions.ObservationAggregator",
    "functions.allgather",
    "functions.allreduce",
    "functions.alltoall",
    "functions.bcast",
    "functions.gather",
    "functions.scatter",
    "functions.send",
    "iterators.create_multi_node_iterator",
    "iterators.create_synchronized_iterator",
    "links.MultiNodeBatchNormalization",
    "links.create_mnbn_model",
    "on_rank_zero",
    "scatter_dataset",
    "scatter_index",
    "watch.timeline",
]
N = 24  # samples


def example(name):
    """Return the first block of code in a docstring."""
    found = chainer_dist
    for part in name.split("."):
        found = getattr(found, part)
    block = inspect.getdoc(found).partition("::\n\n")[2]
    lines = []
    for line in block.splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line)
    code = textwrap.dedent("\n".join(lines))
    assert code.strip(), f"{name} has no example"
    return code


def prepare(comm, folder):
    """Return what examples take for given."""
    x, t = np.random.rand(N, 3).astype(np.float32), np.zeros(N, np.int32)
    train = chainer.datasets.TupleDataset(x, t)
    model = L.Classifier(L.Linear(3, 2))
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), comm)
    optimizer.setup(model)
    iterator = chainer.iterators.SerialIterator(train, 12)
    updater = chainer.training.updaters.StandardUpdater(iterator, optimizer)
    return {
        "F": F,
        "chainer": chainer,
        "chainer_dist": chainer_dist,
        "comm": comm,
        "extensions": extensions,
        "first": L.Linear(3, 4),
        "function": lambda number: 1 // number,
        "items": [1, 0, 3],
        "iterator": chainer.iterators.SerialIterator(train, 5, repeat=False, shuffle=False),
        "model": model,
        "np": np,
        "optimizer": optimizer,
        "paths": ["a", "b", "c", "d"],
        "pathlib": pathlib,
        "second": L.Linear(4, 2),
        "t": t,
        "test": train,
        "train": train,
        "trainer": chainer.training.Trainer(updater, (2, "iteration"), out=str(folder)),
        "updater": updater,
        "x": x,
        "y": L.Linear(3, 2)(x),
    }


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(comm, tmp_path, monkeypatch, name):
    """What a reader copies works on any number of ranks."""
    if name == "functions.send" and comm.size == 1:
        pytest.skip("it is between two ranks")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for number in range(4):
        for path in (f"data/{number}.npz", f"part{number}.npz"):
            np.savez(path, x=np.zeros((6, 3), np.float32), t=np.zeros(6, np.int32))
    names = prepare(comm, tmp_path)
    exec(example(name), names)  # noqa: S102 - the package's own code
    if "trainer" in example(name) and ".run()" not in example(name):
        names["trainer"].run()
    elif name == "errors.FailedItemsError":
        assert names["again"] == [0]

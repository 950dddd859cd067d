"""An ordinary trainer made data-parallel by one line, against one written for it, and against one process."""

from __future__ import annotations

import io
import json
import random
import warnings
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators, training
from chainer.training import extensions, triggers

import chainer_dist
from chainer_dist import RankMismatchError
from chainer_dist.iterators import DistributedIterator, DividedIterator
from chainer_dist.training import optimizers as handles

N, N_VALIDATION = 48, 17


@pytest.fixture
def alone():
    """Return a communicator of this rank alone."""
    from mpi4py import MPI

    with chainer_dist.create_communicator("naive", MPI.COMM_SELF) as communicator:
        yield communicator


@pytest.fixture
def out(comm, tmp_path):
    """Return a folder that all ranks have."""
    return comm.bcast_obj(str(tmp_path))


def make_data(n, seed=0, dtype=np.float32):
    """Return samples and labels, the same on every rank."""
    draws = np.random.RandomState(seed)
    x = draws.uniform(-1, 1, (n, 5)).astype(dtype)
    return chainer.datasets.TupleDataset(x, draws.randint(0, 3, n).astype(np.int32))


def make_model(*, lazy=True, dropout=False):
    """Return a classifier that every rank initializes in its own way, if it is not seeded."""
    middle = [F.relu, lambda h: F.dropout(h, 0.5)] if dropout else [F.relu]
    return L.Classifier(
        chainer.Sequential(L.Linear(None if lazy else 5, 8), *middle, L.Linear(8, 3))
    )


def make_trainer(iterator, model, out, *, stop=(3, "epoch"), updater=training.StandardUpdater):
    """Return a trainer as a script has it, with nothing distributed."""
    optimizer = chainer.optimizers.Adam(alpha=0.02).setup(model)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-3))
    return training.Trainer(updater(iterator, optimizer), stop, out=out)


def make_evaluator(model, dtype=np.float32):
    """Return an evaluator of a set that no number of ranks divides."""
    data = make_data(N_VALIDATION, 1, dtype)
    iterator = iterators.SerialIterator(data, 5, repeat=False, shuffle=False)
    return extensions.Evaluator(iterator, model)


def parameters(model):
    """Return all parameters in one array."""
    return np.concatenate([param.array.ravel() for _, param in sorted(model.namedparams())])


KINDS = {
    "serial": iterators.SerialIterator,
    "threads": iterators.MultithreadIterator,
}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_script_that_is_written_for_it(comm, out, kind, shuffle):
    """Parameters and scores are, to the bit, those with everything written out."""
    np.random.seed(3)
    model = make_model(dropout=True)
    iterator = KINDS[kind](make_data(N), 4, shuffle=shuffle)
    trainer = make_trainer(iterator, model, out)
    trainer.extend(make_evaluator(model))
    log = extensions.LogReport()
    trainer.extend(log)
    chainer_dist.distribute(trainer, comm)
    serving = trainer.updater.get_iterator("main")
    assert isinstance(serving, DistributedIterator)
    np.random.seed(17 + comm.rank)
    trainer.run()

    np.random.seed(3)
    written = make_model(dropout=True)
    optimizer = chainer.optimizers.Adam(alpha=0.02)
    optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)
    optimizer.setup(written)
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(1e-3))
    train = DistributedIterator(make_data(N), 4, comm, shuffle=shuffle, seed=serving.seed)
    updater = training.StandardUpdater(train, optimizer)
    trainer = training.Trainer(updater, (3, "epoch"), out=out)
    part = chainer_dist.scatter_dataset(make_data(N_VALIDATION, 1), comm, force_equal_length=False)
    validation = iterators.SerialIterator(part, 5, repeat=False, shuffle=False)
    evaluator = extensions.Evaluator(validation, written)
    trainer.extend(chainer_dist.create_multi_node_evaluator(evaluator, comm))
    losses = []
    trainer.extend(
        lambda trainer: losses.append(trainer.observation["validation/main/loss"]),
        name="observe",
        trigger=(1, "epoch"),
    )
    np.random.seed(17 + comm.rank)
    trainer.run()

    np.testing.assert_array_equal(parameters(model), parameters(written))
    assert [entry["validation/main/loss"] for entry in log.log] == losses
    assert iterator.epoch == train.epoch == 3


class Batched(chainer.dataset.DatasetMixin):
    """Samples of :func:`make_data` that are read as whole batches, which it remembers."""

    reads_batches = True

    def __init__(self):
        self.samples = make_data(N)
        self.reads = []

    def __len__(self):
        return N

    def __getitem__(self, index):
        self.reads.append(index)
        return [self.samples[i] for i in index] if isinstance(index, list) else self.samples[index]


def test_batches_are_read_at_once_where_the_dataset_can(comm, out):
    """As a DistributedIterator does that a script makes itself."""
    dataset = Batched()
    trainer = make_trainer(iterators.SerialIterator(dataset, 4), make_model(), out)
    chainer_dist.distribute(trainer, comm)
    dataset.reads.clear()
    trainer.run()
    assert {len(read) for read in dataset.reads} == {4}
    assert len(dataset.reads) == trainer.updater.iteration


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("batch", ["rank", "global"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_it_is_one_process_with_the_batches_of_all(comm, alone, out, batch, shuffle):
    """With all batches side by side, one process comes to the same but for rounding."""
    size = 4 if batch == "rank" else 12
    np.random.seed(3)
    model = make_model(lazy=False)
    reference = model.copy(mode="copy")
    iterator = iterators.SerialIterator(make_data(N, dtype=np.float64), size, shuffle=shuffle)
    trainer = make_trainer(iterator, model, out)
    log = extensions.LogReport(trigger=(1, "iteration"))
    trainer.extend(log)
    trainer.extend(make_evaluator(model, np.float64))
    chainer_dist.distribute(trainer, comm, batch=batch)
    serving = trainer.updater.get_iterator("main")
    assert iterator.batch_size == serving.batch_size == (4 if batch == "rank" else 12 // comm.size)
    trainer.run()

    whole = 4 * comm.size if batch == "rank" else 12
    data = make_data(N, dtype=np.float64)
    if shuffle:
        one = DistributedIterator(data, whole, alone, seed=serving.seed)
    else:
        one = iterators.SerialIterator(data, whole, shuffle=False)
    trainer2 = make_trainer(one, reference, out)
    log2 = extensions.LogReport(trigger=(1, "iteration"), filename=None)
    trainer2.extend(log2)
    trainer2.run()
    np.testing.assert_allclose(parameters(model), parameters(reference), rtol=1e-9, atol=1e-12)
    for entry, expected in zip(log.log, log2.log):
        assert entry["iteration"] == expected["iteration"]
        assert entry["epoch"] == expected["epoch"]
        assert entry["main/loss"] == pytest.approx(expected["main/loss"], rel=1e-9)
    assert len(log.log) == len(log2.log) == -(-3 * N // whole)

    batch_of_all = make_data(N_VALIDATION, 1, np.float64)[:]
    with chainer.using_config("train", value=False), chainer.no_backprop_mode():
        x, t = chainer.dataset.concat_examples(batch_of_all)
        expected = float(reference(x, t).array)
    assert log.log[-1]["validation/main/loss"] == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_data_may_be_on_rank_zero_only(comm, out, kind):
    """Nothing is another than with the data on every rank."""
    results = []
    for everywhere in (True, False):
        np.random.seed(3)
        has_data = everywhere or comm.rank == 0
        iterator = KINDS[kind](make_data(N) if has_data else [], 4)
        model = make_model(lazy=False)
        comm.bcast_data(model)
        trainer = make_trainer(iterator, model, out)
        validation = make_data(N_VALIDATION, 1) if has_data else []
        evaluator = extensions.Evaluator(
            iterators.SerialIterator(validation, 5, repeat=False, shuffle=False), model
        )
        trainer.extend(evaluator)
        log = extensions.LogReport()
        trainer.extend(log)
        chainer_dist.distribute(trainer, comm)
        trainer.run()
        results.append((parameters(model), log.log[-1]["validation/main/loss"]))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_what_the_script_holds_is_distributed(comm, out):
    """An updater that has kept its iterator and its optimizer, and a script that looks at both."""

    class Updater(training.StandardUpdater):
        def __init__(self, iterator, optimizer):
            super().__init__(iterator, optimizer)
            self.mine = iterator, optimizer

        def update_core(self):
            iterator, optimizer = self.mine
            x, t = self.converter(iterator.next(), self.device)
            optimizer.update(optimizer.target, x, t)

    found = []
    for updater in (Updater, training.StandardUpdater):
        np.random.seed(3)
        iterator = iterators.SerialIterator(make_data(N), 4)
        model = make_model(lazy=False)
        trainer = make_trainer(iterator, model, out, updater=updater)
        chainer_dist.distribute(trainer, comm)
        trainer.run()
        assert iterator.epoch == 3
        assert iterator.is_new_epoch
        assert isinstance(iterator, iterators.SerialIterator)
        found.append(parameters(model))
    np.testing.assert_array_equal(*found)
    assert all(np.array_equal(found[0], each) for each in comm.allgather_obj(found[0]))


def test_the_optimizer_of_the_script_shares_its_state(comm):
    """What is set on one is set on the other, and a copy updates by itself."""
    model = make_model(lazy=False)
    optimizer = chainer.optimizers.MomentumSGD(0.1).setup(model)
    served = handles.distribute_optimizer(optimizer, comm)
    assert handles.distribute_optimizer(optimizer, comm) is served
    assert handles.distribute_optimizer(served, comm) is served
    optimizer.lr = 0.5
    assert served.lr == 0.5
    optimizer.add_hook(chainer.optimizer_hooks.WeightDecay(0.1))
    served.add_hook(chainer.optimizer_hooks.Lasso(0.1))
    for each in (served, optimizer):
        assert {*each._hookable._pre_update_hooks} == {"WeightDecay", "Lasso"}
    x, t = chainer.dataset.concat_examples(make_data(4, comm.rank)[:])
    optimizer.update(model, x, t)
    assert optimizer.t == served.t == 1
    saved = chainer.serializers.DictionarySerializer()
    optimizer.serialize(saved)
    assert any("v" in name for name in saved.target)
    assert all(
        np.array_equal(parameters(model), each) for each in comm.allgather_obj(parameters(model))
    )


class Stream(chainer.dataset.Iterator):
    """An iterator of a script's own, each of whose places in the batch goes on where it was."""

    def __init__(self, dataset, batch_size, seed=None):
        self.dataset, self.batch_size, self.repeat = dataset, batch_size, True
        self._draws = None if seed is None else np.random.RandomState(seed)
        self.iteration = 0

    @property
    def epoch(self):
        """As Chainer asks for it."""
        return self.iteration * self.batch_size // len(self.dataset)

    @property
    def epoch_detail(self):
        """As Chainer asks for it."""
        return self.iteration * self.batch_size / len(self.dataset)

    @property
    def is_new_epoch(self):
        """As Chainer asks for it."""
        return self.epoch > (self.iteration - 1) * self.batch_size // len(self.dataset)

    def __next__(self):
        n = len(self.dataset)
        starts = [i * n // self.batch_size for i in range(self.batch_size)]
        if self._draws is not None:
            starts = self._draws.randint(0, n, self.batch_size)
        self.iteration += 1
        return [self.dataset[int(start + self.iteration) % n] for start in starts]


@pytest.mark.usefixtures("float64")
def test_an_iterator_of_the_script_is_divided(comm, out):
    """Each rank has its share of each batch: that is the training of one process."""
    found = []
    for distributed in (True, False):
        np.random.seed(3)
        model = make_model(lazy=False)
        trainer = make_trainer(Stream(make_data(N, dtype=np.float64), 12), model, out)
        if distributed:
            chainer_dist.distribute(trainer, comm)
            assert isinstance(trainer.updater.get_iterator("main"), DividedIterator)
        trainer.run()
        assert trainer.updater.iteration == 12
        found.append(parameters(model))
    np.testing.assert_allclose(*found, rtol=1e-9, atol=1e-12)


class Windows(Stream):
    """An iterator that draws from numpy.random, and yields arrays of all samples."""

    def __next__(self):
        self.iteration += 1
        xs, ts = zip(*(self.dataset[i] for i in np.random.permutation(N)[: self.batch_size]))
        return np.stack(xs), np.stack(ts)


@pytest.mark.usefixtures("float64")
def test_an_iterator_that_draws_at_random(comm, out):
    """It draws on all ranks what it draws in one process, though dropout would draw apart."""

    def run(distributed):
        model = make_model(lazy=False)
        iterator = Windows(make_data(N, dtype=np.float64), 12)
        trainer = make_trainer(iterator, model, out)
        trainer.updater.converter = lambda batch, _: batch
        if distributed:
            chainer_dist.distribute(trainer, comm)
        np.random.seed(7)
        trainer.run()
        return parameters(model)

    np.random.seed(3)
    one = run(distributed=True)
    np.random.seed(3)
    np.testing.assert_allclose(one, run(distributed=False), rtol=1e-9, atol=1e-12)


def backwards(order, _):
    """Return the samples from the last one to the first: an order sampler."""
    return np.arange(len(order))[::-1]


@pytest.mark.usefixtures("float64")
def test_an_order_of_the_scripts_own(comm, out):
    """A sampler says the order; batches are of each rank, as with any other."""

    def run(batch_size, distributed):
        np.random.seed(3)
        data = make_data(N, dtype=np.float64)
        iterator = iterators.SerialIterator(data, batch_size, order_sampler=backwards)
        model = make_model(lazy=False)
        trainer = make_trainer(iterator, model, out)
        if distributed:
            chainer_dist.distribute(trainer, comm)
        trainer.run()
        return parameters(model)

    np.testing.assert_allclose(run(4, True), run(4 * comm.size, False), rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sampler", [None, backwards])
@pytest.mark.parametrize("whose", ["script", "updater"])
def test_batches_that_grow(comm, out, sampler, whose):
    """A script may set the batch size amid training, as it may with Chainer's iterators."""

    def grow(iterator):
        iterator.batch_size *= 2

    assert_changed_alike(comm, out, sampler, whose, grow)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("sampler", [None, backwards])
@pytest.mark.parametrize("whose", ["script", "updater"])
def test_another_dataset(comm, out, sampler, whose):
    """So it may the dataset."""

    def change(iterator):
        iterator.dataset = [(-x, t) for x, t in iterator.dataset]

    assert_changed_alike(comm, out, sampler, whose, change)


def assert_changed_alike(comm, out, sampler, whose, change):
    """Change the iterator amid training, and compare the parameters with those of one process."""

    def run(batch_size, distributed):
        np.random.seed(3)
        data = make_data(N, dtype=np.float64)
        order = {"shuffle": False} if sampler is None else {"order_sampler": sampler}
        iterator = iterators.SerialIterator(data, batch_size, **order)
        model = make_model(lazy=False)
        trainer = make_trainer(iterator, model, out, stop=(7, "iteration"))
        trainer.extend(
            lambda trainer: change(
                iterator if whose == "script" else trainer.updater.get_iterator("main")
            ),
            trigger=(3, "iteration"),
        )
        if distributed:
            chainer_dist.distribute(trainer, comm)
        trainer.run()
        return parameters(model)

    np.testing.assert_allclose(run(2, True), run(2 * comm.size, False), rtol=1e-9, atol=1e-12)


def test_extensions_are_set_as_ever(comm, out):
    """What a script sets on a snapshot and on a trigger amid training counts, on rank 0 and on the others."""
    trainer = make_trainer(
        iterators.SerialIterator(make_data(N), 4), make_model(), out, stop=(4, "iteration")
    )
    trainer.extend(extensions.snapshot(filename="old"), name="snapshot", trigger=(4, "iteration"))
    seen = []
    due = SimpleTrigger()
    trainer.extend(lambda trainer: seen.append(trainer.updater.iteration), name="seen", trigger=due)

    def change(trainer):
        trainer.get_extension("snapshot").filename = "new"
        trainer._extensions["seen"].trigger.at = 4

    trainer.extend(change, trigger=(2, "iteration"), priority=1000)
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    assert seen == [1, 4]
    assert (Path(out) / "new").is_file()
    assert not (Path(out) / "old").exists()


class SimpleTrigger:
    """Fires at one iteration, which can be set."""

    at = 1

    def __call__(self, trainer):
        """Return whether it is time."""
        return trainer.updater.iteration == self.at


def test_several_iterators_and_optimizers(comm, out):
    """All of them are distributed; all ranks stay alike."""

    class Updater(training.StandardUpdater):
        def update_core(self):
            for name in ("main", "other"):
                x, t = self.converter(self.get_iterator(name).next(), self.device)
                self.get_optimizer(name).update(self.get_optimizer(name).target, x, t)

    models = make_model(), make_model()
    optimizers = {
        name: chainer.optimizers.SGD(0.1).setup(model)
        for name, model in zip(("main", "other"), models)
    }
    np.random.seed(3)
    data = {"main": make_data(N), "other": make_data(30, 2)}
    sources = {name: iterators.SerialIterator(data[name], 3) for name in data}
    trainer = training.Trainer(Updater(sources, optimizers), (2, "epoch"), out=out)
    trainer.extend(extensions.LogReport(), name="log")
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    log = trainer.get_extension("log").log
    assert {"main/loss", "other/loss"} <= {*log[-1]}
    for model in models:
        assert all(
            np.array_equal(parameters(model), each)
            for each in comm.allgather_obj(parameters(model))
        )
    losses = [(entry["main/loss"], entry["other/loss"]) for entry in log]
    assert all(each == losses for each in comm.allgather_obj(losses))


def report_of(trainer):
    """An extension that reports something after the observations were averaged."""
    chainer.report({"late": float(trainer.mine)})


def test_reports_are_of_all_ranks(comm, out):
    """What is observed is averaged, whenever it is; rank 0 writes, and the log is there on every rank."""
    written = []

    class Writer:
        def __init__(self):
            self.writer = written

        def __call__(self, trainer):
            self.writer.append(dict(trainer.observation))

    seen = []

    def look(trainer):
        seen.append(trainer.observation["late"])

    def keep(trainer):
        with open(f"{trainer.out}/kept", "a") as file:  # noqa: PTH123 - as scripts do
            file.write(".")

    iterator = DistributedIterator(make_data(N), 4, comm)
    model = make_model()
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(0.01), comm)
    optimizer.setup(model)
    trainer = training.Trainer(training.StandardUpdater(iterator, optimizer), (6, "iteration"), out)
    trainer.mine = comm.rank
    trainer.extend(report_of)
    log = extensions.LogReport(trigger=(2, "iteration"))
    trainer.extend(log)
    trainer.extend(Writer(), name="writer")
    trainer.extend(look)
    trainer.extend(keep)
    chainer_dist.on_rank_zero(trainer, comm)
    printed = io.StringIO()
    trainer.extend(extensions.PrintReport(["epoch", "main/loss"], out=printed))
    own = []
    trainer.extend(
        lambda trainer: own.append(float(trainer.observation["main/loss"].array)),
        name="own",
        priority=400,
    )
    trainer.run()

    mean = np.mean(comm.allgather_obj(own), axis=0)
    got = [entry["main/loss"] for entry in log.log]
    np.testing.assert_allclose(got, mean.reshape(3, 2).mean(axis=1), rtol=1e-5)
    assert all(each == got for each in comm.allgather_obj(got))
    assert {entry["late"] for entry in log.log} == {(comm.size - 1) / 2}
    assert seen == [(comm.size - 1) / 2] * 6
    assert bool(printed.getvalue()) == (comm.rank == 0)
    assert len(written) == (6 if comm.rank == 0 else 0)
    comm.mpi_comm.Barrier()
    if comm.rank == 0:
        with open(f"{out}/kept") as file:  # noqa: PTH123
            assert file.read() == "......"
        with open(f"{out}/log") as file:  # noqa: PTH123
            assert [entry["main/loss"] for entry in json.load(file)] == got


def test_batches_in_which_nothing_counts(comm, out):
    """A value is reported with weight 0 by all ranks at times, as of padding: the mean is that of the others."""

    class Model(L.Classifier):
        n_calls = 0

        def forward(self, *args):
            self.n_calls += 1
            weight = self.n_calls % 2 and comm.rank + 1
            chainer.report({"scored": (self.n_calls + comm.rank, weight)}, self)
            return super().forward(*args)

    model = Model(make_model(lazy=False).predictor)
    trainer = make_trainer(iterators.SerialIterator(make_data(N), 4), model, out)
    log = extensions.LogReport(trigger=(2, "iteration"))
    trainer.extend(log)
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    ranks = np.arange(comm.size)
    for number, entry in enumerate(log.log):
        want = np.average(2 * number + 1 + ranks, weights=ranks + 1)
        np.testing.assert_allclose(entry["main/scored"], want)


def test_which_ranks_call_an_extension(comm, out):
    """What says so itself, or communicates, is called on every rank, whatever else it does."""
    called = []

    def saves(trainer):
        called.append("saves")
        np.save(f"{trainer.out}/array", np.zeros(2))

    def saves_everywhere(trainer):
        called.append("everywhere")
        np.save(f"{trainer.out}/rank{comm.rank}", np.zeros(2))

    saves_everywhere.on_rank_zero = False

    def communicates(trainer):
        called.append("communicates")
        if comm.allreduce_obj(1) and comm.rank == 0:
            np.save(f"{trainer.out}/sum", np.zeros(2))

    class Saves:
        def __call__(self, trainer):
            called.append("class")
            np.save(f"{trainer.out}/class", np.zeros(2))

    class Chatty:
        def __init__(self):
            self.filename, self.comm = "name", comm

        def __call__(self, _):
            called.append("chatty")

    def changes(trainer):
        called.append("changes")
        trainer.updater.get_optimizer("main").alpha *= 0.5

    said = lambda _: called.append("said")  # noqa: E731 - as scripts have it
    said.on_rank_zero = True

    trainer = make_trainer(
        iterators.SerialIterator(make_data(N), 4), make_model(), out, stop=(1, "iteration")
    )
    for each in (saves, saves_everywhere, communicates, Saves(), Chatty(), changes, said):
        name = getattr(each, "__name__", type(each).__name__)
        trainer.extend(each, name=name)
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    everywhere = {"everywhere", "communicates", "chatty", "changes"}
    assert {*called} == everywhere | ({"saves", "class", "said"} if comm.rank == 0 else set())
    assert len(called) == len({*called})


def test_what_logs_to_mlflow_is_called_on_rank_zero(comm, out):
    """MLflow opens no file in the extension's own code, so its functions are known by name."""
    logged = []

    class Client:
        def log_metrics(self, metrics, step):
            logged.append((metrics, step))

    client = Client()
    trainer = make_trainer(
        iterators.SerialIterator(make_data(N), 4), make_model(), out, stop=(2, "iteration")
    )
    trainer.extend(
        lambda trainer: client.log_metrics({"rate": 1.0}, step=trainer.updater.iteration),
        name="mlflow",
    )
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    assert logged == ([({"rate": 1.0}, 1), ({"rate": 1.0}, 2)] if comm.rank == 0 else [])


class Counts:
    """An extension of rank 0, or a trigger, that counts in an attribute."""

    def __init__(self, last=None):
        self.writer = []
        self.n_calls = 0
        self.last = last

    def __call__(self, _):
        """Count; as a trigger, fire at the last."""
        self.n_calls += 1
        return self.n_calls == self.last


@pytest.mark.parametrize("how", ["distribute", "on_rank_zero"])
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_resume_finds_what_was_saved(comm, out, how):
    """Extensions of rank 0 and triggers of a script's own go on from what they had counted; no warning is given."""

    def run(last):
        iterator = DistributedIterator(make_data(N), 4, comm)
        optimizer = chainer.optimizers.SGD(0.01)
        if how == "on_rank_zero":
            optimizer = chainer_dist.create_multi_node_optimizer(optimizer, comm)
        else:
            iterator = iterators.SerialIterator(make_data(N), 4)
        optimizer.setup(make_model())
        updater = training.StandardUpdater(iterator, optimizer)
        stop, counts = Counts(last), Counts()
        trainer = training.Trainer(updater, stop, out)
        trainer.extend(counts, name="counts", trigger=(1, "iteration"))
        trainer.extend(extensions.LogReport(trigger=(1, "iteration")))
        trainer.extend(extensions.PrintReport(["main/loss"], out=io.StringIO()))
        trainer.extend(extensions.snapshot(), trigger=(4, "iteration"))
        getattr(chainer_dist, how)(trainer, comm)
        checkpoint = chainer_dist.Checkpoint(comm, f"{out}/checkpoints")
        trainer.extend(checkpoint, trigger=(2, "iteration"))
        resumed = checkpoint.resume(trainer)
        before = counts.n_calls
        trainer.run()
        return resumed, before, counts.n_calls, stop.n_calls

    # The stop trigger is asked on every rank before each iteration; the checkpoint is taken after the fourth.
    of_rank_zero = comm.rank == 0
    assert run(5) == (0, 0, 4 * of_rank_zero, 5)
    assert run(9) == (4, 4 * of_rank_zero, 8 * of_rank_zero, 9)


def test_triggers_fire_together(comm, out):
    """Those of time, and those of a script's own, when rank 0's do; the run ends on all ranks at once."""
    fired, asked = [], []

    def sometimes(trainer):
        asked.append(trainer.updater.iteration)
        return (trainer.updater.iteration + comm.rank) % 3 == 0

    def stop(trainer):
        return trainer.updater.iteration == 7 + comm.rank

    trainer = make_trainer(iterators.SerialIterator(make_data(N), 2), make_model(), out, stop=stop)
    chainer_dist.distribute(trainer, comm)
    trainer.extend(lambda t: fired.append(t.updater.iteration), name="a", trigger=sometimes)
    trainer.extend(
        lambda t: fired.append(-t.updater.iteration), name="b", trigger=triggers.TimeTrigger(1e-9)
    )
    trainer.run()
    assert trainer.updater.iteration == 7
    assert asked == [1, 2, 3, 4, 5, 6, 7]
    assert [each for each in fired if each > 0] == [3, 6]
    assert all(each == fired for each in comm.allgather_obj(fired))


@pytest.mark.parametrize("kind", ["MinValueTrigger", "MaxValueTrigger", "EarlyStoppingTrigger"])
def test_evaluators_whose_trigger_looks_at_the_loss(comm, out, kind):
    """They are asked before the loss is averaged, and evaluate on all ranks in the same iterations all the same."""
    trigger = {
        "MinValueTrigger": lambda: triggers.MinValueTrigger("main/loss", (1, "iteration")),
        "MaxValueTrigger": lambda: triggers.MaxValueTrigger("main/accuracy", (2, "iteration")),
        "EarlyStoppingTrigger": lambda: triggers.EarlyStoppingTrigger((1, "iteration"), patience=1),
    }[kind]()
    model = make_model(lazy=False)
    trainer = make_trainer(
        iterators.SerialIterator(make_data(N), 2), model, out, stop=(12, "iteration")
    )
    trainer.extend(make_evaluator(model), trigger=trigger)
    seen = []

    def look(trainer):
        if "validation/main/loss" in trainer.observation:
            seen.append(trainer.updater.iteration)

    trainer.extend(look, trigger=(1, "iteration"))
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    assert seen
    assert all(each == seen for each in comm.allgather_obj(seen))


def test_early_stopping_and_best_values_are_of_all_ranks(comm, out):
    """A trigger that goes by the loss goes by the mean of the ranks' losses."""
    np.random.seed(3)
    stop = triggers.EarlyStoppingTrigger(
        (1, "iteration"), "main/loss", patience=2, max_trigger=(40, "iteration")
    )
    trainer = make_trainer(iterators.SerialIterator(make_data(N), 2), make_model(), out, stop=stop)
    best = []
    trainer.extend(
        lambda t: best.append(t.updater.iteration),
        name="best",
        trigger=triggers.MinValueTrigger("main/loss", (1, "iteration")),
    )
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    ends = comm.allgather_obj((trainer.updater.iteration, best))
    assert ends.count(ends[0]) == comm.size
    assert ends[0][0] < 40


def test_ranks_that_draw_alike_get_numbers_of_their_own(comm, out):
    """Dropout is another on each rank; where a script has seeded ranks by themselves it stays so."""
    for seed, alike in ((3, True), (3 + comm.rank, comm.size == 1)):
        np.random.seed(seed)
        random.seed(seed)
        drawn = np.random.RandomState(seed).uniform(), random.Random(seed).random()
        trainer = make_trainer(
            iterators.SerialIterator(make_data(N), 2, shuffle=False),
            make_model(lazy=False),
            out,
            stop=(1, "iteration"),
        )
        numbers = []
        trainer.extend(
            lambda _, seen=numbers: seen.append((np.random.uniform(), random.random())), name="draw"
        )
        chainer_dist.distribute(trainer, comm)
        trainer.run()
        everyone = comm.allgather_obj(numbers[0])
        assert (
            len({each[0] for each in everyone}) == len({each[1] for each in everyone}) == comm.size
        )
        if not alike:
            assert numbers[0][1] == drawn[1]


def test_snapshots_are_rank_zeros_and_all_load_them(comm, out):
    """A run that was ended goes on, by autoload and by load_npz, to what it would have come to."""

    def start(folder, stop, autoload=False):
        np.random.seed(3)
        model = make_model(lazy=False)
        iterator = iterators.SerialIterator(make_data(N), 3)
        trainer = make_trainer(iterator, model, f"{out}/{folder}", stop=(stop, "iteration"))
        trainer.extend(extensions.snapshot(autoload=autoload), trigger=(4, "iteration"))
        trainer.extend(extensions.LogReport(trigger=(2, "iteration")))
        chainer_dist.distribute(trainer, comm)
        return trainer, model

    trainer, whole = start("whole", 8)
    trainer.run()
    trainer, part = start("part", 4)
    trainer.run()
    assert not np.array_equal(parameters(part), parameters(whole))
    comm.mpi_comm.Barrier()
    trainer, loaded = start("loaded", 8)
    chainer.serializers.load_npz(f"{out}/part/snapshot_iter_4", trainer)
    assert trainer.updater.get_iterator("main").epoch_detail > 0
    trainer.run()
    trainer, auto = start("part", 8, autoload=True)
    trainer.run()
    np.testing.assert_array_equal(parameters(loaded), parameters(whole))
    np.testing.assert_array_equal(parameters(auto), parameters(whole))


def test_writers_of_snapshots_end_on_every_rank(comm, out):
    """That of a queue has a thread from the beginning, for which Python waits at its end."""
    writer = extensions.snapshot_writers.ThreadQueueWriter()
    model = make_model(lazy=False)
    trainer = make_trainer(
        iterators.SerialIterator(make_data(N), 4), model, out, stop=(2, "iteration")
    )
    trainer.extend(extensions.snapshot(writer=writer), trigger=(1, "iteration"))
    chainer_dist.distribute(trainer, comm)
    try:
        trainer.run()
        assert not writer._consumer.is_alive()
    finally:
        writer.finalize()


@pytest.mark.parametrize("by", [chainer_dist.distribute, chainer_dist.on_rank_zero])
def test_a_checkpoint_is_resumed_without_a_warning(comm, out, by):
    """What is added when the trainer runs is not there yet at the resume, and nothing begins anew for that."""

    def start(folder, stop):
        np.random.seed(3)
        model = make_model(lazy=False)
        iterator = iterators.SerialIterator(make_data(N), 4)
        trainer = make_trainer(iterator, model, f"{out}/{folder}", stop=(stop, "iteration"))
        if by is chainer_dist.on_rank_zero:
            optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), comm)
            updater = training.StandardUpdater(iterator, optimizer.setup(model))
            trainer = training.Trainer(updater, (stop, "iteration"), out=f"{out}/{folder}")
        trainer.extend(make_evaluator(model), trigger=(2, "iteration"))
        log = extensions.LogReport(trigger=(2, "iteration"))
        trainer.extend(log)
        trainer.extend(extensions.PrintReport(["main/loss"], out=io.StringIO()))
        trainer.extend(extensions.ProgressBar(out=io.StringIO()))
        trainer.extend(extensions.snapshot(filename="snapshot"), trigger=(4, "iteration"))
        by(trainer, comm)
        checkpoint = chainer_dist.Checkpoint(comm, f"{out}/{folder}/checkpoints")
        trainer.extend(checkpoint, trigger=(4, "iteration"))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            iteration = checkpoint.resume(trainer)
        assert comm.allgather_obj([str(each.message) for each in warned]) == [[]] * comm.size
        trainer.run()
        losses = [entry["main/loss"] for entry in log.log]
        return iteration, parameters(model), losses

    _, whole, losses = start("whole", 8)
    assert start("part", 4)[0] == 0
    iteration, resumed, resumed_losses = start("part", 8)
    assert iteration == 4
    np.testing.assert_array_equal(resumed, whole)
    assert resumed_losses == losses


class Stateful(chainer.Chain):
    """Its loss depends on what it has seen before."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.lstm = L.LSTM(5, 3)

    def reset_state(self):
        """As Chainer asks for it."""
        self.lstm.reset_state()

    def forward(self, x, t):
        """As Chainer asks for it."""
        loss = F.softmax_cross_entropy(self.lstm(x), t)
        chainer.report({"loss": loss}, self)
        return loss


def test_evaluators_whose_batches_do_not_stand_alone(comm, out):
    """Their score is that of one process, to the bit, which each rank computes."""

    class Worst(extensions.Evaluator):
        calls = 0

        def evaluate(self):
            self.calls += 1
            iterator = self.get_iterator("main")
            iterator.reset()
            target = self.get_target("main")
            losses = [
                float(target(*chainer.dataset.concat_examples(batch)).array) for batch in iterator
            ]
            return {"validation/worst": max(losses)}

    def make(model, stateful):
        worst = Worst(
            iterators.SerialIterator(make_data(15, 1), 5, repeat=False, shuffle=False), model
        )
        data = iterators.SerialIterator(make_data(15, 1), 5, repeat=False, shuffle=False)
        state = extensions.Evaluator(data, stateful, eval_hook=lambda _: stateful.reset_state())
        state.name = "state"
        return worst, state

    np.random.seed(3)
    model, stateful = make_model(lazy=False), Stateful()
    comm.bcast_data(stateful)
    trainer = make_trainer(iterators.SerialIterator(make_data(N), 4), model, out, stop=(1, "epoch"))
    for name, each in zip(("worst", "state"), make(model, stateful)):
        trainer.extend(each, name=name)
    log = extensions.LogReport()
    trainer.extend(log)
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    worst, state = make(model, stateful)
    with chainer.using_config("train", value=False):
        expected = worst.evaluate()["validation/worst"]
    assert trainer.get_extension("worst").calls == 1
    assert log.log[-1]["validation/worst"] == expected
    assert log.log[-1]["state/main/loss"] == float(state()["state/main/loss"])


def test_running_statistics_are_of_all_ranks(comm, out):
    """They are averaged before an evaluation, which is then that of what is saved."""
    np.random.seed(3)
    model = L.Classifier(
        chainer.Sequential(L.Linear(5, 8), L.BatchNormalization(8), L.Linear(8, 3))
    )
    trainer = make_trainer(iterators.SerialIterator(make_data(N), 4), model, out)
    trainer.extend(make_evaluator(model))
    trainer.extend(extensions.snapshot_object(model, "model"), trigger=(1, "epoch"))
    log = extensions.LogReport()
    trainer.extend(log)
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    means = comm.allgather_obj(model.predictor[1].avg_mean)
    assert all(np.array_equal(means[0], each) for each in means)
    comm.mpi_comm.Barrier()
    chainer.serializers.load_npz(f"{out}/model", model)
    x, t = chainer.dataset.concat_examples(make_data(N_VALIDATION, 1)[:])
    with chainer.using_config("train", value=False), chainer.no_backprop_mode():
        expected = float(model(x, t).array)
    assert log.log[-1]["validation/main/loss"] == pytest.approx(expected, rel=1e-5)


def test_dump_graph_has_the_graph(comm, out):
    """It needs rank 0's own loss, with what it was computed from."""
    trainer = make_trainer(
        iterators.SerialIterator(make_data(N), 4), make_model(), out, stop=(2, "iteration")
    )
    trainer.extend(extensions.DumpGraph("main/loss"))
    chainer_dist.distribute(trainer, comm)
    trainer.run()
    comm.mpi_comm.Barrier()
    with open(f"{out}/cg.dot") as file:  # noqa: PTH123
        assert "LinearFunction" in file.read()


def refused(comm, make, error, *words):
    """Check that all ranks refuse with the same words."""
    with pytest.raises(error) as caught:
        make()
    texts = comm.allgather_obj(str(caught.value))
    assert (
        len({text.partition(": ")[2] if text.startswith("rank ") else text for text in texts}) == 1
    )
    for word in words:
        assert word in texts[0]


def test_what_cannot_be_done_safely_is_refused(comm, out):
    """On every rank, with what is to be written instead."""

    class Loop(training.Updater):
        def __init__(self, optimizer):
            self._optimizers = {"main": optimizer}

        def get_all_optimizers(self):
            return self._optimizers

        def connect_trainer(self, trainer):
            pass

    def trainer_of(iterator, **options):
        return make_trainer(iterator, make_model(lazy=False), out, **options)

    def distribute(iterator, **options):
        return lambda: chainer_dist.distribute(trainer_of(iterator), comm, **options)

    custom = training.Trainer(
        Loop(chainer.optimizers.SGD(0.1).setup(make_model(lazy=False))), (1, "epoch")
    )
    refused(
        comm,
        lambda: chainer_dist.distribute(custom, comm),
        ValueError,
        "Loop",
        "chainer_dist.scatter_dataset(dataset, comm)",
    )
    ends = iterators.SerialIterator(make_data(N), 4, repeat=False)
    refused(comm, distribute(ends), ValueError, "repeat=True")
    begun = iterators.SerialIterator(make_data(N), 4)
    next(begun)
    refused(comm, distribute(begun), ValueError, "before a snapshot is loaded")
    data = iterators.SerialIterator(make_data(N), 4)
    refused(comm, distribute(data, batch="all"), ValueError, "'rank' or 'global'")
    refused(comm, distribute([1, 2]), (ValueError, AttributeError), "")
    refused(comm, distribute(iterators.SerialIterator([], 4)), ValueError, "is empty")
    if comm.size > 1:
        odd = iterators.SerialIterator(make_data(N), 2 * comm.size + 1)
        refused(comm, distribute(odd, batch="global"), ValueError, f"a multiple of {comm.size}")
        other = iterators.SerialIterator(make_data(N, seed=comm.rank), 4)
        refused(comm, distribute(other), RankMismatchError, "seed")
        split = chainer.datasets.split_dataset_random(make_data(N), 30, seed=comm.rank)[0]
        refused(comm, distribute(iterators.SerialIterator(split, 4)), RankMismatchError, "seed=0")
        short = iterators.SerialIterator(make_data(N - comm.rank), 4)
        refused(comm, distribute(short), RankMismatchError, "length")
        sizes = iterators.SerialIterator(make_data(N), 4 + comm.rank)
        refused(comm, distribute(sizes), RankMismatchError, "batch size")
        trainer = trainer_of(iterators.SerialIterator(make_data(N), 4))
        chainer_dist.distribute(trainer, comm)
        if comm.rank == 0:
            trainer.extend(extensions.LogReport())
        refused(comm, trainer.run, RankMismatchError, "extend the trainers of all ranks alike")


def test_iterators_that_draw_differently_are_refused(comm, out):
    """Batches that differ cannot be shared; the error says what to write."""
    if comm.size == 1:
        pytest.skip("one rank has nothing to differ from")
    trainer = make_trainer(Stream(make_data(N), 12, seed=comm.rank), make_model(), out)
    chainer_dist.distribute(trainer, comm)
    refused(
        comm, lambda: trainer.run(show_loop_exception_msg=False), ValueError, "DistributedIterator("
    )
    trainer = make_trainer(Stream(make_data(N), 2 * comm.size + 1), make_model(), out)
    chainer_dist.distribute(trainer, comm)
    refused(
        comm, lambda: trainer.run(show_loop_exception_msg=False), ValueError, "cannot be divided"
    )


def test_wrong_arguments(comm, out):
    """One line says which argument is what."""
    trainer = make_trainer(iterators.SerialIterator(make_data(N), 4), make_model(), out)
    for call in (chainer_dist.distribute, chainer_dist.on_rank_zero):
        with pytest.raises(TypeError, match=r"^trainer is .*expected a chainer.training.Trainer"):
            call(comm, trainer)
        with pytest.raises(TypeError, match=r"^comm is 'naive', expected a communicator"):
            call(trainer, "naive")
    chainer_dist.distribute(trainer, comm)
    for call in (chainer_dist.distribute, chainer_dist.on_rank_zero):
        with pytest.raises(ValueError, match="already"):
            call(trainer, comm)

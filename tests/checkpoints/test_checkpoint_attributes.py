"""What Chainer does not serialize: a resumed run has it, against plain Chainer that is not interrupted."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer import iterators, training
from chainer.training import extensions, triggers

from chainer_dist import compression, create_multi_node_optimizer
from chainer_dist.checkpoints import Checkpoint

DATA = [(np.full(3, i % 5, np.float32), np.int32(i % 2)) for i in range(24)]


@pytest.fixture
def out(comm, tmp_path):
    """Return one folder for all ranks."""
    return Path(comm.bcast_obj(str(tmp_path))) / "checkpoints"


@pytest.fixture(autouse=True)
def result(tmp_path, monkeypatch):
    """Let logs be written to a folder of the test."""
    monkeypatch.chdir(tmp_path)


# Links


class OwnState(chainer.Chain):
    """A link that keeps an array, a list of variables, a count and a random generator of its own."""

    def __init__(self, n_in, n_out) -> None:
        """Create it."""
        super().__init__()
        self.last = None
        self.history = [chainer.Variable(np.zeros((4, n_out), np.float32))]
        self.count = 0
        self.draw = np.random.RandomState(7)
        self.table = np.arange(3)
        with self.init_scope():
            self.l = L.Linear(n_in, n_out)

    def forward(self, x):
        """Return something that depends on all of it."""
        noise = self.draw.rand(*x.shape).astype(np.float32)
        y = self.l(x + noise) + self.history[-1].array
        if self.last is not None:
            y += self.last
        self.count += 1
        self.last = y.array / self.count
        self.history = [*self.history[-1:], chainer.Variable(y.array * 0.5)]
        return y


STATEFUL = [
    L.LSTM,
    L.StatefulGRU,
    L.StatefulPeepholeLSTM,
    L.StatefulZoneoutLSTM,
    L.StatefulMGU,
    OwnState,
]


class Reader(chainer.Chain):
    """Reads a sequence with stateful layers."""

    def __init__(self) -> None:
        """Create it."""
        super().__init__()
        with self.init_scope():
            self.layers = chainer.ChainList(*(layer(5, 6) for layer in STATEFUL))
            self.out = L.Linear(6, 2)

    def forward(self, x):
        """Return a loss."""
        return sum(F.mean(self.out(layer(x)) ** 2) for layer in self.layers)

    def cut(self):
        """Forget how the states came to be."""
        for layer in self.layers:
            for value in vars(layer).values():
                if type(value) is chainer.Variable:
                    value.unchain_backward()


def read(comm, out, *, save_at=None, stop=6, seed=3):
    """Train by a loop of one's own, from the newest checkpoint on; return the model."""
    np.random.seed(seed)
    model = Reader()
    optimizer = create_multi_node_optimizer(chainer.optimizers.SGD(0.05), comm).setup(model)
    state = {"model": model, "optimizer": optimizer}
    with Checkpoint(comm, out) as checkpoint:
        for step in range(checkpoint.resume(state), stop):
            x = np.random.RandomState(100 * comm.rank + step).rand(4, 5).astype(np.float32)
            optimizer.update(model, x)
            model.cut()
            if step + 1 == save_at:
                checkpoint.save(state, save_at)
    return model


def test_stateful_links(comm, out):
    """Hidden states, of each rank its own, and whatever else a link keeps in its attributes."""
    whole = read(comm, out, save_at=3)
    again = read(comm, out, seed=4)
    for ours, theirs in zip(again.params(), whole.params()):
        np.testing.assert_array_equal(ours.array, theirs.array)
    for ours, theirs in zip(again.layers, whole.layers):
        for key, value in vars(theirs).items():
            if type(value) is chainer.Variable:
                np.testing.assert_array_equal(vars(ours)[key].array, value.array)
    assert again.layers[-1].count == 6
    np.testing.assert_array_equal(again.layers[-1].last, whole.layers[-1].last)


def test_states_on_another_number_of_ranks(comm, out):
    """Hidden states are of the sequences that ranks read, and begin anew; what was alike is kept."""
    if comm.size == 1:
        pytest.skip("one rank has no other number of ranks within")
    part = comm.split(int(comm.rank == 0), comm.rank)
    read(comm, out, save_at=3, stop=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = read(part, out, stop=3)
    assert again.layers[0].h is None
    assert again.layers[-1].last is None
    assert again.layers[-1].count == 3
    part.finalize()


def test_what_constructors_made_stays(comm, out):
    """What training has not changed is the new process's: it is not in the file, and not loaded."""
    link = OwnState(5, 6)
    link.forward(np.ones((4, 5), np.float32))
    with Checkpoint(comm, out) as checkpoint:
        checkpoint.resume(link)
        link.count = 9
        checkpoint.save(link, 1)
    again = OwnState(5, 6)
    again.table = np.arange(7)
    Checkpoint(comm, out).resume(again)
    assert (again.count, len(again.table)) == (9, 7)


# Trainers


def stop_of(stop):
    """Return a trigger of the iteration in which training ends."""
    return stop if isinstance(stop, tuple) else stop.get_training_length()


SETTINGS = ("alpha", "beta1", "beta2", "eps", "eta", "weight_decay_rate")  # of Adam


def make_trainer(comm, stop, extend, out=None, *, before=False):
    """Return a trainer, of plain Chainer without a folder, and what it notes in each iteration."""
    np.random.seed(0 if out is None else 1)
    model = L.Classifier(L.Linear(3, 2, initialW=0.1))
    optimizer = chainer.optimizers.Adam(*[1e-2] * 6)
    if out is not None:
        optimizer = create_multi_node_optimizer(optimizer, comm)
    optimizer.setup(model)
    iterator = iterators.SerialIterator(DATA, 4, shuffle=False)
    updater = training.StandardUpdater(iterator, optimizer)
    trainer = training.Trainer(updater, stop, out="result")
    extend(trainer)
    noted = []

    def note(trainer):
        values = {
            key: value for key, value in trainer.observation.items() if not key.startswith("main/")
        }
        settings = [getattr(optimizer, name) for name in SETTINGS]
        noted.append((settings, [*map(type, settings)], {k: float(v) for k, v in values.items()}))

    trainer.extend(note, name="note", trigger=(1, "iteration"), priority=-500)
    trainer.noted = noted
    if out is not None:
        checkpoint = Checkpoint(comm, out)
        trainer.extend(checkpoint, trigger=stop_of(stop), call_before_training=before)
        trainer.begun_at = checkpoint.resume(trainer)
    return trainer


SHIFTS = [
    lambda name: extensions.ExponentialShift(name, 0.5),
    lambda name: extensions.ExponentialShift(name, 0.5, 0.02, 1e-3),
    lambda name: extensions.LinearShift(name, (1e-2, 1e-4), (2, 6)),
    lambda name: extensions.StepShift(name, 0.3, 2),
    lambda name: extensions.StepShift(name, 0.3, 2, target=1e-3),
    lambda name: extensions.MultistepShift(name, 0.3, [2, 7], 2e-2),
    lambda name: extensions.MultistepShift(name, 0.3, [2, 7], None),
    lambda name: extensions.PolynomialShift(name, 0.5, 20, target=1e-3),
    lambda name: extensions.InverseShift(name, 0.5, 0.7),
    lambda name: extensions.WarmupShift(name, 1e-4, 3, 2e-2),
    lambda name: extensions.WarmupShift(name, 1e-4, 3, 1e-2),
    lambda name: extensions.WarmupShift(name, None, 3, 2e-2),
]


@pytest.mark.parametrize("first", [0, 6])
def test_schedules(comm, out, first):
    """In each iteration the values, and their types, of plain Chainer that is not interrupted."""

    def extend(trainer):
        for name, shift in zip(SETTINGS, SHIFTS[first:]):
            trainer.extend(shift(name), trigger=(1, "iteration"))

    right = make_trainer(comm, (6, "iteration"), extend)
    right.run()
    for stop in (2, 5, 6):
        trainer = make_trainer(comm, (stop, "iteration"), extend, out)
        trainer.run()
        assert trainer.noted == right.noted[trainer.begun_at : stop]


@pytest.mark.parametrize("how", ["first without resume()", "called before training"])
def test_schedules_otherwise(comm, out, how):
    """The first process may go without resume(); a schedule may be called before training."""
    before = how == "called before training"

    def extend(trainer):
        trainer.extend(
            extensions.WarmupShift("alpha", 1e-4, 3, 2e-2), name="up", call_before_training=before
        )
        trainer.extend(extensions.LinearShift("eta", (1, 0.5), (1, 6)), call_before_training=before)

    right = make_trainer(comm, (6, "iteration"), extend)
    right.run()
    whole = right.noted, right.updater.get_optimizer("main").eta

    class Stop(Exception):  # noqa: N818 - it is no error
        pass

    def stop_at_once(_):
        raise Stop

    if before:  # ended after the checkpoint that was taken before training
        trainer = make_trainer(comm, (3, "iteration"), extend, out, before=True)
        trainer.extend(stop_at_once, name="stop", call_before_training=True, priority=-999)
        with pytest.raises(Stop):
            trainer.run()
        trainer.get_extension("Checkpoint").close()
        trainer = make_trainer(comm, (3, "iteration"), extend, out, before=True)
    else:
        trainer = make_trainer(comm, (4, "iteration"), extend, out)
        trainer.get_extension("Checkpoint")._attributes.__init__()
    trainer.run()
    noted = trainer.noted
    trainer = make_trainer(comm, (6, "iteration"), extend, out)
    trainer.run()
    assert (noted + trainer.noted, trainer.updater.get_optimizer("main").eta) == whole


class Patience:
    """A trigger of one's own that keeps counts and does not serialize: with a trigger within."""

    def __init__(self) -> None:
        """Create it."""
        self.count = 0
        self.interval = triggers.IntervalTrigger(2, "iteration")

    def __call__(self, trainer):
        """Fire every third time that the other one does."""
        self.count += bool(self.interval(trainer))
        return self.count % 3 == 2


def early_stopping(limit):
    """Return a trigger that stops in the tenth iteration, after a mean that grows every three."""
    return triggers.EarlyStoppingTrigger(
        check_trigger=(3, "iteration"),
        monitor="score",
        patience=2,
        mode="max",
        max_trigger=(limit, "iteration"),
    )


@pytest.mark.parametrize("cut", [2, 3, 7])
def test_early_stopping(comm, out, cut):
    """It stops in the iteration in which it stops without an interruption."""

    @training.make_extension(trigger=(1, "iteration"), priority=300)
    def score(trainer):
        i = trainer.updater.iteration
        trainer.observation["score"] = np.float32(min(i, 5) - 0.1 * (i % 3))

    def extend(trainer):
        trainer.extend(score, name="score")

    def limit(stop):
        return early_stopping(stop)

    right = make_trainer(comm, limit(50), extend)
    right.run()
    first = make_trainer(comm, limit(cut), extend, out)
    first.run()
    again = make_trainer(comm, limit(50), extend, out)
    again.run()
    assert again.begun_at == cut
    assert again.updater.iteration == right.updater.iteration
    assert again.stop_trigger.count == right.stop_trigger.count


def test_extensions_that_forget(comm, out):
    """MicroAverage, statistics and plots, triggers of one's own: values and random draws go on."""

    @training.make_extension(trigger=(1, "iteration"), priority=300)
    def report(trainer):
        i = trainer.updater.iteration
        trainer.observation["right"] = np.array(i % 4, np.float32)
        trainer.observation["all"] = np.int64(4)

    def extend(trainer):
        model = trainer.updater.get_optimizer("main").target
        trainer.extend(report, name="report")
        trainer.extend(
            extensions.MicroAverage("right", "all", "share", trigger=(3, "iteration")),
            trigger=(1, "iteration"),
        )
        trainer.extend(
            extensions.ParameterStatistics(
                model,
                {"iteration": lambda _: float(trainer.updater.iteration)},
                report_grads=False,
                trigger=(3, "iteration"),
            )
        )
        trainer.extend(
            extensions.VariableStatisticsPlot(model, max_sample_size=3, trigger=(99, "epoch")),
            trigger=(1, "iteration"),
        )
        trainer.extend(
            lambda t: t.observation.update(drawn=np.random.rand()), name="draw", trigger=Patience()
        )

    right = make_trainer(comm, (11, "iteration"), extend)
    right.run()
    drawn = np.random.rand()
    parts = []
    for stop in (4, 11):
        np.random.seed(5)
        trainer = make_trainer(comm, (stop, "iteration"), extend, out)
        if not parts:
            np.random.seed(0)  # as plain Chainer's, after the model was made
        trainer.run()
        parts += trainer.noted
    assert parts == right.noted
    assert np.random.rand() == drawn


TRIGGERS = {
    "max": lambda: triggers.MaxValueTrigger("score", (2, "iteration")),
    "min": lambda: triggers.MinValueTrigger("score", (3, "iteration")),
    "points": lambda: triggers.ManualScheduleTrigger([3, 8], "iteration"),
    "epochs": lambda: triggers.ManualScheduleTrigger([0.5, 1.4], "epoch"),
    "once": triggers.OnceTrigger,
    "interval": lambda: triggers.IntervalTrigger(0.4, "epoch"),
    "early": lambda: early_stopping(100),
    "patience": Patience,
}


def test_triggers(comm, out):
    """Each fires in the iterations in which it does without an interruption; logs are the same, too."""

    def score(trainer):
        i = trainer.updater.iteration
        trainer.observation["score"] = np.float32(0.1) * (i * 7 % 11)
        if i % 4 == 1:
            trainer.observation["seldom"] = np.float32(1 / i)

    def extend(trainer):
        trainer.fired = []
        trainer.extend(score, name="score", trigger=(1, "iteration"), priority=300)
        for name, make in TRIGGERS.items():

            def note(trainer, name=name):
                trainer.fired.append((trainer.updater.iteration, name))

            trainer.extend(note, name=name, trigger=make())
        keys = ["score", "seldom"]
        trainer.extend(extensions.LogReport(keys, trigger=(5, "iteration"), filename=None))

    def log(trainer):
        rows = trainer.get_extension("LogReport").log
        return [{k: v for k, v in row.items() if k != "elapsed_time"} for row in rows]

    right = make_trainer(comm, (14, "iteration"), extend)
    right.run()
    fired = []
    for stop in (1, 4, 7, 14):
        trainer = make_trainer(comm, (stop, "iteration"), extend, out)
        trainer.run()
        fired += trainer.fired
    assert fired == right.fired
    assert {name for _, name in fired} == {*TRIGGERS}
    assert log(trainer) == log(right)


# Before the first update


@pytest.mark.parametrize("kind", ["Adam", "MomentumSGD"])
def test_before_the_first_update(comm, out, kind):
    """A checkpoint of what has no state and no shapes yet is one like any other."""

    def train(comm, folder, *, stop, seed):
        np.random.seed(seed + comm.rank)
        model = L.Classifier(chainer.Sequential(L.Linear(None, 4), F.relu, L.Linear(4, 2)))
        optimizer = create_multi_node_optimizer(getattr(chainer.optimizers, kind)(), comm)
        iterator = iterators.SerialIterator(DATA, 4)
        updater = training.StandardUpdater(iterator, optimizer.setup(model))
        trainer = training.Trainer(updater, (stop, "iteration"))
        checkpoint = Checkpoint(comm, folder)
        trainer.extend(checkpoint, trigger=(99, "iteration"), call_before_training=True)
        begun = checkpoint.resume(trainer)
        trainer.run()
        return model, begun, next(out.glob("0-*"), None)

    whole, begun, saved = train(comm, out, stop=4, seed=1)
    assert (begun, saved is None) == (0, False)
    again, begun, _ = train(comm, out, stop=4, seed=8)
    assert begun == 0
    for ours, theirs in zip(again.params(), whole.params()):
        np.testing.assert_array_equal(ours.array, theirs.array)


# What it was of


def save_one(comm, out, make, step=True):
    """Save a model and its optimizer, after an update."""
    model = make[0]()
    optimizer = make[1](comm).setup(model)
    if step:
        optimizer.update(lambda x: F.sum(model(x) ** 2), np.ones((2, 3), np.float32))
    state = {"model": model, "optimizer": optimizer}
    with Checkpoint(comm, out) as checkpoint:
        checkpoint.resume(state)
        checkpoint.save(state, 1)
    return model


def resume_one(comm, out, make):
    """Resume into another one, and return it and what was said."""
    model = make[0]()
    optimizer = make[1](comm).setup(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert Checkpoint(comm, out).resume({"model": model, "optimizer": optimizer}) == 1
    return optimizer, "\n".join(str(each.message) for each in caught)


def wrapped(kind, *args, **options):
    """Return what makes a multi-node optimizer."""
    return lambda comm: create_multi_node_optimizer(
        getattr(chainer.optimizers, kind)(*args), comm, **options
    )


def layers(*sizes, dtype=np.float32):
    """Return what makes linear layers."""

    def make():
        with chainer.using_config("dtype", dtype):
            return chainer.Sequential(
                *(L.Linear(*pair, initialW=0.1) for pair in zip(sizes, sizes[1:]))
            )

    return make


THREE = layers(3, 3, 3, 2)


@pytest.mark.parametrize(
    ("saved", "now", "text"),
    [
        ((THREE, "Adam"), (THREE, "MomentumSGD"), "optimizer was Adam, and is MomentumSGD now"),
        ((THREE, "SGD"), (THREE, "Adam"), "optimizer was SGD, and is Adam now"),
        ((THREE, "SGD"), (layers(3, 3, 2), "SGD"), "model/2/W was saved, and the model has none"),
        ((layers(3, 3, 2), "SGD"), (THREE, "SGD"), "it has no parameter model/2/W"),
        ((THREE, "SGD"), (layers(3, 3, 3, 2, dtype=np.float64), "SGD"), "saved as <f4, and is <f8"),
        ((THREE, "SGD"), (layers(3, 4, 3, 2), "SGD"), r"model/0/W was saved as \(3, 3\), and is \(4, 3\) now"),
    ],
)  # fmt: skip
def test_another_model_or_optimizer_is_refused(comm, out, saved, now, text):
    """On every rank, even if names happen to fit; nothing was changed."""
    save_one(comm, out, (saved[0], wrapped(saved[1])))
    with pytest.raises(RuntimeError, match=f"does not fit: .*{text}"):
        resume_one(comm, out, (now[0], wrapped(now[1])))


def test_one_rank_that_differs_is_enough(comm, out):
    """The others raise as well, and name it."""
    save_one(comm, out, (THREE, wrapped("SGD")))
    last = comm.size - 1
    make = wrapped("SGD") if comm.rank < last else (lambda _: chainer.optimizers.Adam())
    text = rf"rank {last}: .*was SGD, and is Adam" if last else "was SGD, and is Adam"
    model = THREE()
    optimizer = make(comm)
    if comm.rank < last:
        optimizer = chainer.optimizers.SGD()
    with pytest.raises(RuntimeError, match=text):
        Checkpoint(comm, out).resume({"model": model, "optimizer": optimizer.setup(model)})


def test_what_is_the_users_may_change(comm, out):
    """Another learning rate, another way to share the update; compression begins anew, which is told."""
    save_one(comm, out, (THREE, wrapped("Adam", 0.1)))
    optimizer, said = resume_one(comm, out, (THREE, wrapped("Adam", 0.3, sharded_update=False)))
    assert (optimizer.alpha, optimizer.t, said) == (0.3, 1, "")
    optimizer, said = resume_one(
        comm, out, (THREE, wrapped("Adam", compression=compression.TopK(0.5)))
    )
    assert ("compression of optimizer was None and is TopK now" in said) == (comm.rank == 0)


class Counting(chainer.optimizers.sgd.SGDRule):
    """A rule that makes smaller and smaller steps, by a number that is in no state."""

    step = 1.0

    def update_core_cpu(self, param):
        """Make a step."""
        self.step *= 0.5
        param.data -= self.step * param.grad


@pytest.mark.parametrize("kind", ["MSVAG", "Counting"])
def test_rules_with_numbers_of_their_own(comm, out, kind):
    """Chainer serializes the state and the count of updates only."""

    def train(folder, stop):
        model = L.Linear(3, 2, initialW=1.0)
        actual = chainer.optimizers.SGD() if kind == "Counting" else chainer.optimizers.MSVAG(0.1)
        optimizer = create_multi_node_optimizer(actual, comm).setup(model)
        for param in model.params() if kind == "Counting" else ():
            param.update_rule = Counting()
        state = {"model": model, "optimizer": optimizer}
        with Checkpoint(comm, folder) as checkpoint:
            for step in range(checkpoint.resume(state), stop):
                x = np.random.RandomState(10 * comm.rank + step).rand(4, 3).astype(np.float32)
                optimizer.update(lambda x: F.mean(model(x) ** 2), x)
            checkpoint.save(state, stop)
        return model

    train(out, 3)
    resumed, whole = train(out, 6), train(out / "whole", 6)
    np.testing.assert_array_equal(resumed.W.array, whole.W.array)


def test_hyperparameters_that_a_loop_has_set(comm, out):
    """A resumed run goes on with them, unless it begins with others than the one before began with."""
    model = THREE()
    optimizer = wrapped("SGD", 0.4)(comm).setup(model)
    state = {"model": model, "optimizer": optimizer}
    with Checkpoint(comm, out) as checkpoint:
        checkpoint.resume(state)
        optimizer.lr *= np.float64(0.5)
        model[0].disable_update()
        checkpoint.save(state, 1)
    optimizer, said = resume_one(comm, out, (THREE, wrapped("SGD", 0.4)))
    assert (optimizer.lr, type(optimizer.lr), said) == (0.2, np.float64, "")
    assert [param.update_rule.enabled for _, param in sorted(optimizer.target.namedparams())] == (
        [False] * 2 + [True] * 4
    )
    optimizer, said = resume_one(comm, out, (THREE, wrapped("SGD", 0.1)))
    assert optimizer.lr == 0.1
    assert ("began with 0.4" in said) == (comm.rank == 0)


def test_extensions_may_be_added_and_removed(comm, out):
    """Those that are new begin anew, those that are gone are left out, and both are told."""

    def extend(trainer):
        trainer.extend(extensions.LogReport(trigger=(1, "iteration"), filename=None))

    def extend_otherwise(trainer):
        trainer.extend(extensions.PlotReport(["x"], filename="x.png"))
        trainer.extend(extensions.ExponentialShift("alpha", 0.5))
        trainer.extend(extensions.LogReport(trigger=(1, "iteration"), filename=None), name="log")

    make_trainer(comm, (3, "iteration"), extend, out).run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = make_trainer(comm, (5, "iteration"), extend_otherwise, out)
    trainer.run()
    said = "\n".join(str(each.message) for each in caught)
    assert trainer.begun_at == 3
    assert len(trainer.get_extension("log").log) == 2
    for text in (
        "extensions/LogReport (LogReport) was saved, and is not there now",
        "extensions/log (LogReport) was not saved, and begins anew",
        "extensions/ExponentialShift (ExponentialShift) was not saved",
    ):
        assert (text in said) == (comm.rank == 0)


def test_an_optimizer_that_is_set_up_anew(comm, out):
    """A frozen layer that is thawed after a resume begins without a state, as it does without one."""
    model = THREE()
    optimizer = wrapped("Adam")(comm).setup(model)
    model[0].disable_update()
    optimizer.update(lambda x: F.sum(model(x) ** 2), np.ones((2, 3), np.float32))
    with Checkpoint(comm, out) as checkpoint:
        checkpoint.save({"model": model, "optimizer": optimizer}, 1)
    shutil.rmtree(out / "none", ignore_errors=True)
    optimizer, _ = resume_one(comm, out, (THREE, wrapped("Adam")))
    assert optimizer.target[0].W.update_rule.state is None
    optimizer.update(lambda x: F.sum(optimizer.target(x) ** 2), np.ones((2, 3), np.float32))
    assert optimizer.target[0].W.update_rule.t == 1

"""Optuna's studies on many ranks, with the real Optuna."""

from __future__ import annotations

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import optuna
import pytest

import chainer_dist
from chainer_dist.integrations.optuna import ChainerMNStudy, PruningExtension

pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


@pytest.fixture(autouse=True)
def quiet():
    """Say nothing of each trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def create(comm, **options):
    """Return a study on many ranks, with an in-memory storage on rank 0 only."""
    sampler = optuna.samplers.RandomSampler(seed=0)
    study = optuna.create_study(sampler=sampler, **options) if comm.rank == 0 else None
    return ChainerMNStudy(study, comm)


def test_all_ranks_get_the_same_suggestions(comm):
    """Those of a study of one process with the same sampler; and rank 0's value counts."""
    seen = []

    def suggest(trial):
        return (
            trial.suggest_float("rate", 1e-5, 1e-1, log=True),
            trial.suggest_int("units", 1, 100),
            trial.suggest_categorical("hook", ["decay", None, True]),
            trial.number,
            dict(trial.params),
        )

    def objective(trial, comm):
        seen.append(suggest(trial))
        trial.set_user_attr("size", comm.size)
        return seen[-1][0] + comm.rank

    study = create(comm)
    study.optimize(objective, n_trials=5)
    assert comm.allgather_obj(seen) == [seen] * comm.size
    assert len(seen) == 5
    if comm.rank == 0:
        alone, plain = [], optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
        plain.optimize(lambda trial: alone.append(suggest(trial)) or alone[-1][0], n_trials=5)
        assert alone == seen
        assert study.best_value == plain.best_value
        assert study.trials[0].user_attrs == {"size": comm.size}
    else:
        with pytest.raises(AttributeError, match=f"best_value: rank 0 alone.* rank {comm.rank}"):
            study.best_value  # noqa: B018 - it raises


def test_all_ranks_prune_together(comm):
    """By the pruner of rank 0, whatever the others report."""
    steps = []

    def objective(trial, comm):
        for step in range(9):
            steps.append((trial.number, step))
            trial.report(10.0 * trial.number + step + comm.rank * 1000, step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return 1.0

    study = create(comm, pruner=optuna.pruners.MedianPruner(n_startup_trials=1, n_warmup_steps=3))
    study.optimize(objective, n_trials=3)
    assert comm.allgather_obj(steps) == [steps] * comm.size
    assert len(steps) < 27
    if comm.rank == 0:
        states = [trial.state.name for trial in study.trials]
        assert states == ["COMPLETE", "PRUNED", "PRUNED"]


def test_errors(comm):
    """Those that are caught fail a trial; others, and those of Optuna, are raised on every rank."""

    def fails(trial, _):
        raise ZeroDivisionError(trial.number)

    study = create(comm)
    for catch in (
        (ZeroDivisionError,),
        ZeroDivisionError,
        [ZeroDivisionError],
        {ZeroDivisionError},
    ):
        study.optimize(fails, n_trials=2, catch=catch)
    if comm.rank == 0:
        assert [trial.state.name for trial in study.trials] == ["FAIL"] * 8
    with pytest.raises(ZeroDivisionError):
        study.optimize(fails, n_trials=1)
    with pytest.raises(ValueError, match="low"):
        study.optimize(lambda trial, _: trial.suggest_float("x", 1.0, 0.0), n_trials=1)
    with pytest.raises(ValueError, match="n_jobs"):
        study.optimize(fails, n_trials=1, n_jobs=2)
    with pytest.raises(
        TypeError, match=r"rank 0 must have a study of optuna.create_study, got NoneType"
    ):
        ChainerMNStudy(None, comm)
    comm.allgather_obj("still together")


def test_a_trainer_is_pruned(comm):
    """By the extension, on all ranks in the same epoch; what is trained is a model of all ranks."""
    x = np.random.RandomState(0).rand(24, 3).astype(np.float32)
    ended = []

    def objective(trial, comm):
        rate = trial.suggest_float("rate", 1e-3, 1e-1)
        model = L.Classifier(L.Linear(3, 1), lossfun=F.mean_squared_error)
        model.compute_accuracy = False
        optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(rate), comm)
        optimizer.setup(model)
        data = chainer_dist.scatter_dataset(
            list(zip(x, x[:, :1])) if comm.rank == 0 else None, comm
        )
        iterator = chainer.iterators.SerialIterator(data, 2)
        updater = chainer.training.StandardUpdater(iterator, optimizer)
        trainer = chainer.training.Trainer(updater, (6, "epoch"), out="unused")
        trainer.extend(PruningExtension(trial, "main/loss", (1, "epoch")))
        try:
            trainer.run(show_loop_exception_msg=False)
        finally:
            ended.append((trial.number, updater.epoch, model.predictor.W.array.tolist()))
        return float(model.loss.array)

    study = create(comm, pruner=optuna.pruners.ThresholdPruner(upper=-1.0, n_warmup_steps=3))
    study.optimize(objective, n_trials=2)
    assert comm.allgather_obj(ended) == [ended] * comm.size
    assert [epoch for _, epoch, _ in ended] == [3, 3]
    if comm.rank == 0:
        assert [trial.state.name for trial in study.trials] == ["PRUNED"] * 2
        assert sorted(study.trials[0].intermediate_values) == [1, 2, 3]

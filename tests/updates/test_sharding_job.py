"""The update shared out to the ranks of all nodes, against the update that every rank does alone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import chainer
import chainer.functions as F
import numpy as np
import pytest
from chainer import optimizer_hooks as hooks
from chainer import serializers
from conftest import LAYOUTS, on_nodes
from test_sharding import Branches, assert_same, batch, everywhere, mlp, prepared, saved, train

from chainer_dist import (
    Checkpoint,
    RankMismatchError,
    compression,
    create_multi_node_checkpointer,
    create_multi_node_optimizer,
)
from chainer_dist.extensions import multi_node_snapshot
from rounding import rounded_mean

OPTIONS = [{}, {"overlap": False}, {"share_parameters": True}]

pytestmark = pytest.mark.usefixtures("small_blocks")


def spread(comm, *args, **options):
    """Return an optimizer whose state is spread over the job."""
    return prepared(comm, *args, sharded_update="job", **options)


def rtol(comm):
    """Return what may differ: MPI adds the numbers of three nodes in another order."""
    return 0 if comm.inter_size < 3 else 1e-5


def elsewhere(comm, layout):
    """Return what may differ from two nodes: three numbers are added in another order."""
    return 0 if layout == "odd and even" or comm.size < 3 else 1e-5


def is_spread(optimizer):
    """Tell whether this rank's state is a part."""
    try:
        saved(optimizer)
    except RuntimeError:
        return True
    return False


def same_as_replicated(one, comm, add=(), rtol=0.0, **options):
    """Compare with what every rank does alone, to the bit if ``rtol`` is 0; all ranks are equal."""
    rule = type(one.actual_optimizer).__name__
    other = train(prepared(comm, rule, add, sharded_update=False, **options), one.t)
    one.consolidate()
    assert everywhere(comm, saved(one.target, one.actual_optimizer))
    assert_same(one, other, rtol)


@pytest.mark.parametrize("name", ["Adam", "NesterovAG", "SGD", "SMORMS3"])
def test_same_bits_as_the_replicated_update(nodes, name):
    """Parameters and state are those of Chainer's own update, whatever the rule."""
    one = train(spread(nodes, name), 3)
    assert one.sharded
    same_as_replicated(one, nodes)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_any_nodes(layout, options):
    """Nodes of different numbers of ranks, and the other options, come to the same."""
    with on_nodes("shared_memory", layout) as comm:
        one = train(spread(comm, **options), 4)
        assert one.overlapped == (comm.inter_size > 1 and options.get("overlap", True))
        assert is_spread(one) == (comm.inter_size > 1)
        same_as_replicated(one, comm, rtol=rtol(comm), **options)


def begin(optimizer):
    """Postpone the first update, so that the second batch comes before any."""
    with optimizer.no_sync():
        train(optimizer, 1, 90)


def replace_arrays(optimizer):
    """Let a user set other arrays."""
    for param in optimizer.target.params():
        param.array = param.array * np.float32(0.5)


def load_model(optimizer):
    """Load other parameters."""
    model = mlp()
    for param, other in zip(optimizer.target.params(), model.params()):
        param.copydata(other)


def freeze(optimizer):
    """Disable a layer, so that the update is shared out anew, after one more batch."""
    next(optimizer.target.params()).update_rule.enabled = False
    begin(optimizer)


def copy_and_clip(optimizer):
    """Write to a copy, and what does not depend on how often it is written to the parameters."""
    optimizer.consolidate()
    for param in copy.deepcopy(optimizer).target.params():
        param.array[...] = 7
        param.update_rule.state["v"][...] = 7
    optimizer.communicator.mpi_comm.Barrier()
    for param in optimizer.target.params():
        np.clip(param.array, -0.1, 0.1, out=param.array)
    optimizer.communicator.mpi_comm.Barrier()


@pytest.mark.parametrize("share_parameters", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_model_is_whole_at_any_time(layout, share_parameters):
    """Every batch sees parameters that are those of the replicated update, whatever comes between."""
    with on_nodes("shared_memory", layout) as comm:
        one, other = (
            prepared(
                comm,
                "MomentumSGD",
                sharded_update=sharded,
                share_parameters=share_parameters,
                accumulate_steps=2,
            )
            for sharded in ("job", False)
        )
        for number, change in enumerate(
            [begin, train, replace_arrays, begin, load_model, freeze, copy_and_clip, replace_arrays]
        ):
            for optimizer in (one, other):
                change(optimizer)
            for step in range(3):
                for (name, got), (_, want) in zip(
                    sorted(one.target.namedparams()), sorted(other.target.namedparams())
                ):
                    text = f"{name}, {step} batches after {number}, {change.__name__}"
                    np.testing.assert_allclose(
                        got.array, want.array, rtol(comm), 1e-7 if rtol(comm) else 0, err_msg=text
                    )
                for optimizer in (one, other):
                    train(optimizer, 1, step)
        assert one.sharded
        assert everywhere(comm, saved(one.target))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_are_rounded_once(layout):
    """With Float16 gradients are sent as such, but for those that stay on a node, and parameters as they are."""
    with on_nodes("shared_memory", layout) as comm:
        for overlap in (False, True):
            everyone = [np.random.RandomState(r).randn(700).astype("f4") for r in range(comm.size)]
            model = chainer.Link()
            with model.init_scope():
                model.p = chainer.Parameter(np.zeros(700, np.float32))
            optimizer = create_multi_node_optimizer(
                chainer.optimizers.SGD(1.0),
                comm,
                sharded_update="job",
                compression=compression.Float16(),
                overlap=overlap,
            ).setup(model)
            want = -rounded_mean(comm, "float16", everyone, again=False)
            for step in range(2):
                optimizer.update(lambda p, c: F.sum(p * c), model.p, everyone[comm.rank])
                np.testing.assert_array_equal(model.p.array, want if step == 0 else want + want)
            assert optimizer.overlapped == (overlap and comm.size > 1)


@pytest.mark.parametrize(
    ("add", "rtol"),
    [
        ([hooks.WeightDecay(0.01), hooks.GradientHardClipping(-0.01, 0.02)], 0),
        ([hooks.GradientClipping(0.01)], 1e-5),
        ([hooks.WeightDecay(0.1), hooks.GradientClipping(0.3), hooks.Lasso(0.01)], 1e-5),
    ],
)
def test_hooks(nodes, add, rtol):
    """Hooks see the average, and a norm is that of all gradients."""
    one = train(spread(nodes, "MomentumSGD", add))
    assert one.sharded
    same_as_replicated(one, nodes, add, rtol=rtol)


def test_state_exists_once(nodes):
    """The arrays of all ranks together are those of one optimizer."""
    optimizer = train(spread(nodes))
    own = sum(
        array.size
        for chunks in optimizer._state.plan.chosen.prepared.layout.chunks
        for chunk in chunks
        for array in chunk.state.values()
    )
    everyone = nodes.allgather_obj(own)
    size = sum(param.size for param in optimizer.target.params())
    assert sum(everyone) == 2 * size
    assert nodes.inter_size == 1 or max(everyone) <= 2 * size * 0.51


def test_a_part_is_never_saved_for_the_whole(nodes, tmp_path):
    """Saving, copying and reading raise an error that says what to do, on the rank that tries."""
    optimizer = train(spread(nodes))
    if nodes.inter_size == 1:
        pytest.skip("one node has all of the state")
    rule = next(optimizer.target.params()).update_rule
    for attempt in (
        lambda: serializers.save_npz(tmp_path / "own.npz", optimizer),
        lambda: serializers.save_npz(tmp_path / "own.npz", optimizer.actual_optimizer),
        lambda: copy.deepcopy(optimizer),
        lambda: pickle.dumps(optimizer),
        lambda: rule.state["m"],
        lambda: dict(rule.state),
        lambda: list(rule.state.items()),
        optimizer.actual_optimizer.update,
    ):
        with pytest.raises(RuntimeError, match=r"optimizer.consolidate\(\) on every rank"):
            attempt()
    assert not (tmp_path / "own.npz").exists()
    train(optimizer, 2, 3)


def test_any_rank_saves_after_consolidation(nodes, tmp_path):
    """A snapshot is Chainer's own; training goes on with it anywhere, as it does without."""
    optimizer = train(spread(nodes))
    optimizer.consolidate()
    saver = nodes.size - 1
    folder = Path(nodes.bcast_obj(str(tmp_path), root=saver))
    if nodes.rank == saver:
        serializers.save_npz(folder / "model.npz", optimizer.target)
        serializers.save_npz(folder / "optimizer.npz", optimizer)
    nodes.mpi_comm.Barrier()
    train(optimizer, 2, 3)
    assert is_spread(optimizer) == (nodes.inter_size > 1)
    for layout in ("one node", "odd and even", "a node each"):
        with on_nodes("shared_memory", layout) as comm:
            resumed = spread(comm)
            train(resumed, 1)
            serializers.load_npz(folder / "model.npz", resumed.target)
            serializers.load_npz(folder / "optimizer.npz", resumed)
            train(resumed, 2, 3)
            for each in (optimizer, resumed):
                each.consolidate()
            assert_same(optimizer, resumed, elsewhere(comm, layout))
    optimizer.consolidate()  # twice is once


def test_checkpoint(nodes, tmp_path):
    """It gathers the state by itself, and goes on exactly, on other nodes too."""
    folder = Path(nodes.bcast_obj(str(tmp_path)))
    optimizer = train(spread(nodes))
    with Checkpoint(nodes, folder / "saved") as checkpoint:
        checkpoint.save({"model": optimizer.target, "optimizer": optimizer}, 3)
        train(optimizer, 2, 3)
    for layout in ("one node", "odd and even"):
        with on_nodes("shared_memory", layout) as comm:
            resumed = spread(comm)
            with Checkpoint(comm, folder / "saved") as checkpoint:
                state = {"model": resumed.target, "optimizer": resumed}
                assert checkpoint.resume(state) == 3
                train(resumed, 2, 3)
            for each in (optimizer, resumed):
                each.consolidate()
            assert_same(optimizer, resumed, elsewhere(comm, layout))


@pytest.mark.filterwarnings("ignore:create_multi_node_checkpointer is deprecated")
def test_extensions_that_save(nodes, tmp_path):
    """Those of a trainer gather the state by themselves, too; training goes on, and so does a resume."""
    folder = Path(nodes.bcast_obj(str(tmp_path)))
    data = [(x, t) for x, t in zip(*batch(nodes, 0, 12))]
    checkpointer = create_multi_node_checkpointer("own", nodes, path=folder / "own")
    for epochs in (2, 3):
        optimizer = spread(nodes)
        iterator = chainer.iterators.SerialIterator(data, 6, shuffle=False)
        updater = chainer.training.StandardUpdater(iterator, optimizer)
        trainer = chainer.training.Trainer(updater, (epochs, "epoch"), folder)
        checkpointer.maybe_load(trainer, optimizer)
        assert updater.iteration == (0 if epochs == 2 else 4)
        if epochs == 2:
            snapshot = chainer.training.extensions.snapshot()
            trainer.extend(multi_node_snapshot(nodes, snapshot, []), trigger=(1, "epoch"))
        trainer.run()
        checkpointer.save(trainer, updater.iteration)
        optimizer.consolidate()
        if epochs == 2:
            with np.load(folder / "snapshot_iter_4.0") as file:
                for key, value in saved(optimizer.actual_optimizer).items():
                    name = f"updater/optimizer:main/{key[1:].lstrip('/')}"
                    np.testing.assert_array_equal(file[name], value)
    straight = spread(nodes)
    for step in range(6):
        straight.update(straight.target, *map(np.array, zip(*data[step % 2 * 6 :][:6])))
    straight.consolidate()
    straight.epoch = 3  # which a trainer counts
    assert_same(optimizer, straight)


def test_a_snapshot_that_only_some_ranks_loaded(nodes):
    """All ranks raise, and none waits in the gathering."""
    optimizer = train(spread(nodes))
    if nodes.inter_size == 1:
        pytest.skip("one node has all of the state")
    optimizer.consolidate()
    target = saved_by_chainer(optimizer)
    train(optimizer, 1, 3)
    if nodes.rank == 0:
        serializers.NpzDeserializer(target).load(optimizer)
    with pytest.raises(RankMismatchError, match="snapshot loaded on some ranks only"):
        optimizer.consolidate()


def saved_by_chainer(optimizer):
    """Return what Chainer saves."""
    serializer = serializers.DictionarySerializer()
    serializer.save(optimizer)
    return serializer.target


def test_what_changes_in_the_middle(nodes):
    """State goes along when a hook makes the difference, when layers are disabled, when users replace it."""
    trained = []
    for sharded in ("job", False):
        optimizer = prepared(nodes, "MomentumSGD", sharded_update=sharded)
        train(optimizer, 2)
        first, second, *_ = optimizer.target.params()
        first.update_rule.enabled = False
        train(optimizer, 2, 2)
        first.update_rule.enabled = True
        second.update_rule.add_hook(hooks.WeightDecay(0.1))
        train(optimizer, 2, 4)
        optimizer.consolidate()
        first.update_rule.state["v"] = np.zeros_like(first.array)
        train(optimizer, 2, 6)
        optimizer.consolidate()
        trained.append(optimizer)
    assert trained[0].sharded
    assert_same(*trained)


def test_what_cannot_be_sharded(nodes):
    """It is an error, as with True."""
    optimizer = spread(nodes, "SGD", [hooks.GradientNoise(0.01)])
    with pytest.raises(ValueError, match="the update cannot be sharded"):
        train(optimizer)


def test_layers_that_are_not_used(nodes):
    """They are left out of the exchange of gradients, and updated all the same."""
    trained = []
    for sharded in ("job", False):
        optimizer = prepared(nodes, "Adam", model=Branches(), sharded_update=sharded)
        optimizer.target.a.disable_update()
        trained.append(train(optimizer, 3))
        optimizer.consolidate()
    assert trained[0].sharded
    assert_same(*trained)


def test_options_that_do_not_go_together(nodes):
    """Clear errors, before anything is exchanged."""
    for options, text in (
        ({"sharded_update": "all"}, "expected None, False, True or 'job'"),
        ({"sharded_update": "job", "mean_grad": True}, "leave mean_grad out"),
        ({"sharded_update": "job", "double_buffering": True}, "leave sharded_update out"),
        ({"sharded_update": "job", "compression": compression.Int8()}, "leave sharded_update out"),
    ):
        with pytest.raises(ValueError, match=text):
            create_multi_node_optimizer(chainer.optimizers.SGD(), nodes, **options)
    if nodes.size > 1:
        with pytest.raises(RankMismatchError, match="rank 1: the option sharded_update"):
            prepared(nodes, sharded_update="job" if nodes.rank else None)

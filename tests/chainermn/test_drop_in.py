"""Every public name of ChainerMN is here, at the same place, and takes the same arguments."""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import pickle
import pkgutil
import subprocess
import sys
import textwrap
import types
import warnings

import chainer
import chainer.functions as F
import chainer.links as L
import numpy as np
import pytest
from chainer.functions.normalization.batch_normalization import BatchNormalization

import chainer_dist
from chainer_dist import RankMismatchError, functions
from chainer_dist.chainermn import MODULES, NAMES
from chainer_dist.collectives import objects
from chainer_dist.errors import NonFiniteGradientError

chainermn = pytest.importorskip("chainermn")

# The classes of which functions are made, in ChainerMN's old style; they are compared by what they do.
INNER_NAMES = {
    "chainermn.functions.collective_communication": {
        *("AllGather", "AllToAll", "Bcast", "Gather", "Scatter")
    },
    "chainermn.functions.point_to_point_communication": {"Recv", "Send"},
    "chainermn.functions.pseudo_connect": {"PseudoConnect"},
}

# Options that ChainerMN takes out of its **kwargs, with their defaults.
KEYWORDS = {
    "create_communicator": {"allreduce_grad_dtype": None, "batched_copy": True},
    "GenericMultiNodeEvaluator": {"progress_hook": None},
    "MultiNodeEarlyStoppingTrigger": {"patients": None},
}

# Defaults that are others, and why.
OTHER_DEFAULTS = {
    ("create_communicator", "communicator_name"): "ChainerMN's needs GPUs",
    ("recv_obj", "tag"): "None stands for MPI.ANY_TAG, so that it need not be imported",
}


def public_modules():
    """Return the names of ChainerMN's modules that scripts may import."""
    found = [info.name for info in pkgutil.walk_packages(chainermn.__path__, "chainermn.")]
    return ["chainermn"] + [name for name in found if not name.rpartition(".")[2].startswith("_")]


def public_names(module):
    """Return what ChainerMN defines of a module's public names."""
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and name not in INNER_NAMES.get(module.__name__, ())
        and not inspect.ismodule(value)
        and (getattr(value, "__module__", None) or "").startswith("chainermn")
    }


def same_place(name):
    """Import the module of chainer_dist that stands for one of ChainerMN's."""
    return importlib.import_module(name.replace("chainermn", "chainer_dist", 1))


def differences(name, ours, theirs):
    """Return in what ``ours`` does not take what ``theirs`` takes."""
    mine = list(inspect.signature(ours).parameters.values())
    by_name = {parameter.name: parameter for parameter in mine}
    flexible = {parameter.kind for parameter in mine}
    found = []
    wanted = {**inspect.signature(theirs).parameters}
    for position, parameter in enumerate(wanted.values()):
        got = by_name.get(parameter.name)
        if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            # A function that takes the same options by their names has no need of **kwargs.
            if parameter.kind not in flexible and name not in KEYWORDS:
                found.append(f"{name} takes no {parameter}")
        elif got is None:
            found.append(f"{name} has no parameter {parameter.name}")
        elif parameter.kind is not parameter.KEYWORD_ONLY and (
            mine.index(got) != position or got.kind is got.KEYWORD_ONLY
        ):
            found.append(f"{name} has {parameter.name} at another position")
        elif (
            parameter.default is not parameter.empty
            and got.default != parameter.default
            and (name, parameter.name) not in OTHER_DEFAULTS
        ):
            found.append(f"{name} has {parameter.name}={got.default}, not {parameter.default}")
    for option, default in KEYWORDS.get(name, {}).items():
        if option not in by_name or by_name[option].default != default:
            found.append(f"{name} does not take {option}={default}")
    found += [
        f"{name} requires {parameter.name}"
        for parameter in mine
        if parameter.name not in wanted
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    return found


def members(cls):
    """Return the public methods, properties and values that ChainerMN gives a class."""
    found = {}
    for each in reversed(cls.__mro__):
        if each.__module__.startswith("chainermn"):
            found.update(vars(each))
    return {name: it for name, it in found.items() if not name.startswith("_")} | {
        name: found[name] for name in ("__call__",) if name in found
    }


def class_differences(ours, theirs):
    """Return in what a class of ours is not what ChainerMN's is."""
    found = []
    for name, member in members(theirs).items():
        if not hasattr(ours, name):
            found.append(f"{theirs.__name__} has no {name}")
        elif inspect.isfunction(member):
            # Chainer calls forward() from a __call__ of its own, if a link has none.
            inherited = name == "__call__" and ours.__call__ is getattr(chainer.Link, name)
            found += differences(name, ours.forward if inherited else getattr(ours, name), member)
        elif not isinstance(member, property) and getattr(ours, name) != member:
            found.append(f"{theirs.__name__}.{name} is {getattr(ours, name)}, not {member}")
    return found


@pytest.mark.parametrize("name", public_modules())
def test_every_module_has_every_name_with_its_parameters(name):
    """What a script imports from ChainerMN it imports from here, and calls in the same way."""
    module, found = same_place(name), []
    for each, theirs in public_names(importlib.import_module(name)).items():
        ours = getattr(module, each, None)
        if ours is None:
            found.append(f"{module.__name__} has no {each}")
        elif each == "CommunicatorBase":  # what its methods take is in the test below
            found += [f"{each} has no {it}" for it in members(theirs) if not hasattr(ours, it)]
        elif inspect.isclass(theirs):
            assert inspect.isclass(ours)
            found += class_differences(ours, theirs)
            if not issubclass(theirs, Exception):
                found += differences(each, ours, theirs)
        else:
            found += differences(each, ours, theirs)
    assert not found


def test_submodules_are_there_after_the_import():
    """``chainermn.links.X`` needs no import of ``chainermn.links``."""
    source = inspect.getsource(chainermn)
    wanted = {
        name
        for name, value in vars(chainermn).items()
        if inspect.ismodule(value) and f"from chainermn import {name} " in source
    }
    assert len(wanted) == 8
    assert wanted <= set(chainer_dist.__all__)


def test_methods_of_communicators():
    """Calls written for the communicators of ChainerMN mean the same here."""
    base = importlib.import_module("chainermn.communicators.mpi_communicator_base")
    assert not class_differences(chainer_dist.CommunicatorBase, base.MpiCommunicatorBase)


def test_the_aliases_are_names_of_chainermn():
    """Each stands at the place where ChainerMN has it, and there are no others."""
    for name in MODULES:
        theirs = importlib.import_module(f"chainermn.communicators.{name}")
        ours = importlib.import_module(f"chainer_dist.communicators.{name}")
        assert ours.__name__ == f"chainer_dist.chainermn.{name}"
        assert getattr(chainer_dist.communicators, name) is ours
        assert all(hasattr(theirs, each) for each in ours.__all__)
    for path, names in NAMES.items():
        module, _, cls = path.partition(":")
        ours, theirs = (
            importlib.import_module(f"{package}.{module}")
            for package in ("chainer_dist", "chainermn")
        )
        for name in names:
            assert hasattr(getattr(theirs, cls) if cls else theirs, name)
            assert hasattr(getattr(ours, cls) if cls else ours, name)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = chainer_dist.communicators.nothing
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("chainer_dist.communicators.nothing")


def test_checkpointers_have_the_methods_of_chainermns(comm, tmp_path):
    """The object that create_multi_node_checkpointer returns is called by scripts."""
    kinds = []
    for package in (chainer_dist, chainermn):
        communicator = comm
        if package is chainermn:
            communicator = chainermn.create_communicator("naive", comm.mpi_comm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            kinds.append(
                type(package.create_multi_node_checkpointer("a", communicator, path=str(tmp_path)))
            )
    assert not class_differences(*kinds)


def test_exceptions_name_what_there_is():
    """No exception above outlives what it is about."""
    for name, inner in INNER_NAMES.items():
        assert inner <= set(vars(importlib.import_module(name)))


def test_nccl_without_gpus():
    """A script that asks whether there is NCCL is told that there is none."""
    from chainer_dist import nccl

    if nccl._available:
        for name in nccl._NAMES:
            assert getattr(nccl, name) is not None
        return
    assert not hasattr(nccl, "NcclCommunicator")
    with pytest.raises(AttributeError, match="get_unique_id needs a CuPy that was built with NCCL"):
        nccl.get_unique_id()
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = nccl.nothing


@pytest.mark.parametrize("name", ["get_n_iterations_for_one_epoch", "get_epoch_trigger"])
def test_deprecated_helpers_of_scatter(comm, name):
    """Scripts from before epoch triggers get the numbers that ChainerMN gives them."""
    theirs = chainermn.create_communicator("naive", comm.mpi_comm)
    extra = (3,) if name == "get_epoch_trigger" else ()
    for length in (1, 6, 7):
        results = []
        for package, communicator in ((chainermn, theirs), (chainer_dist, comm)):
            function = getattr(package.datasets.scatter, name)
            with pytest.warns(DeprecationWarning, match=name):
                results.append(function(*extra, range(length + comm.rank), 2, communicator))
        assert results[0] == results[1]


SUBMODULES = """
import importlib
import sys
import chainermn
import chainermn.functions as F
from chainermn.communicators import mpi_communicator_base
from chainermn.communicators.naive_communicator import NaiveCommunicator
from chainermn import nccl
import chainer_dist
assert chainermn is chainer_dist
assert F is chainer_dist.functions
assert nccl is chainer_dist.nccl
assert importlib.import_module("chainermn.links.n_step_rnn") is chainer_dist.links.n_step_rnn
assert issubclass(NaiveCommunicator, mpi_communicator_base.MpiCommunicatorBase)
try:
    import chainermn.nothing
except ModuleNotFoundError as error:
    assert error.name == "chainermn.nothing"
else:
    raise AssertionError
assert not [name for name, module in sys.modules.items() if "chainermn" in name.split(".")[:1]
            and "chainer_dist" not in (module.__file__ or "")]
"""


def run_script(script, folder, **environment):
    """Run a script in a process of its own."""
    path = folder / "script.py"
    path.write_text(textwrap.dedent(script), encoding="utf-8")
    return subprocess.run(
        [sys.executable, str(path)],
        env={**outside_of_mpi(), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def outside_of_mpi():
    """Return the environment without what a launcher of MPI puts there."""
    import os

    ours = ("PMI", "PMIX", "OMPI", "PRTE", "HYDRA", "MPI", "CHAINER_DIST")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)}


@pytest.mark.mpi_skip
class TestImportChainerMN:
    """``import chainermn`` means chainer_dist where that is asked for."""

    @pytest.mark.parametrize("first", ["", "import chainer\n"])
    def test_by_the_environment(self, tmp_path, first):
        """No line of a program has to change, in whatever order it imports."""
        done = run_script(first + SUBMODULES, tmp_path, CHAINER_DIST_AS_CHAINERMN="1")
        assert done.returncode == 0, done.stderr

    def test_by_a_function(self, tmp_path):
        """A second call does nothing."""
        call = "import chainer_dist\nchainer_dist.replace_chainermn()\n"
        done = run_script(call + call + SUBMODULES, tmp_path)
        assert done.returncode == 0, done.stderr

    def test_not_without_being_asked(self, tmp_path):
        """ChainerMN is ChainerMN otherwise; where it is there already, an error says what to do."""
        script = """
            import os
            import chainermn
            import chainer_dist

            assert chainermn is not chainer_dist
            try:
                chainer_dist.replace_chainermn()
            except RuntimeError as error:
                assert "ChainerMN itself was imported already, from " in str(error)
                assert "CHAINER_DIST_AS_CHAINERMN=1" in str(error)
            else:
                raise AssertionError
            assert os.environ["CHAINER_DIST_AS_CHAINERMN"] == "0"
        """
        done = run_script(script, tmp_path, CHAINER_DIST_AS_CHAINERMN="0")
        assert done.returncode == 0, done.stderr

    def test_too_late(self, tmp_path):
        """What the environment asks for is not left out in silence either."""
        script = """
            import os
            import chainermn
            os.environ["CHAINER_DIST_AS_CHAINERMN"] = "1"
            import chainer_dist
        """
        done = run_script(script, tmp_path)
        assert done.returncode == 1
        assert "RuntimeError: ChainerMN itself was imported already" in done.stderr

    @pytest.mark.parametrize(
        ("method", "by"), [("spawn", "function"), ("forkserver", "environment")]
    )
    def test_in_children(self, tmp_path, method, by):
        """Data-loader workers import the same; none of them starts MPI."""
        call = "import chainer_dist; chainer_dist.replace_chainermn()" if by == "function" else ""
        script = f"""
            import multiprocessing
            {call}

            class Sample:
                def __reduce__(self):
                    return look, ()

            def look(_=None):
                import sys
                import chainermn
                from chainermn.communicators import naive_communicator
                return chainermn.__name__, naive_communicator.__name__, "mpi4py.MPI" in sys.modules

            if __name__ == "__main__":
                with multiprocessing.get_context("{method}").Pool(1) as pool:
                    names = set(pool.map(look, range(4)))
                assert names == {{
                    ("chainer_dist", "chainer_dist.chainermn.naive_communicator", False)
                }}, names
        """
        environment = {"CHAINER_DIST_AS_CHAINERMN": "1"} if by == "environment" else {}
        done = run_script(script, tmp_path, **environment)
        assert done.returncode == 0, done.stderr


MpiCommunicatorBase = importlib.import_module(
    "chainer_dist.communicators.mpi_communicator_base"
).MpiCommunicatorBase


class OwnMean(MpiCommunicatorBase):
    """A communicator as programs for ChainerMN write them: one method, and something of their own."""

    def __init__(self, mpi_comm):
        super().__init__(mpi_comm)
        self.calls = []

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Average array by array, and note the model."""
        self.calls.append(model)
        for _, param in sorted(model.namedparams()):
            if param.grad is None and zero_fill and param.array is not None:
                param.grad = np.zeros_like(param.array)
            if param.grad is not None:
                self._multi_node_mean(None, param.grad)


class WithoutSuper(MpiCommunicatorBase):
    """One whose ``__init__`` does what ChainerMN's does."""

    def __init__(self, mpi_comm):
        self.mpi_comm = mpi_comm
        self._init_ranks()
        with self.config_scope():
            self.batched_copy = False

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Leave it to the class above."""
        super().multi_node_mean_grad(model, zero_fill)


class Watching(chainer_dist.communicators.shared_memory.communicator.SharedMemoryCommunicator):
    """The default communicator, with a look at what is averaged."""

    calls = None

    def multi_node_mean_grad(self, model, zero_fill=False):
        """Note the model."""
        self.calls = [*(self.calls or []), model]
        super().multi_node_mean_grad(model, zero_fill)


def make_model():
    """Return a model of which one layer is used and one is not."""
    model = chainer.Chain()
    with model.init_scope():
        model.used = L.Linear(3, 2, initialW=0.5)
        model.unused = L.Linear(3, 2, initialW=0.5)
    return model


def data_of(rank, step=0, count=4):
    """Return a batch of inputs."""
    random = np.random.RandomState([rank, step])
    return random.standard_normal((count, 3)).astype(np.float32)


@pytest.mark.parametrize("kind", [OwnMean, WithoutSuper, Watching])
def test_communicators_of_a_program(comm, kind):
    """Optimizers average by a communicator's own method; all else works with it as with any."""
    own = kind(comm.mpi_comm)
    assert isinstance(own, MpiCommunicatorBase)
    assert (own.rank, own.size, own.intra_size) == (comm.rank, comm.size, comm.intra_size)
    model, plain = make_model(), make_model()
    optimizer = chainer_dist.create_multi_node_optimizer(chainer.optimizers.MomentumSGD(), own)
    optimizer.setup(model)
    single = chainer.optimizers.MomentumSGD().setup(plain)
    for step in range(3):
        mine = data_of(comm.rank, step)
        everything = np.concatenate([data_of(rank, step) for rank in range(comm.size)])
        optimizer.update(lambda x: F.mean(model.used(x) ** 2), mine)
        single.update(lambda x: F.mean(plain.used(x) ** 2), everything)
    np.testing.assert_allclose(model.used.W.array, plain.used.W.array, rtol=1e-5)
    assert optimizer.sharded is False
    assert model.unused.W.grad is not None
    if kind is not WithoutSuper:
        assert own.calls == [model] * 3

    assert len(chainer_dist.scatter_dataset(range(2 * comm.size), own)) == 2
    evaluator = chainer.training.extensions.Evaluator(
        chainer.iterators.SerialIterator(data_of(comm.rank), 2, repeat=False, shuffle=False),
        model,
        eval_func=lambda x: chainer.report({"mean": F.mean(x)}),
    )
    score = chainer_dist.create_multi_node_evaluator(evaluator, own)(None)
    expected = np.mean([data_of(rank) for rank in range(comm.size)])
    np.testing.assert_allclose(next(iter(score.values())), expected, rtol=1e-4)
    assert functions.allreduce(own, np.ones(2)).array.tolist() == [comm.size] * 2
    bn = chainer_dist.links.MultiNodeBatchNormalization(3, own)
    everything = np.concatenate([data_of(rank) for rank in range(comm.size)])
    expected = L.BatchNormalization(3)(everything).array[4 * comm.rank : 4 * comm.rank + 4]
    np.testing.assert_allclose(bn(data_of(comm.rank)).array, expected, atol=1e-5)
    iterator = chainer_dist.iterators.create_multi_node_iterator(
        chainer.iterators.SerialIterator([1, 2], 1, shuffle=False), own
    )
    assert iterator.next() == [1]
    part = own.split(comm.rank % 2, comm.rank)
    assert type(part) is kind
    assert part.size == len(range(comm.rank % 2, comm.size, 2))
    if kind is OwnMean:
        assert part.calls == []
    part.finalize()
    own.finalize()


def test_options_that_would_pass_by_a_communicators_own_mean(comm):
    """They are refused, instead of averaging in another way."""
    own = OwnMean(comm.mpi_comm)
    for options in (
        {"double_buffering": True},
        {"compression": chainer_dist.compression.TopK(0.5)},
    ):
        with pytest.raises(
            ValueError, match="OwnMean averages gradients in a multi_node_mean_grad"
        ):
            chainer_dist.create_multi_node_optimizer(chainer.optimizers.SGD(), own, **options)
    optimizer = chainer_dist.create_multi_node_optimizer(
        chainer.optimizers.SGD(), Watching(comm.mpi_comm), sharded_update=True
    )
    model = make_model()
    optimizer.setup(model)
    with pytest.raises(ValueError, match="Watching has its own multi_node_mean_grad"):
        optimizer.update(lambda x: F.mean(model.used(x)), data_of(0))


def test_communicators_are_instances_of_chainermns_classes(any_comm):
    """Of the common one all, of the one of GPUs none, and of its own each."""
    assert isinstance(any_comm, MpiCommunicatorBase)
    gpus = chainer_dist.communicators.pure_nccl_communicator.PureNcclCommunicator
    assert not isinstance(any_comm, gpus)
    assert not isinstance("text", MpiCommunicatorBase)
    naive = chainer_dist.communicators.naive_communicator.NaiveCommunicator
    assert isinstance(any_comm, naive) is (any_comm.name == "naive")
    with pytest.raises(RuntimeError, match="NCCL is not available"):
        gpus(any_comm.mpi_comm)


def test_helpers_of_communicators(comm):
    """What ChainerMN's modules with an underscore give on CPUs is given here."""
    ours = chainer_dist.communicators._communication_utility
    assert ours.init_ranks(comm.mpi_comm)[:1] == (comm.rank,)
    everyone = comm.allgather_obj(ours.init_ranks(comm.mpi_comm))
    original = chainermn.communicators._communication_utility
    assert everyone == comm.allgather_obj(original.init_ranks(comm.mpi_comm))
    for length in (1, 7, 100):
        root = comm.size - 1
        got = ours.chunked_bcast_obj(
            {"a": np.arange(9)} if comm.rank == root else None, comm.mpi_comm, length, root
        )
        np.testing.assert_array_equal(got["a"], np.arange(9))
    with pytest.raises(Exception, match="pickle"):
        ours.chunked_bcast_obj((lambda: 0) if comm.rank == 0 else None, comm.mpi_comm)
    memory, original = (
        package.communicators._memory_utility for package in (chainer_dist, chainermn)
    )
    model = make_model()
    model.used.W.grad = np.ones_like(model.used.W.array)
    for zero_fill in (False, True):
        params = memory.extract_params_set_grad(model, zero_fill)
        assert [*map(id, params)] == [*map(id, original.extract_params_set_grad(model, zero_fill))]
        if not zero_fill:
            params = [param for param in params if param.grad is not None]
        assert memory.count_grad_elements(params, zero_fill) == original.count_grad_elements(
            params, zero_fill
        )
    model.cleargrads()
    model.used.W.grad = np.ones_like(model.used.W.array)
    packed = np.zeros(16, np.float64)

    class Buffer:
        def from_device(self, array, n_bytes, offset, stream):
            assert stream is None
            packed[offset // 8 :][: n_bytes // 8] = array.reshape(-1)

        def to_device(self, array, n_bytes, offset, stream):
            assert stream is None
            array[...] = packed[offset // 8 :][: n_bytes // 8].reshape(array.shape)

    params = memory.extract_params_set_grad(model, zero_fill=True)
    model.used.b.grad = None
    memory.pack_params(params, "grad", Buffer(), np.float64, zero_fill=True)
    assert packed.sum() == model.used.W.size
    packed *= 2
    memory.unpack_params(params, "grad", Buffer(), np.float64, zero_fill=True)
    assert (model.used.W.grad == 2).all()
    assert (model.used.b.grad == 0).all()
    assert model.used.b.grad.dtype == np.float32
    array = np.ones((2, 3)).T
    assert memory.array_to_buffer_object(array).flags.c_contiguous
    with pytest.raises(RuntimeError, match="DeviceMemory cannot be used"):
        memory.DeviceMemory()


def test_batched_copy(comm):
    """The value can be read and set as an attribute, as with ChainerMN."""
    assert comm.batched_copy is True
    with comm.config_scope():
        comm.batched_copy = False
    assert comm.get_config("batched_copy") is False
    comm.set_config("batched_copy", True)
    assert comm.batched_copy is True


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_mean_of_one_array(any_comm, dtype):
    """ChainerMN's private mean, which extensions and links of programs call."""
    array = np.full((3, 2), any_comm.rank, dtype)
    out = np.zeros_like(array)
    any_comm._multi_node_mean(array, out)
    np.testing.assert_array_equal(out, np.full((3, 2), (any_comm.size - 1) / 2, dtype))
    assert (array == any_comm.rank).all()
    any_comm._multi_node_mean(None, array)
    np.testing.assert_array_equal(array, out)
    with chainer.using_config("debug", True):
        array[0, 0] = np.inf if any_comm.rank == any_comm.size - 1 else 0
        with pytest.raises(ValueError, match="diverged after allreduce"):
            any_comm._multi_node_mean(None, array)
        if any_comm.size > 1:
            with pytest.raises(RankMismatchError, match="what is received"):
                any_comm._multi_node_mean(None, np.zeros(1 + any_comm.rank % 2, dtype))


class TestObjectsBesideMPI:
    """Objects and mpi4py's own messages on one communicator understand each other."""

    OBJECTS = (None, 1, {"a": np.arange(5)}, "x" * 100_000, np.ones((300, 300)), [b"", (1, 2.0)])

    def exchange(self, comm, send, receive):
        """Send to the right, receive from the left, and compare."""
        right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
        for obj in self.OBJECTS:
            request = send(obj, right)
            np.testing.assert_equal(receive(left), obj)
            request.wait()

    def test_received_by_mpi(self, comm):
        """``mpi_comm.recv`` gets what was sent by ``send_obj``, and in order with MPI's own."""
        self.exchange(comm, comm.isend_obj, lambda source: comm.mpi_comm.recv(source=source))

    def test_sent_by_mpi(self, comm):
        """``recv_obj`` gets what was sent by ``mpi_comm.send``."""
        self.exchange(
            comm,
            comm.mpi_comm.isend,
            comm.recv_obj,
        )

    def test_more_than_one_message(self, comm, monkeypatch):
        """Objects too large for one message still arrive, between small ones, from any source."""
        from mpi4py import MPI

        monkeypatch.setattr(objects, "post", functools.partial(objects.post, limit=1000))
        status = MPI.Status()
        self.exchange(
            comm, comm.isend_obj, lambda _: comm.recv_obj(MPI.ANY_SOURCE, status, MPI.ANY_TAG)
        )
        assert status.Get_source() == (comm.rank - 1) % comm.size

    def test_broadcasts_in_turn(self, comm):
        """Collectives of both kinds can follow one another."""
        for round_ in range(3):
            assert comm.bcast_obj({round_: None}) == {round_: None}
            assert comm.mpi_comm.bcast(round_) == round_
            assert comm.mpi_comm.allreduce(1) == comm.size

    def test_an_object_that_cannot_be_pickled(self, comm):
        """Whoever receives by ``recv_obj`` is told."""
        if comm.size == 1:
            pytest.skip("needs two ranks")
        if comm.rank == 0:
            with pytest.raises(Exception, match="pickle"):
                comm.send_obj(lambda: 0, 1)
        elif comm.rank == 1:
            with pytest.raises(Exception, match=r"rank 0: .*pickle"):
                comm.recv_obj(0)


class Listed:
    """Something that lists parameters and is no link."""

    __slots__ = ("params",)

    def __init__(self, params):
        self.params = params

    def namedparams(self):
        """Yield names and parameters, in no particular order."""
        yield from sorted(self.params.items(), reverse=True)


@pytest.mark.parametrize("kind", [chainer.Parameter, chainer.Variable])
def test_anything_with_named_parameters(any_comm, kind):
    """Communicators average and broadcast what lists parameters, as with ChainerMN."""
    params = {
        name: kind(np.full((2, 3), any_comm.rank + offset, np.float32))
        for offset, name in enumerate(("/a", "/b"))
    }
    listed = Listed(params)
    for param in params.values():
        param.grad = np.full((2, 3), any_comm.rank, np.float32)
    any_comm.multi_node_mean_grad(listed)
    for param in params.values():
        np.testing.assert_array_equal(param.grad, np.full((2, 3), (any_comm.size - 1) / 2))
    params["/a"].grad = None
    with pytest.warns(DeprecationWarning, match="allreduce_grad"):
        any_comm.allreduce_grad(listed, zero_fill=True)
    assert (params["/a"].grad == 0).all()
    any_comm.bcast_data(listed)
    for offset, param in enumerate(params.values()):
        np.testing.assert_array_equal(param.array, np.full((2, 3), offset))


class FlatRule:
    """An optimizer of another library: it knows arrays, in one buffer for all gradients."""

    def __init__(self):
        self.defaults = {"rate": 0.1}
        self.steps = 0

    def hold(self, params):
        """Take arrays, and give them gradients that are views of one buffer."""
        self.params = [param.array for param in params]
        self.buffer = np.zeros(sum(param.size for param in params), np.float32)
        ends = np.cumsum([param.size for param in params])
        self.views = [
            part.reshape(param.shape) for param, part in zip(params, np.split(self.buffer, ends))
        ]

    def step(self):
        """Update by what is in the buffer."""
        self.steps += 1
        for param, view in zip(self.params, self.views):
            param[...] -= self.defaults["rate"] * view


class Wrapper:
    """The surface that adapters of foreign optimizers give them: setup, update, and delegation."""

    def __init__(self, optimizer):
        super().__setattr__("optimizer", optimizer)

    def update(self, lossfun=None, *args, **kwds):
        """Step, when gradients are there."""
        assert lossfun is None
        del args, kwds
        self.optimizer.step()

    def setup(self, link):
        """Set the target."""
        self.target = link
        return self

    def __getattr__(self, name):
        return getattr(self.optimizer, name)

    def __setattr__(self, name, value):
        setattr(self.optimizer, name, value)


class TestForeignOptimizers:
    """Optimizers that are not Chainer's are wrapped as ChainerMN wraps them."""

    def prepared(self, comm):
        """Return a model, its optimizer, and the multi-node optimizer."""
        model, rule = make_model(), FlatRule()
        model.used.W.array[...] += comm.rank
        optimizer = chainer_dist.create_multi_node_optimizer(Wrapper(rule), comm)
        assert optimizer.setup(model) is optimizer
        rule.hold([param for _, param in sorted(model.namedparams())])
        return model, rule, optimizer

    def expected(self, comm, steps):
        """Return the weight after some steps of one process on everything."""
        model = make_model()
        single = chainer.optimizers.SGD(lr=0.1).setup(model)
        for step in range(steps):
            everything = np.concatenate([data_of(rank, step) for rank in range(comm.size)])
            single.update(lambda x: F.mean(model.used(x) ** 2), everything)
        return model.used.W.array

    def test_gradients_that_are_there(self, any_comm):
        """No update is lost, and the means are in the very arrays that the optimizer holds."""
        model, rule, optimizer = self.prepared(any_comm)
        assert (rule.target, optimizer.target) == (model, model)
        for step in range(3):
            model.cleargrads()
            F.mean(model.used(data_of(any_comm.rank, step)) ** 2).backward()
            for (_, param), view in zip(sorted(model.namedparams()), rule.views):
                view[...] = 0 if param.grad is None else param.grad
                param.grad = view
            optimizer.update()
            for (_, param), view in zip(sorted(model.namedparams()), rule.views):
                assert param.grad is view
        assert rule.steps == 3
        np.testing.assert_allclose(model.used.W.array, self.expected(any_comm, 3), rtol=1e-5)

    def test_a_loss_function(self, comm):
        """It is called once in each update; attributes go to the wrapped optimizer."""
        model, rule, optimizer = self.prepared(comm)
        calls = []

        def loss(x):
            calls.append(len(x))
            return F.mean(model.used(x) ** 2)

        optimizer.rate = 3
        assert rule.rate == 3
        assert optimizer.defaults is rule.defaults

        def step():
            rule.steps += 1
            for (_, param), array in zip(sorted(model.namedparams()), rule.params):
                array[...] -= rule.defaults["rate"] * param.grad

        rule.step = step
        for number in range(2):
            optimizer.update(loss, data_of(comm.rank, number))
        assert (calls, rule.steps) == ([4, 4], 2)
        np.testing.assert_allclose(model.used.W.array, self.expected(comm, 2), rtol=1e-5)

    def test_a_wrapper_that_passes_on_everything(self, comm):
        """What wraps one of Chainer's optimizers, and has all it has, keeps all options."""

        class Counting:
            def __init__(self, optimizer):
                self.optimizer, self.calls = optimizer, 0

            def update(self, lossfun=None, *args, **kwds):
                self.calls += 1
                self.optimizer.update(lossfun, *args, **kwds)

            def __getattr__(self, name):
                return getattr(self.__dict__["optimizer"], name)

        model, counting = make_model(), Counting(chainer.optimizers.SGD(lr=0.1))
        optimizer = chainer_dist.create_multi_node_optimizer(counting, comm, accumulate_steps=1)
        optimizer.setup(model)
        for step in range(2):
            optimizer.update(lambda x: F.mean(model.used(x) ** 2), data_of(comm.rank, step))
        assert (counting.calls, optimizer.t) == (2, 2)
        np.testing.assert_allclose(model.used.W.array, self.expected(comm, 2), rtol=1e-5)

    @pytest.mark.parametrize("gives_loss", [True, False])
    def test_layers_that_get_their_shape_late(self, comm, gives_loss):
        """Their first gradients are of equal values, as in one process, and no update is lost."""

        def make():
            return chainer.Sequential(L.Linear(3, 4), F.tanh, L.Linear(None, 2))

        def loss(x, model):
            return F.mean(model(x) ** 2)

        np.random.seed(7 + comm.rank)
        model, rule = make(), FlatRule()

        def step():
            rule.steps += 1
            for param in model.params():
                param.array[...] -= rule.defaults["rate"] * param.grad

        rule.step = step
        optimizer = chainer_dist.create_multi_node_optimizer(Wrapper(rule), comm)
        optimizer.setup(model)
        for number in range(3):
            x = data_of(comm.rank, number)
            if gives_loss:
                optimizer.update(lambda x: loss(x, model), x)
            else:
                model.cleargrads()
                loss(x, model).backward()
                optimizer.update()
        assert rule.steps == 3
        assert optimizer.target_params == [
            (name, True) for name in ("/0/W", "/0/b", "/1/W", "/1/b")
        ]
        assert not optimizer.is_changed(model)

        np.random.seed(7)
        truth = make()
        single = chainer.optimizers.SGD(lr=0.1).setup(truth)
        for number in range(3):
            everything = np.concatenate([data_of(rank, number) for rank in range(comm.size)])
            single.update(lambda x: loss(x, truth), everything)
        for mine, theirs in zip(model.params(), truth.params()):
            np.testing.assert_allclose(mine.array, theirs.array, rtol=1e-4, atol=1e-6)

    def test_initializers_that_draw_from_elsewhere(self, comm):
        """Gradients of unequal values are an error on every rank, and nothing is updated."""
        own = np.random.RandomState(comm.rank)
        model, rule = make_model(), FlatRule()
        with model.init_scope():
            model.late = L.Linear(
                None, 2, initialW=lambda w: w.__setitem__(..., own.rand(*w.shape))
            )
        optimizer = chainer_dist.create_multi_node_optimizer(Wrapper(rule), comm)
        optimizer.setup(model)
        if comm.size == 1:
            return
        with pytest.raises(
            RankMismatchError, match="rank 1: /late/W had other values than on rank 0"
        ):
            optimizer.update(lambda x: F.mean(model.late(model.used(x))), data_of(comm.rank))
        assert rule.steps == 0
        weights = comm.allgather_obj(model.late.W.array)
        assert all((weight == weights[0]).all() for weight in weights)

    def test_arrays_that_are_replaced(self, comm):
        """They are rank 0's before the next gradient is computed."""
        model, rule, optimizer = self.prepared(comm)
        rule.step = lambda: None
        seen = []

        def loss(x):
            seen.append(model.used.W.array.copy())
            return F.mean(model.used(x) ** 2)

        for number in range(3):
            model.used.W.array = np.full_like(model.used.W.array, number + comm.rank)
            optimizer.update(loss, data_of(comm.rank, number))
        assert [float(weight.ravel()[0]) for weight in seen] == [0.0, 1.0, 2.0]

    def test_a_target_that_is_no_link(self, comm):
        """It lists parameters, and some may wait for their shape."""
        params = {
            name: chainer.Parameter(np.full(2, comm.rank, np.float32)) for name in ("/a", "/b")
        }
        params["/c"] = chainer.Parameter(chainer.initializers.Normal())
        optimizer = chainer_dist.create_multi_node_optimizer(Wrapper(FlatRule()), comm)
        optimizer.actual_optimizer.optimizer.step = lambda: None
        optimizer.setup(Listed(params))
        for each in (params["/a"], params["/b"]):
            np.testing.assert_array_equal(each.array, np.zeros(2))
            each.grad = np.full(2, comm.rank, np.float32)
        params["/c"].initialize((3,))
        params["/c"].grad = np.full(3, comm.rank, np.float32)
        optimizer.update()
        for each in params.values():
            np.testing.assert_allclose(each.grad, (comm.size - 1) / 2)
        values = comm.allgather_obj(params["/c"].array)
        assert all((value == values[0]).all() for value in values)

    def test_copies(self, comm):
        """A copy has attributes of its own, and one without a communicator asks for it."""
        actual = types.SimpleNamespace(target=chainer.Link(), update=print)
        optimizer = chainer_dist.create_multi_node_optimizer(actual, comm)
        twin = copy.copy(optimizer)
        twin.zero_fill = False
        twin.rate = 3
        assert (optimizer.zero_fill, hasattr(optimizer, "rate")) == (True, False)
        again = pickle.loads(pickle.dumps(optimizer))
        with pytest.raises(RuntimeError, match="has no communicator"):
            again.update()

    def test_options_of_chainers_optimizers(self, comm):
        """They are refused, each by its name."""
        for name, value in (
            ("double_buffering", True),
            ("sharded_update", True),
            ("mean_grad", True),
            ("share_parameters", True),
            ("accumulate_steps", 2),
            ("overlap", True),
        ):
            with pytest.raises(ValueError, match=f"{name} is for Chainer's optimizers"):
                chainer_dist.create_multi_node_optimizer(Wrapper(FlatRule()), comm, **{name: value})

    def test_models_that_differ(self, comm):
        """Ranks whose models differ raise the same error."""
        if comm.size == 1:
            pytest.skip("needs two ranks to differ")
        model = chainer.Sequential(L.Linear(3, 2 if comm.rank else 1))
        optimizer = chainer_dist.create_multi_node_optimizer(Wrapper(FlatRule()), comm)
        with pytest.raises(RankMismatchError, match="rank 1: /0/W"):
            optimizer.setup(model)


def test_optimizers_by_chainermns_names(comm):
    """Their classes, and what programs ask them about the target."""
    plain, buffered = (
        chainer_dist.create_multi_node_optimizer(
            chainer.optimizers.SGD(), comm, double_buffering=double_buffering
        )
        for double_buffering in (False, True)
    )
    assert isinstance(plain, chainer_dist.optimizers._MultiNodeOptimizer)
    assert not isinstance(plain, chainer_dist.optimizers._DoubleBufferingOptimizer)
    assert isinstance(buffered, chainer_dist.optimizers._DoubleBufferingOptimizer)
    optimizer = chainer_dist.optimizers._MultiNodeOptimizer(chainer.optimizers.SGD(), comm, True)
    assert optimizer.target_params == []
    model = chainer.Sequential(L.Linear(3, 2), L.Linear(None, 1, nobias=True))
    optimizer.setup(model)
    names = ["/0/W", "/0/b", "/1/W"]
    assert optimizer.target_params == [(name, name != "/1/W") for name in names]
    assert optimizer.is_changed(model) is False
    listed = sorted(model.namedparams())
    assert optimizer.is_changed(model, listed) is False
    optimizer.update(lambda x: F.mean(model(x)), data_of(comm.rank))
    assert optimizer.target_params == [(name, True) for name in names]
    assert optimizer.is_changed(model) is False
    model.append(L.Linear(1, 1))
    assert optimizer.is_changed(model) is True
    assert optimizer.is_changed(model, listed) is True


@pytest.mark.parametrize("kind", ["naive", "shared_memory"])
@pytest.mark.parametrize("options", [{}, {"accumulate_steps": 2}, {"double_buffering": True}])
def test_debug_mode_looks_at_averages(kind, options):
    """A sum that is too large is found after the exchange, before any parameter changes by it."""
    with chainer_dist.create_communicator(kind) as comm:
        model = make_model()
        optimizer = chainer_dist.create_multi_node_optimizer(
            chainer.optimizers.SGD(), comm, **options
        )
        optimizer.setup(model)
        optimizer.update(lambda x: F.mean(model.used(x)), data_of(comm.rank))
        before = model.used.W.array.copy()
        with chainer.using_config("debug", True):

            def update():
                for _ in range(3):  # as many as there are at most until the average is used
                    model.cleargrads()
                    grad = np.full((2, 3), 3e38, np.float32)
                    model.used.W.grad = grad if comm.size > 1 else grad * np.float32(10)
                    optimizer.update()

            np.seterr(over="ignore")
            try:
                with pytest.raises(NonFiniteGradientError, match="gradients of /used/W"):
                    update()
            finally:
                np.seterr(over="warn")
        assert np.isfinite(model.used.W.array).all()
        if not options:
            np.testing.assert_array_equal(model.used.W.array, before)


class TestClassesOfFunctions:
    """Objects of the classes that ChainerMN's functions are made of, called as programs call them."""

    def test_collectives(self, comm):
        """Each gives what the function gives, to the same gradients."""
        classes = chainer_dist.functions.collective_communication
        root = comm.size - 1
        x = chainer.Variable(np.full(3, comm.rank + 1.0, np.float32))
        ys = classes.AllGather(comm)(x)
        ys = ys if isinstance(ys, tuple) else (ys,)  # ChainerMN's classes return one alone
        assert [y.array[0] for y in ys] == [rank + 1 for rank in range(comm.size)]
        ys = classes.AllToAll(comm)(*[x * (rank + 1) for rank in range(comm.size)])
        ys = ys if isinstance(ys, tuple) else (ys,)
        assert [y.array[0] for y in ys] == [(r + 1) * (comm.rank + 1) for r in range(comm.size)]
        y = classes.Bcast(comm, root)(*([x] if comm.rank == root else []))
        assert (y.array == comm.size).all()
        assert isinstance(y.creator, classes.Bcast)
        y.grad = np.ones_like(y.array)
        y.backward()
        if comm.rank == root:
            np.testing.assert_array_equal(x.grad, np.full(3, comm.size))
        gathered = classes.Gather(comm, root)(x)
        if comm.rank == root:
            gathered = gathered if isinstance(gathered, tuple) else (gathered,)
            assert [y.array[0] for y in gathered] == [rank + 1 for rank in range(comm.size)]
        xs = [x * (rank + 1) for rank in range(comm.size)] if comm.rank == root else []
        y = classes.Scatter(comm, root)(*xs)
        assert (y.array == comm.size * (comm.rank + 1)).all()

    def test_messages(self, comm):
        """A message and its gradient go to the next rank and back."""
        if comm.size == 1:
            pytest.skip("needs two ranks")
        classes = chainer_dist.functions.point_to_point_communication
        if comm.rank == 0:
            x = chainer.Variable(np.arange(3, dtype=np.float32))
            dummy = chainer.Variable(np.empty(0, np.float32))
            delegate = classes.Send(comm, peer_rank=1, peer_tag=3)(x, dummy)
            assert isinstance(delegate.creator, classes.Send)
            delegate.backward()
            np.testing.assert_array_equal(x.grad, [2, 2, 2])
        elif comm.rank == 1:
            y = classes.Recv(comm, peer_rank=0, peer_tag=3)()
            assert isinstance(y.creator, classes.Recv)
            F.sum(y * 2).backward()
        with pytest.raises(ValueError, match="this rank itself"):
            classes.Recv(comm, comm.rank, 0)()

    def test_pseudo_connect(self):
        """The delegate comes first, and gets zeros."""
        delegate = chainer.Variable(np.empty(0, np.float32))
        x = chainer.Variable(np.ones(2, np.float32))
        kind = chainer_dist.functions.pseudo_connect.__globals__["PseudoConnect"]
        (y,) = kind().apply((delegate, x))
        F.sum(y).backward()
        assert delegate.grad.shape == (0,)
        assert x.grad.tolist() == [1, 1]


def test_selector_of_batch_normalization(comm):
    """Chainer's own function, with the statistics of all ranks, to the gradients of one process."""
    selector = chainer_dist.functions.batch_normalization.MultiNodeBNImplSelector(comm, "mpi")
    gamma, beta = np.full(3, 2, np.float32), np.ones(3, np.float32)
    mine = chainer.Variable(data_of(comm.rank) + 100)
    everything = chainer.Variable(
        np.concatenate([data_of(rank) + 100 for rank in range(comm.size)])
    )
    ys = [
        BatchNormalization(
            2e-5, np.zeros(3, np.float32), np.ones(3, np.float32), 0.9, **more
        ).apply((x, chainer.Variable(gamma), chainer.Variable(beta)))[0]
        for x, more in ((mine, {"impl_selector": selector}), (everything, {}))
    ]
    rows = slice(4 * comm.rank, 4 * comm.rank + 4)
    np.testing.assert_allclose(ys[0].array, ys[1].array[rows], atol=1e-3)
    weights = np.arange(12, dtype=np.float32).reshape(4, 3) * (comm.rank + 1)
    all_weights = np.concatenate(comm.allgather_obj(weights))
    F.sum(ys[0] * weights).backward()
    F.sum(ys[1] * all_weights).backward()
    np.testing.assert_allclose(mine.grad, everything.grad[rows], atol=2e-2)

"""Every public name of ChainerMN is here, at the same place, and takes the same arguments."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings

import chainer
import pytest

import chainer_dist

chainermn = pytest.importorskip("chainermn")

# Modules whose names are not promised, and why.
INNER_MODULES = {
    "chainermn.communicators.communicator_base": "is compared as chainermn.CommunicatorBase",
    "chainermn.communicators.mpi_communicator_base": "is compared by its methods, below",
    "chainermn.communicators.dummy_communicator": "is asked for by its name, 'dummy'",
    "chainermn.communicators.flat_communicator": "is asked for by its name, 'flat'",
    "chainermn.communicators.naive_communicator": "is asked for by its name, 'naive'",
    "chainermn.communicators.non_cuda_aware_communicator": "needs GPUs",
    "chainermn.communicators.pure_nccl_communicator": "needs GPUs",
    "chainermn.functions.batch_normalization": "what MultiNodeBatchNormalization is made of",
}

# The classes of which functions are made, in ChainerMN's old style of functions.
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
    return ["chainermn"] + [
        name
        for name in found
        if name not in INNER_MODULES and not name.rpartition(".")[2].startswith("_")
    ]


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
    for name in INNER_MODULES:
        importlib.import_module(name)
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

"""Paths and names that programs import from ChainerMN, and ``import chainermn`` itself.

Nothing else in the package needs what is here: modules that exist for their names only, and a table of
names that modules of chainer_dist have besides their own. All of it is below ``chainer_dist`` at the
place where ChainerMN has it, so that a program needs no more than another first line.

With :func:`~chainer_dist.replace_chainermn`, or ``CHAINER_DIST_AS_CHAINERMN=1`` in the environment, it
does not even need that: ``import chainermn`` then means chainer_dist.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
from typing import TYPE_CHECKING, Any

from chainer_dist import _environment

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["MODULES", "NAMES", "replace_chainermn"]


_OURS, _THEIRS = "chainer_dist", "chainermn"

#: Modules of this package, which are found below ``chainer_dist.communicators`` as well.
MODULES = (
    "_communication_utility",
    "_memory_utility",
    "dummy_communicator",
    "flat_communicator",
    "mpi_communicator_base",
    "naive_communicator",
    "non_cuda_aware_communicator",
    "pure_nccl_communicator",
)

#: Names that modules, and classes in modules, have as in ChainerMN, and what they stand for.
NAMES = {
    "datasets.scatter": {"_scatter_index": "chainermn._names:_scatter_index"},
    "extensions.checkpoint": {"_CheckpointStats": "chainermn._names:_CheckpointStats"},
    "extensions.checkpoint:_MultiNodeCheckpointer": {
        "_filenames": "chainermn._names:_filenames",
        "_parse_filenames": "chainermn._names:_parse_filenames",
    },
    "functions.batch_normalization": {
        "MultiNodeBNImplSelector": "chainermn._names:MultiNodeBNImplSelector",
        "_MpiImpl": "chainermn._names:_MpiImpl",
    },
    "functions.collective_communication": {
        "AllGather": "functions._collective_nodes:AllGather",
        "AllToAll": "functions._collective_nodes:AllToAll",
        "Bcast": "functions._collective_nodes:Bcast",
        "Gather": "functions._collective_nodes:Gather",
        "Scatter": "functions._collective_nodes:Scatter",
    },
    "functions.point_to_point_communication": {
        "Recv": "functions.point_to_point_communication:_Recv",
        "Send": "functions.point_to_point_communication:_Send",
    },
    "functions.pseudo_connect": {"PseudoConnect": "functions.pseudo_connect:_PseudoConnect"},
    "iterators.multi_node_iterator": {
        "_build_ctrl_msg": "chainermn._names:_build_ctrl_msg",
        "_parse_ctrl_msg": "chainermn._names:_parse_ctrl_msg",
    },
    "optimizers": {
        "_DoubleBufferingOptimizer": "optimizers.double_buffering:DoubleBufferingOptimizer",
        "_MultiNodeOptimizer": "optimizers.multi_node_optimizer:MultiNodeOptimizer",
    },
}


class _Finder:
    """A meta-path finder for modules that have another name; it is its own loader."""

    @classmethod
    def find_spec(cls, name: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        """Return a specification if the name stands for a module that is there."""
        target = cls.target(name)
        if target is None or importlib.util.find_spec(target) is None:
            return None
        return importlib.machinery.ModuleSpec(name, cls, is_package=True)  # type: ignore[arg-type]

    @staticmethod
    def target(name: str) -> str | None:
        """Return the own name of the module that ``name`` stands for, or None."""
        raise NotImplementedError

    @staticmethod
    def create_module(_: importlib.machinery.ModuleSpec) -> None:
        """Leave it to Python to make a module, which is given away again."""

    @classmethod
    def exec_module(cls, module: ModuleType) -> None:
        """Put the very module that its name stands for in the place of the new one."""
        target = cls.target(module.__name__)
        assert target is not None  # noqa: S101 - otherwise there was no specification
        sys.modules[module.__name__] = importlib.import_module(target)


class _CommunicatorsFinder(_Finder):
    """Finds the modules of this package below ``chainer_dist.communicators``."""

    @staticmethod
    def target(name: str) -> str | None:
        parent, _, last = name.rpartition(".")
        is_here = parent == f"{_OURS}.communicators" and last in MODULES
        return f"{__name__}.{last}" if is_here else None

    @classmethod
    def exec_module(cls, module: ModuleType) -> None:
        """Start MPI as well, as the import of ChainerMN's does: programs go on with ``mpi4py.MPI``."""
        if multiprocessing.parent_process() is None:  # data-loader workers have no use for it
            importlib.import_module("mpi4py.MPI")
        super().exec_module(module)


class _ChainerMNFinder(_Finder):
    """Finds chainer_dist, and what is below it, under the name ``chainermn``."""

    @staticmethod
    def target(name: str) -> str | None:
        top, dot, below = name.partition(".")
        return f"{_OURS}{dot}{below}" if top == _THEIRS else None


def replace_chainermn() -> None:
    """Let ``import chainermn`` mean chainer_dist in this process and in those it starts. Local.

    To be called before anything imports ``chainermn``; ChainerMN itself, which ships inside Chainer,
    is not imported. Submodules are replaced too, and any way to import them works: ``import
    chainermn.functions as F``, ``from chainermn.communicators import mpi_communicator_base``,
    ``importlib``. A second call does nothing. Processes that start later, data-loader workers for
    instance, find ``CHAINER_DIST_AS_CHAINERMN=1`` in their environment; set by hand it does without
    this call, and without any change to a program::

        CHAINER_DIST_AS_CHAINERMN=1 mpiexec -n 4 python train.py

    Raises:
        RuntimeError: If ChainerMN itself was imported before.
    """
    there = sys.modules.get(_THEIRS)
    if there is not None and there is not sys.modules[_OURS]:
        raise RuntimeError(
            f"ChainerMN itself was imported already, from {getattr(there, '__file__', None)}, so "
            "`import chainermn` cannot mean chainer_dist any more: call "
            "chainer_dist.replace_chainermn() before anything imports chainermn, or start the "
            f"program with {_environment.AS_CHAINERMN}=1 in the environment"
        )
    os.environ[_environment.AS_CHAINERMN] = "1"
    if _ChainerMNFinder not in sys.meta_path:
        sys.meta_path.insert(0, _ChainerMNFinder)


def _replace_if_asked() -> None:
    if os.environ.get(_environment.AS_CHAINERMN, "0") not in ("0", ""):
        replace_chainermn()


def _late_module(name: str) -> ModuleType:
    """Import a module when it is asked for: ChainerMN has some of them from when they were needed."""
    if name not in MODULES:
        raise AttributeError(f"module '{_OURS}.communicators' has no attribute {name!r}")
    return importlib.import_module(f"{_OURS}.communicators.{name}")


def _add_modules_and_names() -> None:
    sys.meta_path.append(_CommunicatorsFinder)
    vars(importlib.import_module(f"{_OURS}.communicators"))["__getattr__"] = _late_module
    for path, names in NAMES.items():
        for name, target in names.items():
            setattr(_find(path), name, _find(target))


def _find(target: str) -> Any:
    path, _, name = target.partition(":")
    module = importlib.import_module(f"{_OURS}.{path}")
    return getattr(module, name) if name else module


_add_modules_and_names()
_replace_if_asked()

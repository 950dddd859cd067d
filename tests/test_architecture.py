"""What the package promises about itself: its layers, its public names, its docstrings."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re

import pytest

import chainer_dist
from architecture import MODULES, ROOT, imports, layer_of
from chainer_dist import _environment

pytestmark = pytest.mark.mpi_skip  # nothing here knows of ranks


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_layers_import_downward_only(name):
    """A module knows nothing of the layers above it."""
    own = layer_of(name)
    for each in imports(name):
        assert layer_of(each) <= own, f"{name} imports {each} from above"


def test_no_modules_import_one_another():
    """Each module can be read without those that come after it: imports make no circle."""
    graph = {name: imports(name) for name in MODULES if name != "__init__"}
    reached = {name: set(below) for name, below in graph.items()}
    for between in graph:
        for name in graph:
            if between in reached[name]:
                reached[name] |= reached[between]
    circles = [
        {other for other in reached[name] if name in reached[other]}
        for name in graph
        if name in reached[name]
    ]
    assert circles == []


def test_public_names_are_sorted_and_there():
    """``__all__`` is the whole public surface."""
    public = chainer_dist.__all__
    assert public == sorted(public)
    for name in public:
        assert hasattr(chainer_dist, name)
    found = {
        name
        for name, value in vars(chainer_dist).items()
        if not name.startswith("_") and (not inspect.ismodule(value) or name in public)
    }
    assert found | {"__version__"} == set(public)


def test_everything_public_is_documented():
    """Modules, classes, functions and methods all say what they do."""
    silent = []
    for info in pkgutil.walk_packages([str(ROOT)], "chainer_dist."):
        if info.name.endswith(".torch_models") and not importlib.util.find_spec("torch"):
            continue
        module = importlib.import_module(info.name)
        silent += [] if module.__doc__ else [info.name]
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != info.name:
                continue
            if inspect.isfunction(value) or inspect.isclass(value):
                silent += [] if value.__doc__ else [f"{info.name}.{name}"]
            if inspect.isclass(value):
                silent += [
                    f"{info.name}.{name}.{attribute}"
                    for attribute, member in vars(value).items()
                    if not attribute.startswith("_")
                    and (callable(member) or isinstance(member, property))
                    and not member.__doc__
                ]
    assert not silent


def test_environment_variables_are_written_once():
    """And each of them is known, so that a misspelt one can be told from it."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and re.fullmatch(
                "CHAINER_DIST_[A-Z_]+", str(node.value)
            ):
                found.setdefault(node.value, set()).add(path.relative_to(ROOT).parts[0])
    assert set(found) == set(_environment._NAMES)
    # What Python runs at its start stands alone, and kernels know nothing of the rest of the package.
    alone = {"_environment.py", "_startup.py", "_compat.py", "kernels"}
    assert {name: where - alone for name, where in found.items() if where - alone} == {}


def test_modules_stay_small():
    """A module that grows to 350 lines has a second subject, which belongs to a module of its own."""
    lines = {
        name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in MODULES.items()
    }
    assert {name: number for name, number in lines.items() if number >= 350} == {}


def test_classes_stay_small():
    """A class that grows beyond these limits does a second thing, or says in its docstring why not.

    In ``optimizers`` and ``updates`` there is no reason for it.
    """
    large = []
    for name, path in MODULES.items():
        is_excused = name.partition(".")[0] not in {"optimizers", "updates"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                attributes = {
                    each.attr
                    for each in ast.walk(node)
                    if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
                    if isinstance(each.value, ast.Name) and each.value.id == "self"
                }
                reason = (ast.get_docstring(node) or "").partition("More than ")[2]
                reason = reason.partition(":")[0] if is_excused else ""
                limits = {
                    "fifteen methods": len(methods) > 15,
                    "ten attributes": len(attributes) > 10,
                }
                if any(is_exceeded != (limit in reason) for limit, is_exceeded in limits.items()):
                    large.append(
                        f"{node.name}: {len(methods)} methods, {len(attributes)} attributes"
                    )
    assert not large

"""What the package promises about itself: its layers, its public names, its docstrings."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path

import pytest

import chainer_dist
from chainer_dist import _environment

ROOT = Path(chainer_dist.__file__).parent

# Lowest first; a module imports from its own layer and those below.
LAYERS = [
    [
        "_version",
        "_arguments",
        "_files",
        "_connections",
        "_environment",
        "_progress",
        "_compat",
        "_startup",
        "_typing",
        "errors",
        "_threads",
        "_allocator",
        "global_except_hook",
        "testing",
        "nccl",
        "kernels",
    ],
    ["collectives"],
    ["parameters"],
    ["communicators"],
    ["compression"],
    ["exchange", "functions", "watch"],
    ["updates", "links"],
    ["optimizers", "datasets", "iterators"],
    ["serialization"],
    ["extensions"],
    ["updaters", "checkpoints", "parallel"],
    ["chainermn", "integrations"],
    ["launcher", "scaling", "__main__"],
]
# ChainerMN has these two as methods of the communicator; they call the exchange when called.
DOORS = {("communicators/communicator_base.py", "exchange")}


def layer_of(part):
    """Return the number of a module's layer, given its name below the package."""
    (found,) = [n for n, names in enumerate(LAYERS) if part in names]
    return found


def imported_parts(tree):
    """Yield the first part, below the package, of every import outside of type checking."""
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("chainer_dist"):
            below = (node.module or "").split(".")[1:]
            yield from [below[0]] if below else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("chainer_dist."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize(
    "path",
    [p for p in sorted(ROOT.rglob("*.py")) if p != ROOT / "__init__.py"],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_layers_import_downward_only(path):
    """A module knows nothing of the layers above it."""
    relative = path.relative_to(ROOT)
    own = layer_of(relative.parts[0].removesuffix(".py"))
    for part in imported_parts(ast.parse(path.read_text(encoding="utf-8"))):
        if (relative.as_posix(), part) not in DOORS:
            assert layer_of(part) <= own, f"{relative} imports {part} from above"


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
    # The start-up file stands alone, and kernels know nothing of the rest of the package.
    alone = {"_environment.py", "_startup.py", "kernels"}
    assert {name: where - alone for name, where in found.items() if where - alone} == {}


@pytest.mark.parametrize("package", ["optimizers", "updates"])
def test_modules_and_classes_stay_small(package):
    """What grows beyond these is a second thing, and belongs to a file or a class of its own."""
    large = []
    for path in sorted((ROOT / package).rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        large += [path.name] if len(text.splitlines()) > 350 else []
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ClassDef):
                methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
                attributes = {
                    each.attr
                    for each in ast.walk(node)
                    if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
                    if isinstance(each.value, ast.Name) and each.value.id == "self"
                }
                if len(methods) > 15 or len(attributes) > 10:
                    large.append(
                        f"{node.name}: {len(methods)} methods, {len(attributes)} attributes"
                    )
    assert not large

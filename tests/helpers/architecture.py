"""The layers of the package, its modules, and which of them import which.

``tests/test_architecture.py`` keeps the modules to the layers, and ``docs/_ext/layers.py`` draws both.
"""

from __future__ import annotations

import ast
from pathlib import Path

import chainer_dist

ROOT = Path(chainer_dist.__file__).parent

# Lowest first; a module imports from its own layer and those below.
LAYERS = [
    [
        "_version",
        "_arguments",
        "_chainer",
        "_files",
        "_connections",
        "_counts",
        "_environment",
        "_progress",
        "_proxy",
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
    ["exchange"],
    ["communicators"],
    ["compression"],
    ["functions", "watch"],
    ["updates", "links"],
    ["optimizers", "datasets", "iterators"],
    ["serialization"],
    ["extensions"],
    ["updaters", "checkpoints", "parallel"],
    ["training"],
    ["chainermn", "integrations"],
    ["__init__"],  # what users see; it has names from all layers
    ["launcher", "scaling", "__main__"],
]


def layer_of(name):
    """Return the number of a module's layer, given its name below the package."""
    top = name.partition(".")[0]
    (found,) = [n for n, names in enumerate(LAYERS) if top in names]
    return found


def name_of(path):
    """Return a module's name below the package."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name):
    """Return the modules of the package that a module imports: anywhere in it, and for types only, too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for each in names:
            top, _, below = each.partition(".")
            if top == "chainer_dist":
                found.add(below if below in MODULES else below.rpartition(".")[0] or "__init__")
    return found - {name}

"""The picture ``layers``: the packages from the top layer down, and which of them import which.

It is made of the list of layers that a test keeps the package to, and of the imports in its modules.
"""

from __future__ import annotations

from graphlib import TopologicalSorter
from typing import TYPE_CHECKING

from pictures import BLUE, ORANGE, PICTURES, WIDTH, Drawing

from architecture import LAYERS, MODULES, imports

if TYPE_CHECKING:
    from sphinx.application import Sphinx

GROUND = "ground"  # stands for all modules of the lowest layer
LEFT, COLUMN, ROW, TOP = 72, 15.5, 22, 6


def above_ground() -> list[list[str]]:
    """Return the names in each layer, highest layer first, and in a layer importers first.

    The files ``__init__`` and ``__main__`` of the package are left out: users import the one and run the other.
    """
    found = []
    for layer in LAYERS[:0:-1]:
        names = [each for each in layer if each[:2] != "__"]
        order = TopologicalSorter({each: sorted(used_by(each) & {*names}) for each in names})
        found.append([*order.static_order()][::-1])
    return [names for names in found if names]


def used_by(package: str) -> set[str]:
    """Return what the modules of a package import from elsewhere in chainer_dist, the ground as one name."""
    modules = [name for name in MODULES if name.partition(".")[0] == package]
    found = {each.partition(".")[0] for name in modules for each in imports(name)} - {package}
    return {GROUND if each in LAYERS[0] else each for each in found}


def layers() -> Drawing:
    """Draw stairs of names, and a dot to the right of an importer and above what it imports."""
    bands = [*above_ground(), [GROUND]]
    names = [each for layer in bands for each in layer]
    d = Drawing(
        TOP + ROW * len(names) + 6,
        "Which package imports which: each only from its own layer and below",
    )

    def x(name: str) -> float:
        return LEFT + COLUMN * names.index(name)

    def y(name: str) -> float:
        return TOP + ROW * (names.index(name) + 0.5)

    for number, layer in enumerate(bands):
        d.band(0, y(layer[0]) - ROW / 2, WIDTH, ROW * len(layer), (BLUE, ORANGE)[number % 2])
    used = {name: sorted(used_by(name) & {*names}, key=names.index) for name in names}
    for name in names:
        d.text(x(name), y(name) + 5, name, "end")
        if used[name]:
            d.line(x(name) + 5, y(name), x(used[name][-1]), y(name))
        users = [each for each in names if name in used[each]]
        if users:
            d.line(x(name), y(users[0]), x(name), y(name) - 8)
        for each in users:
            d.dot(x(name), y(each))
    return d


def setup(app: Sphinx) -> dict[str, bool]:
    """Add the picture to the others."""
    app.setup_extension("pictures")
    PICTURES[layers.__name__] = layers
    return {"parallel_read_safe": True}

"""What the first page shows: a picture and three numbers, from docs/measured/; the README has copies of both.

``make pictures`` (``python docs/_ext/front.py``) writes these copies: docs/_static/throughput.svg, and the lines between two
comments of README.rst. In pages the directives are

    .. throughput::

    .. numbers::
"""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import charts
from docutils import nodes
from docutils.parsers.rst import Directive

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parent.parent
README = DOCS.parent / "README.rst"
SVG = DOCS / "_static" / "throughput.svg"
BEGIN, END = ".. Made by make pictures.\n", ".. Made until here.\n"
# Of the picture, in its order: names in files, and in pages.
SHOWN = {"chainer_dist": "chainer_dist", "chainermn": "ChainerMN", "torch": "torch DDP"}
MACHINES = ("scaling", "scaling-16")
WORKLOAD = "mlp"


def read(folder: Path, name: str) -> dict[str, Any]:
    """Return what a file of measurements has."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return content


def curves(content: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Return examples per second of each contender, by number of ranks, of ranks with a core each."""
    found: dict[str, dict[int, float]] = {name: {} for name in SHOWN.values()}
    for row in content["rows"]:
        same = row["kind"] == "weak" and row["workload"] == WORKLOAD
        if same and row["contender"] in SHOWN and not row["oversubscribed"]:
            found[SHOWN[row["contender"]]][row["ranks"]] = row["throughput"]
    return {name: curve for name, curve in found.items() if curve}


def computed(content: dict[str, Any]) -> str:
    """Say what has computed forward and backward of chainer_dist, by a file of ``make scaling``."""
    kernels = content.get("kernels", "chainer")
    name = kernels if isinstance(kernels, str) else kernels["chainer_dist"]
    return {"chainer": "Chainer's own code", "onednn": "oneDNN", "numpy": "NumPy"}[name]


def picture(folder: Path) -> tuple[list[str], float, str]:
    """Return the elements, the height and the description of the picture: a chart for each machine."""
    parts: list[str] = []
    words = []
    y = 0.0
    for name in MACHINES:
        content = read(folder, name)
        found = curves(content)
        drawn, height = charts.lines(found, unit="")
        cores = content["machine"]["cores"]
        how = f"forward and backward of chainer_dist by {computed(content)}"
        title = f"{cores} cores, {how}"
        parts.append(charts.text(0, y + 14, f"Examples per second on {cores} cores,"))
        parts.append(charts.text(0, y + 32, how))
        parts.append(f'<g transform="translate(0 {y + 22:.0f})">{"".join(drawn)}</g>')
        y += height + 36
        most = max(found["chainer_dist"])
        each = ", ".join(f"{who} {curve[max(curve)]:,.0f}" for who, curve in found.items())
        words.append(f"on {most} ranks of a machine with {title}: {each}")
    return parts, y, f"Examples per second, by numbers of ranks; {'; '.join(words)}"


def standalone(folder: Path) -> str:
    """Return the picture as a file that has a background, light or dark as the reader's system."""
    parts, height, title = picture(folder)
    pad = 14
    width = charts.WIDTH + 2 * pad
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 2 * pad:.0f}" '
        f'viewBox="{-pad} {-pad} {width} {height + 2 * pad:.0f}" role="img" aria-label="{escape(title)}">'
        "<style>svg{color:#1f2328}text{fill:#1f2328;font:14px sans-serif}.back{fill:#fff}"
        "@media(prefers-color-scheme:dark){svg{color:#e6edf3}text{fill:#e6edf3}.back{fill:#161b22}}"
        f'</style><rect class="back" x="{-pad}" y="{-pad}" width="100%" height="100%" rx="8"/>'
        f"{''.join(parts)}</svg>\n"
    )


def numbers(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield three numbers, each with the rest of its sentence."""
    scaling = read(folder, "scaling")
    found = curves(scaling)
    ranks = max(found["chainer_dist"].keys() & found["ChainerMN"].keys())
    ratio = found["chainer_dist"][ranks] / found["ChainerMN"][ranks]
    size = scaling["model"][WORKLOAD]["parameters"] / 1e6
    trained = f"a perceptron of {size:.1f} million parameters on {ranks} ranks of one machine"
    yield f"{ratio:.1f} times", f"as many examples per second as ChainerMN, in training {trained}"
    table = read(folder, "kernels")["tables"][0]
    row = next(each for each in table["rows"] if each[0].startswith("resnet50, 16"))
    times = dict(zip(table["columns"], row))
    ratio = float(times["Chainer, ms"]) / float(times["auto, ms"])
    yield (
        f"{ratio:.1f} times",
        "as fast as Chainer's own code: forward and backward of ResNet-50 in one thread, with a batch of 16 images",
    )
    table = read(folder, "memory")["tables"][-1]
    sizes = {row[0]: float(row[1].replace(",", "")) for row in table["rows"]}
    ratio = sizes["chainer_dist"] / sizes["ChainerMN naive"]
    ranks = next(word for word in table["title"].split() if word.isdigit())
    yield (
        f"{ratio:.2f} times",
        f"the memory of ChainerMN: {ranks} ranks of one machine that train that perceptron by Adam",
    )


def for_readme(folder: Path) -> str:
    """Return the lines that the README has between two comments."""
    _, _, title = picture(folder)
    shown = "\n".join(f"* **{number}** {words}." for number, words in numbers(folder))
    return f"\n.. image:: docs/_static/throughput.svg\n   :alt: {title}\n\n{shown}\n\n"


def write() -> None:
    """Write the picture, and the lines of the README."""
    folder = DOCS / "measured"
    SVG.write_text(standalone(folder), encoding="utf-8")
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    README.write_text(f"{before}{BEGIN}{for_readme(folder)}{END}{after}", encoding="utf-8")


class _FromFiles(Directive):
    """A directive that is made anew when a file in docs/measured/ changes."""

    def folder(self) -> Path:
        """Return where the files are, after the page has been made to depend on them."""
        env = self.state.document.settings.env
        folder = Path(env.srcdir, "measured")
        files = [folder / f"{name}.json" for name in (*MACHINES, "kernels", "memory")]
        for file in (*files, __file__, charts.__file__):
            env.note_dependency(str(file))
        return folder


class Throughput(_FromFiles):
    """See the module."""

    def run(self) -> list[nodes.Node]:
        """Return the picture."""
        return [nodes.raw(text=charts.figure(*picture(self.folder())), format="html")]


class Numbers(_FromFiles):
    """See the module."""

    def run(self) -> list[nodes.Node]:
        """Return the numbers as a list, which the style sheet sets side by side."""
        items = [
            nodes.list_item(
                "", nodes.paragraph("", "", nodes.strong(text=number), nodes.Text(f" {words}."))
            )
            for number, words in numbers(self.folder())
        ]
        return [nodes.bullet_list("", *items, classes=["numbers"])]


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives."""
    app.add_directive("throughput", Throughput)
    app.add_directive("numbers", Numbers)
    return {"parallel_read_safe": True}


if __name__ == "__main__":
    sys.exit(write())

"""The directive ``measured``: numbers from the files that the scripts in scripts/ write, as charts and as tables.

    .. measured:: exchange-2 exchange-4
       :bars: ms

       Milliseconds; shorter is faster.

shows what docs/measured/exchange-2.json and exchange-4.json have, and on which machine and by which command it was measured.
Above each table that has the columns that ``:bars:`` names is a chart of them, with the content of the directive as its caption.
Several columns are separated by semicolons, and each may have a name for the chart: ``Chainer / auto = chainer_dist``. Where
tables have different columns, ``|`` separates the choices.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import charts
from docutils import nodes
from docutils.parsers.rst import Directive, directives

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sphinx.application import Sphinx

# Terminals are narrow, and pages are not: what the short headings of the scripts stand for.
_HEADINGS = {
    "ChainerMN / it": "times as fast as ChainerMN",
    "independent / it": "times as fast as copies that exchange nothing",
    "rest, ms": "the rest, ms",
    "rest, ChainerMN / it": "the rest: times as fast as ChainerMN",
    "it / floor": "times as long as the floor",
    "it / ChainerMN": "times the memory of ChainerMN",
    "none / it": "times fewer bytes",
    "auto, ms": "chainer_dist, ms",
    "channels last, ms": "torch, channels last, ms",
    "Chainer / auto": "chainer_dist: times as fast as Chainer",
    "Chainer / torch": "torch: times as fast as Chainer",
    "auto / torch": "chainer_dist: time as a part of torch's",
    "ratio": "times as fast",
    "us each": "microseconds each",
    "collectives in four": "collectives in four batches",
}
# What is in the first column, by the name of the file, where the script leaves its heading empty.
_FIRST = {
    "accumulation": "batches",
    "allocator": "model, memory",
    "kernels": "model, batch per rank",
    "sparse_rows": "what is measured",
}
# Why a cell may be empty, by the heading of its column.
_REASONS = {
    "channels last, ms": "takes no images",
    "culprit named": "there is none",
    "result equal": "there is none",
}
UNKNOWN = "not measured"
_EACH = re.compile(r"(?<=\S) a (rank|batch|step|node|layer)\b")


def plain(words: str) -> str:
    """Return a title or a heading in words for a page."""
    words = _EACH.sub(r" per \1", _HEADINGS.get(words, words)).replace(" 1 nodes", " 1 node")
    words = re.sub(r"auto is (\w+)", r"chainer_dist computes by \1", words)
    return words.replace("by onednn", "by oneDNN")


def _beginning(title: str) -> str:
    """Return a title with a capital, unless it begins with a name."""
    return title[0].upper() + title[1:] if title.split(maxsplit=1)[0].isalpha() else title


class Measured(Directive):
    """See the module."""

    required_arguments = 1
    optional_arguments = 20
    option_spec: ClassVar[dict[str, Callable[[str], Any]]] = {"bars": directives.unchanged_required}
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Return charts and tables."""
        env = self.state.document.settings.env
        files = [Path(env.srcdir, "measured", f"{name}.json") for name in self.arguments]
        for file in (*files, __file__, charts.__file__):
            env.note_dependency(str(file))
        missing = ", ".join(file.name for file in files if not file.is_file())
        if missing:
            raise self.error(f"docs/measured/ has no {missing}: run make bench")
        choices = [_names(each) for each in self.options.get("bars", "").split("|") if each]
        found: list[nodes.Node] = []
        drawn: list[dict[str, str]] = []
        for file in files:
            content = json.loads(file.read_text(encoding="utf-8"))
            first = next(
                (_FIRST[name] for name in _FIRST if file.name.startswith(name)), "contender"
            )
            for each in content["tables"]:
                title = _beginning(plain(each["title"]))
                found.append(nodes.paragraph("", "", nodes.strong(text=title)))
                columns = next((c for c in choices if c.keys() <= {*each["columns"]}), None)
                if columns:
                    found += bars(title, each, columns, " ".join(self.content))
                    found += listed(_as_table(each, first))
                    drawn.append(columns)
                else:
                    found.append(_as_table(each, first))
            found.append(origin(content))
        for columns in choices:
            if columns not in drawn:
                raise self.error(
                    f"no table of {', '.join(self.arguments)} has the columns {[*columns]}"
                )
        return found


def _names(option: str) -> dict[str, str]:
    """Return columns, with what they are called in a chart."""
    pairs = (each.partition("=") for each in option.split(";") if each.strip())
    return {column.strip(): (name or column).strip() for column, _, name in pairs}


def bars(
    title: str, content: dict[str, Any], columns: dict[str, str], caption: str
) -> list[nodes.Node]:
    """Return a chart of some columns of a table, and its caption."""
    places = [content["columns"].index(each) for each in columns]
    groups = {row[0]: [_bar(row[place]) for place in places] for row in content["rows"]}
    return chart(*charts.bars(groups, [*columns.values()]), title, caption)


def _bar(cell: str) -> charts.Bar:
    if not cell:
        return charts.Bar(None, UNKNOWN)
    return charts.Bar(float(cell.replace(",", "").rstrip("%")), cell)


def chart(parts: list[str], height: float, title: str, caption: str) -> list[nodes.Node]:
    """Return a chart, and its caption."""
    shown: list[nodes.Node] = [nodes.raw(text=charts.figure(parts, height, title), format="html")]
    if caption:
        shown.insert(0, nodes.paragraph(text=caption, classes=["drawn"]))
    return shown


def listed(numbers: nodes.Node) -> list[nodes.Node]:
    """Return a table below its chart, folded, as it has the same numbers and some more."""
    before = '<details class="listed"><summary>All numbers in a table</summary>'
    return [
        nodes.raw(text=before, format="html"),
        numbers,
        nodes.raw(text="</details>", format="html"),
    ]


def _as_table(content: dict[str, Any], first: str) -> nodes.Node:
    heads = content["columns"]
    lines = [
        [cell or _REASONS.get(head, UNKNOWN) for head, cell in zip(heads, row)]
        for row in content["rows"]
    ]
    return table([plain(head) or first for head in heads], lines)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> nodes.Node:
    """Return a table without a title, which would not wrap on a narrow page."""
    group = nodes.tgroup(cols=len(columns))
    group += [nodes.colspec(colwidth=1) for _ in columns]
    group += nodes.thead("", _row(columns))
    group += nodes.tbody("", *[_row(row) for row in rows])
    return nodes.table("", group, classes=["measured"])


def _row(cells: Sequence[str]) -> nodes.row:
    return nodes.row("", *[nodes.entry("", nodes.paragraph(text=cell)) for cell in cells])


def origin(content: dict[str, Any]) -> nodes.Node:
    """Say by which command, where, when, and with what it was measured."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    where = (
        f", {machine['date'][:10]}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['system']}, Python {machine['python']}, {versions}."
    )
    command = nodes.literal(text=content["command"])
    return nodes.paragraph("", "", command, nodes.Text(where), classes=["origin"])


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("measured", Measured)
    return {"parallel_read_safe": True}

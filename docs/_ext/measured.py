"""The directive ``measured``: tables of numbers, from the files that the scripts in scripts/ write.

    .. measured:: exchange-2 exchange-4

shows what docs/measured/exchange-2.json and exchange-4.json have, and on which machine and by which
command it was measured.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.parsers.rst import Directive

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class Measured(Directive):
    """See the module."""

    required_arguments = 1
    optional_arguments = 20

    def run(self) -> list[nodes.Node]:
        """Return the tables."""
        env = self.state.document.settings.env
        files = [Path(env.srcdir, "measured", f"{name}.json") for name in self.arguments]
        for file in files:
            env.note_dependency(str(file))
        missing = ", ".join(file.name for file in files if not file.is_file())
        if missing:
            raise self.error(f"docs/measured/ has no {missing}: run make bench")
        found: list[nodes.Node] = []
        for file in files:
            content = json.loads(file.read_text(encoding="utf-8"))
            for each in content["tables"]:
                found.append(nodes.paragraph("", "", nodes.strong(text=each["title"])))
                found.append(table(each["columns"], each["rows"]))
            found.append(origin(content))
        return found


def table(columns: list[str], rows: list[list[str]]) -> nodes.Node:
    """Return a table without a title, which would not wrap on a narrow page."""
    group = nodes.tgroup(cols=len(columns))
    group += [nodes.colspec(colwidth=1) for _ in columns]
    group += nodes.thead("", _row(columns))
    group += nodes.tbody("", *[_row(row) for row in rows])
    return nodes.table("", group, classes=["measured"])


def _row(cells: list[str]) -> nodes.row:
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

"""Tables of the benchmarks: printed while they are measured, and kept as JSON for the documentation."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from chainer_dist.scaling.experiment import machine
from chainer_dist.scaling.results import write_json

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

# In front of the command, where it was given: MPICH then takes ranks of one machine for those of several.
_SETTINGS = ("MPIR_CVAR_NUM_CLIQUES",)


def add_option(parser: argparse.ArgumentParser) -> None:
    """Let a script be told where to write its tables."""
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the tables there, too")


class Report:
    """What a script has measured. Nothing but one process prints and writes.

    Args:
        path: The file for :meth:`write`, or None.
        ranks: Under mpiexec, how many there are; None in a script that starts jobs itself.
        speaks: Whether this process prints; under mpiexec, rank 0.
    """

    def __init__(self, path: Path | None, *, ranks: int | None = None, speaks: bool = True) -> None:
        self._path = path if speaks else None
        self._ranks = ranks
        self._speaks = speaks
        self._tables: list[dict[str, Any]] = []

    def table(self, title: str, columns: Mapping[str, str], label_width: int = 24) -> Table:
        """Begin a table, and print its head.

        Args:
            title: Said above it.
            columns: Headings and the formats of their cells; the first one is that of labels.
            label_width: Of the first column, in characters.
        """
        table = Table(columns, label_width, speaks=self._speaks)
        self._tables.append({"title": title, "columns": [*columns], "rows": table.rows})
        if self._speaks:
            print(f"\n{title}")
            table.print([*columns])
        return table

    def write(self) -> None:
        """Write the tables, with what they depend on, if there is a file for them."""
        if self._path is not None:
            content = {"command": self._command(), "machine": machine(), "tables": self._tables}
            self._path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._path, content)

    def _command(self) -> str:
        """Return what was typed, but for the file's name."""
        words = [f"{name}={os.environ[name]}" for name in _SETTINGS if name in os.environ]
        if "NETNS_CLUSTER" in os.environ:  # netns_cluster.py and its options
            words += ["python", *shlex.split(os.environ["NETNS_CLUSTER"]), "--"]
        elif self._ranks is not None:
            words += ["mpiexec", "-n", str(self._ranks)]
        given = iter(sys.argv[1:])
        kept = []
        for word in given:
            if word == "--json":
                next(given)
            elif not word.startswith("--json="):
                kept.append(word)
        return shlex.join([*words, "python", f"scripts/benchmarks/{Path(sys.argv[0]).name}", *kept])


class Table:
    """A table that grows row by row; see :meth:`Report.table`.

    Attributes:
        rows: The cells as text.
    """

    def __init__(self, columns: Mapping[str, str], label_width: int, *, speaks: bool) -> None:
        self.rows: list[list[str]] = []
        self._formats = [*columns.values()]
        self._widths = [label_width, *[max(len(name) + 2, 9) for name in [*columns][1:]]]
        self._speaks = speaks

    def row(self, *cells: Any) -> None:
        """Add a row, and print it. A cell that is None stays empty."""
        texts = [
            "" if cell is None else format(cell, how) for cell, how in zip(cells, self._formats)
        ]
        self.rows.append(texts)
        if self._speaks:
            self.print(texts)

    def print(self, texts: list[str]) -> None:
        """Print a line, numbers to the right."""
        label, *others = (
            f"{text:{'>' if number else '<'}{width}}"
            for number, (text, width) in enumerate(zip(texts, self._widths))
        )
        print(label + "".join(others), flush=True)

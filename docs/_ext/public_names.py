"""What of the package the reference has: directives that list it, and a check that nothing is missing.

``.. command-help:: run`` shows what ``chainer-dist run --help`` prints, and ``.. modules::`` lists all
modules with the first line of what each says of itself. A public name that no page documents is a
warning.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.parsers.rst import Directive
from docutils.statemachine import StringList
from sphinx.util import logging

import chainer_dist

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sphinx.application import Sphinx
    from sphinx.environment import BuildEnvironment

# Not functions or classes: said on the first page of the reference.
_SAID_ELSEWHERE = {"chainer_dist.__version__"}
_logger = logging.getLogger(__name__)


class CommandHelp(Directive):
    """The help of ``chainer-dist`` and its actions."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the text as it is in a terminal of 80 columns."""
        os.environ["COLUMNS"] = "80"
        module = {"scale": "scaling.cli", "predict": "scaling.predict"}.get(
            "".join(self.arguments), "launcher.cli"
        )
        main = importlib.import_module(f"chainer_dist.{module}").main
        arguments = self.arguments if module == "launcher.cli" else []
        text = io.StringIO()
        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main([*arguments, "--help"])
        return [nodes.literal_block(text=text.getvalue(), language="none")]


class Modules(Directive):
    """All modules, each with the first line of its docstring."""

    def run(self) -> list[nodes.Node]:
        """Return a list, to whose items docstrings refer."""
        lines = StringList()
        for name in _modules():
            text = _docstring(name).split("\n\n")[0]
            lines.append(f".. py:module:: {name}", "modules")
            lines.append("", "modules")
            lines.append(f"``{name}``", "modules")
            lines.append(f"   {text.replace(chr(10), ' ')}", "modules")
            lines.append("", "modules")
        body = nodes.Element()
        self.state.nested_parse(lines, 0, body)
        return list(body.children)


def _docstring(name: str) -> str:
    """Return that of a module, without importing it: it may need torch."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return ""
    return ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""


def _modules() -> Iterator[str]:
    """Yield the names of all modules that no other page describes."""
    pages = Path(__file__).parent.parent.joinpath("api").glob("*.rst")
    described = {
        name
        for page in pages
        for name in re.findall(r"automodule:: (\S+)", page.read_text("utf-8"))
    }
    for info in pkgutil.walk_packages(chainer_dist.__path__, "chainer_dist."):
        parts = info.name.split(".")
        is_public = len(parts) == 2 and parts[1] in chainer_dist.__all__
        parent = importlib.import_module(".".join(parts[:-1]))
        # A function may have the name of its module; then it is the one that is referred to.
        is_hidden = not inspect.ismodule(getattr(parent, parts[-1], parent))
        if not (is_public or is_hidden or parts[-1] == "__main__" or info.name in described):
            yield info.name


def _public() -> Iterator[tuple[str, Any]]:
    """Yield the full names of everything public, and what they stand for."""
    for name in chainer_dist.__all__:
        value = getattr(chainer_dist, name)
        yield f"chainer_dist.{name}", value
        if inspect.ismodule(value):
            for inner in getattr(value, "__all__", []):
                yield f"{value.__name__}.{inner}", getattr(value, inner)


def check(_: Sphinx, env: BuildEnvironment) -> None:
    """Warn of public names that no page has under any of the names they have."""
    documented = {*env.get_domain("py").objects}  # type: ignore[attr-defined]
    there: dict[int, list[str]] = {}
    for name, value in _public():
        there.setdefault(id(value), []).append(name)
    for names in there.values():
        if not documented & {*names} and not {*names} <= _SAID_ELSEWHERE:
            _logger.warning("no page in docs/api/ documents %s", " or ".join(names))
    if "mpi4py.MPI" in sys.modules:
        _logger.warning("building the documentation has started MPI")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives and the check."""
    app.add_directive("command-help", CommandHelp)
    app.add_directive("modules", Modules)
    app.connect("env-check-consistency", check)
    return {"parallel_read_safe": True}

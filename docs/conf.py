"""How Sphinx builds the documentation; ``make docs`` runs it."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "_ext"), str(HERE.parent / "tests" / "helpers")]

from docutils import nodes

import chainer_dist

project = "chainer_dist"
author = "the chainer_dist authors"
copyright = f"2026, {author}"
release = version = chainer_dist.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "front",
    "layers",
    "measured",
    "pictures",
    "public_names",
    "scaled",
]
exclude_patterns = ["_build", "howto/_examples_table.rst"]
default_role = "any"

html_theme = "furo"
html_title = f"chainer_dist {release}"
html_static_path = ["_static"]
html_css_files = ["chainer_dist.css"]
html_show_sourcelink = False
html_show_sphinx = False

# Docstrings say types in words, with shapes, dtypes and units, which annotations do not have.
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

doctest_global_setup = """
import chainer
import chainer.links as L
import numpy as np
import chainer_dist
"""

nitpicky = True
# What others document: there is no copy of their indices to link to without a network.
nitpick_ignore_regex = [
    ("py:.*", r"(chainer|numpy|mpi4py|optuna)\..*"),
    # Of attributes that other modules use and users do not.
    ("py:class", "Arrangement|Options|Randomness"),
    ("py:(exc|class|obj)", "|".join(name for name in vars(builtins) if name[0].isupper())),
]

linkcheck_timeout = 20


def setup(app):
    """Let differences name files as a reader has them, not as they were where this was built."""

    def shorten(_, document):
        for block in document.findall(nodes.literal_block):
            if block.get("language") == "udiff":
                text = block.astext().replace(f"{HERE}/tutorial/", "")
                block.children[:] = [nodes.Text(text)]
                block.rawsource = text

    app.connect("doctree-read", shorten)

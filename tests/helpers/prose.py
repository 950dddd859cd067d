"""Finds the sentences of texts in reStructuredText."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_ITEM = re.compile(r"(?:[*-]|\d+\.) +")
_RULE = re.compile(r"([=\-~^ ])\1{2,}[=\-~^ ]*$")
_PROSE = re.compile(r"\.\. (?:note|warning|seealso|tip)::")
# Code counts as one word, and of a link or a role its text counts.
_MARKUP = (
    (r"``.+?``", "code"),
    (r":[\w:]+:`~?([^`<]*?) *(?:<[^`>]*>)?`", r"\1"),
    (r"`([^`<]+?) *(?:<[^`>]*>)?`_*", r"\1"),
)
_END = re.compile(r"(?<=[.?!])\)? +(?=[A-Z0-9\"(*]|code|chainer_dist|oneDNN)")


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of paragraphs and lists, without markup. Code, tables and headings have none."""
    for block in _blocks(text):
        words = block
        for pattern, plain in _MARKUP:
            words = re.sub(pattern, plain, words)
        yield from _END.split(words)


def _without_tables(text: str) -> Iterator[str]:
    """Yield the lines of a text, with empty ones in the place of tables, and one at the end."""
    inside = False
    lines = text.splitlines()
    for line, after in zip(lines, [*lines[1:], ""]):
        rule = _RULE.match(line.strip())
        inside = inside or bool(rule and " " in line.strip())
        yield "" if inside else line
        inside = inside and not (rule and not after.strip())
    yield ""


def _blocks(text: str) -> Iterator[str]:
    """Yield paragraphs and items of lists, each on one line."""
    block: list[str] = []
    left = 0  # where the lines of the block begin
    hidden: int | None = None  # what is indented by more is no prose
    for line in _without_tables(text):
        content = line.strip()
        indent = len(line) - len(line.lstrip())
        if hidden is not None and (not content or indent > hidden):
            continue
        hidden = None
        term = len(block) == 1 and indent > left  # which what follows explains
        if block and (not content or indent < left or term):
            yield " ".join(block)
            hidden = left if block[-1].endswith("::") else None
            block = []
        if content.startswith(".."):
            hidden = None if _PROSE.match(content) else indent
        elif _RULE.match(content):
            block = []  # what it is below of is a heading
        elif content:
            mark = None if block else _ITEM.match(content)
            skipped = len(mark[0]) if mark else 0
            left = left if block else indent + skipped
            block.append(content[skipped:])

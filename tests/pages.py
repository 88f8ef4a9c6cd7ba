"""The code blocks of the documentation, as they stand there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from sybil.document import Document
from sybil.parsers.markdown.lexers import (
    DirectiveInHTMLCommentLexer,
    FencedCodeBlockLexer,
)

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
#: The first line of a block that belongs into a file.
_FILE = re.compile(r"(?:#|<!--) ([\w/]+\.(?:py|html))(?: -->)?(?:, .*)?\n")
#: ``<!-- not run: why -->``, right above a block.
_NOT_RUN = re.compile(r"<!-- not run: ((?:(?!-->).)+) -->\s*\Z", re.S)


class Block(NamedTuple):
    page: Path
    #: The number of the line on which its source begins.
    line: int
    language: str
    source: str
    #: Why it is not run, if the page says so.
    not_run: str = ""
    #: It is there to be run only.
    invisible: bool = False

    @property
    def file(self) -> str:
        """The file that its first line names, or nothing."""
        found = _FILE.match(self.source)
        return found[1] if found else ""

    @property
    def commands(self) -> list[str]:
        """The commands of a console block, without comments."""
        return [
            line.removeprefix("$ ").partition("  #")[0].strip()
            for line in self.source.splitlines()
            if line.startswith("$ ")
        ]

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Return the blocks of *page*, those that are only there to be run included.

    These are ``<!-- invisible-code-block: python ... -->``.
    """
    document = Document(page.read_text("utf-8"), str(page))
    found = []
    for lexer in (
        FencedCodeBlockLexer(r"\S+"),
        DirectiveInHTMLCommentLexer("invisible-code-block", r"\S+"),
    ):
        for region in lexer(document):
            lexemes = region.lexemes
            source = lexemes["source"]
            reason = _NOT_RUN.search(document.text[: region.start])
            block = Block(
                page,
                document.text.count("\n", 0, region.start + source.offset) + 1,
                lexemes.get("language") or lexemes["arguments"],
                str(source),
                " ".join(reason[1].split()) if reason else "",
                "language" not in lexemes,
            )
            found.append((region.start, block))
    return [block for _, block in sorted(found)]

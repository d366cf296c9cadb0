"""The documentation's pages as tests see them: their code blocks, and their commands."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXECUTED_WHEN_BUILT = "{code-cell}"  # by the notebook extension of the documentation
PROGRAMS = ("codespell", "fts", "jupytext", "linkchecker", "make", "pip", "python", "torchrun", "tensorboard")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    heading: str
    line: int
    language: str
    text: str
    not_run: str | None = None  # why, of a block that no test runs
    run_by: str | None = None  # the test that runs it, if it is not the one of all pages

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def paths() -> list[Path]:
    """All pages: those of the documentation, and the files of the root that it includes."""
    return [
        *sorted(ROOT.glob("*.md")),
        *sorted(path for path in DOCS.rglob("*.md") if DOCS / "_build" not in path.parents),
    ]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tokens_of(page: str) -> list[Token]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


@cache
def blocks(page: str, language: str | None = None) -> list[Block]:
    """The page's blocks, of all languages or of one, from top to bottom."""
    found, heading, marks = [], "", {}
    tokens = tokens_of(page)
    for token, after in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and after is not None:
            heading = after.content
        if token.type == "fence":
            kind, line = token.info.split(maxsplit=1)[0] if token.info else "", (token.map or [0])[0] + 1
            found.append(Block(page, heading, line, kind, token.content, **marks))
        comment = (
            re.fullmatch(r"<!-- (not run|run by): (.*) -->\s*", token.content) if token.type == "html_block" else None
        )
        marks = {comment.group(1).replace(" ", "_"): comment.group(2)} if comment else {}
    return [block for block in found if language in (None, block.language)]


def commands(page: str) -> Iterator[str]:
    """The commands of the page: lines of console blocks, and code within a sentence that begins as a command does."""
    for block in blocks(page, "console"):
        if block.not_run is None:
            yield from commands_of(block.text)
    if page == "README.md" or page.startswith("docs/"):
        for token in tokens_of(page):
            for child in token.children or ():
                if child.type == "code_inline" and re.match(rf"({'|'.join(PROGRAMS)}) [^=(]", child.content):
                    yield child.content


def commands_of(text: str) -> Iterator[str]:
    """The commands without prompts, comments and line breaks; where some lines have prompts, the others are output."""
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in prompted or lines:
        command = re.sub(r"(^|\s)#.*", "", line).strip()
        if command and not command.startswith("cd "):
            yield re.sub(r"\s+", " ", command)

"""Code blocks and commands of README, CONTRIBUTING and the manual."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    *(str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/**/*.md"))),
]

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_INLINE = re.compile(r"`([^`]+)`")
_SETTING = re.compile(r"^(\w+=\S* )+")
_LAUNCHERS = (
    "accelerate", "bash", "mhla", "mhla-evaluate", "pip", "python", ".venv/bin/python", "torchrun",
)  # fmt: skip


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, its language, what stands in it."""

    page: str
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command line: the page, its words, and whether they are all of it (else it ends in ...)."""

    page: str
    words: tuple[str, ...]
    whole: bool = True

    def __str__(self) -> str:
        return f"{self.page}: {shlex.join(self.words)}"


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str, language: str | None = None) -> list[Block]:
    found = [Block(page, *match) for match in _FENCE.findall(read(page))]
    return [block for block in found if language in (None, block.language)]


def block_commands(page: str) -> list[Command]:
    """Commands of the bash blocks, in their order."""
    lines = "\n".join(block.text for block in blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [command for line in lines for command in _commands(page, line)]


def inline_code(page: str) -> list[str]:
    """What stands in backticks in the text, which may go over the end of a line."""
    return [" ".join(text.split()) for text in _INLINE.findall(_FENCE.sub("", read(page)))]


def inline_commands(page: str) -> list[Command]:
    """Commands in the text."""
    return [
        command
        for text in inline_code(page)
        if _SETTING.sub("", text).split()[0] in _LAUNCHERS
        and len(text.split()) > 1
        and text != "accelerate launch"
        for command in _commands(page, text)
    ]


def _commands(page: str, line: str) -> list[Command]:
    """Split a line at ``&&``; its comment goes, and what it sets of the environment."""
    found: list[list[str]] = [[]]
    for word in shlex.split(_SETTING.sub("", line), comments=True):
        if word == "&&":
            found.append([])
        else:
            found[-1].append(word)
    return [
        Command(page, tuple(word for word in words if word != "..."), whole="..." not in words)
        for words in found
        if words
    ]

"""Docstrings begin with a verb or a noun of the field, so that a list of them reads as a reference."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [path for room in ("mhla_diffusion", "pipelines") for path in sorted((ROOT / room).rglob("*.py"))]

VAGUE = {
    "A", "All", "An", "Any", "As", "At", "For", "How", "If", "In", "Is", "It", "Of", "On", "One", "Some",
    "Such", "That", "The", "These", "This", "Those", "To", "What", "When", "Where", "Whether", "Which",
    "Who", "Whose", "With",
}  # fmt: skip


def public_docstrings(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield name and docstring of everything public that has one, methods included."""
    for node in body:
        if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
            continue
        if text := ast.get_docstring(node):
            yield f"{prefix}{node.name}", text
        if isinstance(node, ast.ClassDef):
            yield from public_docstrings(node.body, f"{prefix}{node.name}.")


def vague_docstrings(source: str) -> list[str]:
    return [
        f"{name}: {text.splitlines()[0]}"
        for name, text in public_docstrings(ast.parse(source).body)
        if text.split()[0].strip(".,:;") in VAGUE
    ]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_public_docstrings_begin_with_a_verb_or_a_noun_of_the_field(path: Path) -> None:
    assert not vague_docstrings(path.read_text(encoding="utf-8"))


def test_a_vague_docstring_is_found_where_it_is_public() -> None:
    source = '''
class Blocks:
    """The blocks."""
    def count(self):
        """Whether there are some."""
    def _hidden(self):
        """What is not read."""
def good():
    """Return it."""
'''
    assert vague_docstrings(source) == ["Blocks: The blocks.", "Blocks.count: Whether there are some."]

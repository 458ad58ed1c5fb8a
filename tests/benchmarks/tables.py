"""Cells of the tables that benchmarks return."""

from __future__ import annotations


def cells(text: str) -> list[list[str]]:
    """Return the rows of the table of a text, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]

"""Rooms of the package import what CONTRIBUTING.md says that they may."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[2]
GROUND_FLOOR = "ground floor"


def rows() -> list[tuple[set[str], str]]:
    """The rooms of each row of the table, and what these may import."""
    table = (ROOT / "CONTRIBUTING.md").read_text().partition("| room |")[2].partition("\n\n")[0]
    cells = [[cell.strip() for cell in line.split(" | ")] for line in table.splitlines()[2:]]
    return [(set(re.findall(r"`(\w+)`", first)), last) for first, _, last in cells]


def allowed() -> dict[str, set[str]]:
    """The rooms that each room may import."""
    table = rows()
    names = {name for rooms, _ in table for name in rooms}
    ground = table[0][0]
    found = {}
    for rooms, text in table:
        beyond = ground if GROUND_FLOOR in text else set()
        for name in re.findall(r"`(\w+)`", text):
            beyond |= next(others for others, _ in table if name in others)
        for room in rooms:
            found[room] = names if text == "all |" else rooms | beyond
    return found


def imports() -> Iterator[tuple[str, str, str]]:
    """Each import between rooms: where it stands, the room, and the room that is imported."""
    for folder, package in (("mhla_diffusion", "mhla_diffusion"), ("pipelines", "mhla_diffusion.pipelines")):
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts])
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.ImportFrom):
                    continue
                name = "." * node.level + (node.module or "")
                whole = resolve_name(name, module.rpartition(".")[0]) if node.level else name
                of = [whole] if whole != "mhla_diffusion" else [f"{whole}.{x.name}" for x in node.names]
                for other in of:
                    if other.startswith("mhla_diffusion."):
                        yield f"{path}:{node.lineno}", module.split(".")[1], other.split(".")[1]


def test_rooms_import_what_they_may() -> None:
    may, seen = allowed(), set()
    doors = {"__init__", "__main__", "MHLAPipeline", "__version__"}
    for where, room, other in imports():
        if room not in doors and other not in doors and room != other:
            assert other in may[room], f"{where}: {room} may not import {other}"
            seen.add((room, other))
    assert len(seen) > 60


def test_every_room_stands_in_the_table() -> None:
    package = ROOT / "mhla_diffusion"
    found = {
        path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()
    }
    assert found - {"__init__", "__main__"} | {"pipelines"} == set(allowed())

"""Data goes one way through the rooms of evaluation, and so do imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import mhla_diffusion

PACKAGE = Path(mhla_diffusion.__file__).parent
ROOM = "mhla_diffusion.evaluation"
ORDER = ["sets", "networks", "scores", "store", "measure", "pages", "evaluate"]


def _imports() -> dict[str, set[str]]:
    """Modules of this package that each module of evaluation imports."""
    found = {}
    for path in (PACKAGE / "evaluation").rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        if path.name != "__init__.py":
            nodes = [
                node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
            ]
            found[module] = {
                resolve_name("." * node.level + (node.module or ""), module.rpartition(".")[0])
                for node in nodes
                if node.level
            }
    return found


def _rank(module: str) -> int:
    return ORDER.index(module.removeprefix(f"{ROOM}.").split(".")[0])


def test_imports_follow_the_order_of_the_data() -> None:
    for module, imported in _imports().items():
        for other in imported:
            if other.startswith(ROOM):
                assert _rank(other) <= _rank(module), f"{module} imports {other}"


def test_no_module_imports_itself_in_a_circle() -> None:
    imports = _imports()
    assert len(imports) > 15
    order = list(TopologicalSorter(imports).static_order())  # raises CycleError
    assert order.index(f"{ROOM}.sets.samples") < order.index(f"{ROOM}.evaluate")


def test_importing_evaluation_imports_none_of_what_it_needs_later() -> None:
    code = (
        "import sys, mhla_diffusion.evaluation\n"
        "heavy = {'torch', 'torchvision', 'cleanfid', 'efficientnet_lite_pytorch', 'jinja2', 'scipy'}\n"
        "heavy.add('diffusers')\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "from mhla_diffusion.evaluation import evaluate_images\n"
        "rooms = 'backbones', 'pipelines', 'training', 'ops', 'attention'\n"
        "ours = {'mhla_diffusion.' + room for room in rooms}\n"
        "found = (heavy - {'torch'} | ours) & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)

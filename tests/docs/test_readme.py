"""The README's matrix against the code, its drawing, its length, and the links of all pages."""

from __future__ import annotations

import dataclasses
import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from diffusers.models.cache_utils import CacheMixin

from mhla_diffusion import MHLAConfig, analysis, planning
from mhla_diffusion.backbones import BACKBONES
from mhla_diffusion.backbones.layer_plan import ATTENTIONS
from mhla_diffusion.domains import FAMILIES
from mhla_diffusion.evaluation.networks import images, videos
from mhla_diffusion.evaluation.scores.metrics import METRICS
from mhla_diffusion.training.stock import UNTRAINED
from tests.backbones.cases import CASES, Case

from .pages import PAGES, ROOT, read


def matrix() -> dict[str, dict[str, str]]:
    """Rows of the README's table of backbones, by model, and their cells, by column."""
    section = read("README.md").partition("## Backbones")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("|")
    ]
    head, _, *body = rows
    assert all(len(row) == len(head) for row in body)
    return {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in body}


def test_every_backbone_has_a_row_and_a_case() -> None:
    models = [model.__name__ for model in BACKBONES.values()]
    assert sorted(matrix()) == sorted([*models, *(f"MHLA{family}Model" for family in FAMILIES)])
    assert sorted(case.model.__name__ for case in CASES.values()) == sorted(models)


@pytest.mark.parametrize("model", BACKBONES.values(), ids=lambda model: model.__name__)
def test_a_row_says_what_a_model_can(model: Any) -> None:
    row = matrix()[model.__name__]
    kinds = ATTENTIONS if model.stock_attention == "softmax" else ("mhla", model.stock_attention)
    assert row["attention of a layer"] == ", ".join(kinds)
    assert (row["caches"] != "-") == issubclass(model, CacheMixin)
    assert (row["ranks"] != "-") == bool(model._cp_plan)
    assert (row["LoRA"] != "-") == hasattr(model, "add_adapter")
    assert (row["training"] != "-") == (model not in UNTRAINED)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_backbone_is_planned_and_analyzed(case: Case, tmp_path: Path) -> None:
    case.make(attention=["mhla", case.stock_kind]).save_pretrained(tmp_path)
    model = case.make()
    side, grid = model.latents_per_token[-1] * model.vae_stride[-1], case.grids[0]
    height, width = (4 * tokens * side for tokens in grid[-2:])
    plan = planning.plan(str(tmp_path), height, width, frames=9 if len(grid) == 3 else None)
    assert plan.layout.grid[-2:] == tuple(4 * tokens for tokens in grid[-2:])
    assert plan.layer_flops("mhla")["attention operator"] < plan.layer_flops("softmax")["attention operator"]
    kinds = [layer.kind for layer in analysis.analyze_stored(str(tmp_path)).layers]
    # VACE's control branch has layers too, as has time in Latte.
    expected = {"WanVACE": ["mhla", "mhla", "softmax"], "Latte": ["mhla", "softmax", "softmax", "softmax"]}
    assert kinds == expected.get(case.name, ["mhla", case.stock_kind])


def test_a_row_says_how_far_a_model_is_tested_in_words_that_are_explained() -> None:
    words = {cell for row in matrix().values() for cell in list(row.values())[2:]}
    explained = read("README.md").partition("## Backbones")[2]
    assert all(f"`{word}`" in explained for word in words - {"not run"})


def test_every_flag_and_every_extractor_has_a_row() -> None:
    flags = {field.name for field in dataclasses.fields(MHLAConfig)}
    assert flags <= set(re.findall(r"`(\w+)`", table_below("docs/operator.md", "setting of `MHLAConfig`")))
    for names, page in ((images.NAMES, "Evaluation"), (videos.NAMES, "Videos")):
        rows = read("docs/evaluation.md").partition(f"# {page}\n")[2].partition("\n## ")[0]
        assert set(names) - {"auto"} <= set(re.findall(r"`(\w+)`", rows))


def test_every_metric_is_named() -> None:
    assert set(METRICS) <= set(re.findall(r"`(\w+)`", read("docs/evaluation.md")))


def table_below(page: str, head: str) -> str:
    return read(page).partition(f"| {head}")[2].partition("\n\n")[0]


def test_every_preset_can_be_planned() -> None:
    for name in re.findall(r"--model (\S+/\d|Wan2\.1-\S+)", "".join(map(read, PAGES))):
        assert name in planning.PRESETS


def test_the_drawing_is_what_its_script_draws() -> None:
    draw = runpy.run_path(str(ROOT / "docs" / "drawing.py"))["draw"]
    found = (ROOT / "docs" / "idea.svg").read_text(encoding="utf-8")
    assert draw() == found, "run: python docs/drawing.py docs/idea.svg"


def test_the_readme_stays_short() -> None:
    """Beside the row that every backbone has."""
    assert len(read("README.md").splitlines()) - len(matrix()) <= 115


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", read(page)):
        if not link.startswith(("https://", "#")):
            assert (folder / link.partition("#")[0]).exists(), link


def anchors(path: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_lead_to_headings() -> None:
    found = [
        (page, ROOT / page if not name else (ROOT / page).parent / name, anchor)
        for page in PAGES
        for name, anchor in re.findall(r"\]\((?!https:)([^)\s#]*)#([^)\s]+)\)", read(page))
    ]
    assert len(found) > 5
    wrong = [f"{page}: {path.name}#{anchor}" for page, path, anchor in found if anchor not in anchors(path)]
    assert not wrong


def test_every_file_that_a_page_names_is_there() -> None:
    """Such as ``ops/tiles.py`` or ``configs/image_dit_mnist.yaml``, from the root or the package."""
    roots = (ROOT, ROOT / "mhla_diffusion", ROOT / "docs")
    for page in PAGES:
        for name in re.findall(r"`([\w./-]+/[\w.-]*\.(?:py|yaml|sh|md|cfg))`", read(page)):
            assert any((root / name).exists() for root in roots), f"{page}: {name}"

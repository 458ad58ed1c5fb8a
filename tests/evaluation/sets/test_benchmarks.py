"""Prompts of benchmarks of text to image, and images in their layouts."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mhla_diffusion.evaluation.sets.benchmarks import export_benchmark, read_benchmark, write_prompts
from mhla_diffusion.evaluation.sets.images import open_images
from mhla_diffusion.evaluation.sets.samples import common_classes


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Path]:
    """Their own files, of two prompts each."""
    texts = ["a cat, sitting", "two dogs"]
    categories = {
        f"id{i}": {"category": ["animals", "people"][i], "prompt": text} for i, text in enumerate(texts)
    }
    (tmp_path / "meta_data.json").write_text(json.dumps(categories))
    lines = [json.dumps({"tag": "two_object", "prompt": text}) for text in texts]
    (tmp_path / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "prompts").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "prompts" / f"p{number}.txt").write_text(text + "\n")
    return {
        "mjhq30k": tmp_path / "meta_data.json",
        "geneval": tmp_path / "evaluation_metadata.jsonl",
        "geneval2": tmp_path / "evaluation_metadata.jsonl",
        "dpg_bench": tmp_path / "prompts",
    }


def generate(prompts: Path, folder: Path, per_prompt: int = 1) -> Path:
    """What mhla generate leaves of a file of prompts, without a model."""
    rows = []
    for number, row in enumerate(csv.DictReader(prompts.open(newline=""))):
        for repeat in range(per_prompt):
            name = f"{row['file']}{f'-{repeat}' if per_prompt > 1 else ''}.png"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (number, repeat, 9)).save(folder / name)
            rows.append({"file": name, "prompt": row["prompt"], "seed": 0})
    (folder / "manifest.json").write_text(json.dumps({"images": rows}))
    return folder


EXPECTED = {
    "mjhq30k": ["animals/id0-0.png", "animals/id0-1.png", "people/id1-0.png", "people/id1-1.png"],
    "geneval": [
        f"0000{i}/{name}"
        for i in range(2)
        for name in ("metadata.jsonl", "samples/0000.png", "samples/0001.png")
    ],
    "geneval2": ["00000.png", "00001.png", "image_paths.json"],
    "dpg_bench": ["p0.png", "p1.png"],
}


@pytest.mark.parametrize("benchmark", EXPECTED)
def test_prompts_and_layouts(benchmark: str, sources: dict[str, Path], tmp_path: Path) -> None:
    source, prompts = sources[benchmark], tmp_path / "prompts.csv"
    assert write_prompts(benchmark, source, prompts) == 2
    generated = generate(prompts, tmp_path / "made", per_prompt=2)
    out = tmp_path / "out"
    assert export_benchmark(benchmark, source, generated, out) == 2
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == EXPECTED[benchmark]
    if benchmark == "geneval":
        assert json.loads((out / "00001" / "metadata.jsonl").read_text())["prompt"] == "two dogs"
    if benchmark == "geneval2":
        paths = json.loads((out / "image_paths.json").read_text())
        assert list(paths) == ["a cat, sitting", "two dogs"]
        assert Path(paths["two dogs"]).read_bytes() == (generated / "00001-0.png").read_bytes()
    if benchmark == "dpg_bench":
        grid = np.asarray(Image.open(out / "p1.png"))
        assert grid.shape == (4, 8, 3)
        assert (grid[0, 0].tolist(), grid[0, 7].tolist()) == ([1, 0, 9], [1, 1, 9])
    with pytest.raises(ValueError, match="is there already"):
        export_benchmark(benchmark, source, generated, out)


def test_categories_of_real_and_generated_images_are_matched(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    write_prompts("mjhq30k", sources["mjhq30k"], tmp_path / "prompts.csv")
    generated = generate(tmp_path / "prompts.csv", tmp_path / "made")
    for name in ("animals/id0.jpg", "people/id1.jpg"):
        (tmp_path / "real" / name).parent.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "real" / name)
    classes = common_classes(open_images(tmp_path / "real"), open_images(generated))
    assert classes == (["animals", "people"], ["animals", "people"])


def test_what_does_not_fit_is_refused(sources: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"benchmark must be mjhq30k or .* got 'coco'"):
        read_benchmark("coco", sources["geneval"])
    with pytest.raises(ValueError, match="is not there: give the file or folder of prompts that geneval has"):
        read_benchmark("geneval", tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="holds no prompts of mjhq30k"):
        read_benchmark("mjhq30k", sources["geneval"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no prompts of dpg_bench"):
        read_benchmark("dpg_bench", tmp_path / "empty")
    write_prompts("geneval", sources["geneval"], tmp_path / "prompts.csv")
    with pytest.raises(ValueError, match="already there: give another place"):
        write_prompts("geneval", sources["geneval"], tmp_path / "prompts.csv")
    generated = generate(tmp_path / "prompts.csv", tmp_path / "made")
    rows = json.loads((generated / "manifest.json").read_text())["images"]
    (generated / "manifest.json").write_text(json.dumps({"images": rows[:1]}))
    with pytest.raises(
        ValueError, match="has no image of 1 of 2 prompts, first 00001: generate from the CSV"
    ):
        export_benchmark("geneval", sources["geneval"], generated, tmp_path / "out")
    rows[1]["prompt"] = "a fox"
    (generated / "manifest.json").write_text(json.dumps({"images": rows}))
    with pytest.raises(ValueError, match=r"00001.png was made of \'a fox\', but 00001 is \'two dogs\'"):
        export_benchmark("geneval", sources["geneval"], generated, tmp_path / "out")
    assert not (tmp_path / "out").exists()

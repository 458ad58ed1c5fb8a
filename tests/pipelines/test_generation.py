from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, EulerAncestralDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from mhla_diffusion import MHLAConfig, MHLADiTPipeline, MHLADiTTransformer2DModel, MHLAPipeline
from mhla_diffusion.files.locking import only_writer
from mhla_diffusion.files.sums import SUMS
from mhla_diffusion.pipelines.generation import MANIFEST, generate_images, save_grid
from tests.processes import run_script

SETTINGS: dict[str, Any] = {"num_images": 7, "batch_size": 3, "num_inference_steps": 2, "seed": 5}


def make_pipeline(scheduler: Any = None, num_classes: int = 3) -> MHLADiTPipeline:
    transformer = MHLADiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=1, sample_size=8, patch_size=2,
        num_embeds_ada_norm=num_classes, mhla_config=MHLAConfig(blocks=4),
    )  # fmt: skip
    with torch.no_grad():
        for parameter in transformer.parameters():  # a new model returns zero, whatever it is asked
            parameter.add_(0.1 * torch.rand_like(parameter))
    names = dict(enumerate("abcdefghij"[:num_classes]))
    return MHLADiTPipeline(transformer.eval(), scheduler or FlowMatchEulerDiscreteScheduler(), id2label=names)


def contents(folder: Path) -> dict[str, str]:
    """The digest of each PNG file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.png"))}


def test_files_and_manifest_agree_with_single_images(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    manifest = json.loads(generate_images(pipeline, tmp_path / "out", **SETTINGS).read_text())
    rows = manifest["images"]
    assert [row["file"] for row in rows] == [path.name for path in sorted((tmp_path / "out").glob("*.png"))]
    assert [row["class_id"] for row in rows] == [0, 1, 2, 0, 1, 2, 0]
    assert [row["class_name"] for row in rows] == list("abcabca")
    assert [row["seed"] for row in rows] == list(range(5, 12))
    assert manifest["complete"] is True
    assert manifest["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert len({*contents(tmp_path / "out").values()}) == 7, "each seed gives another image"
    for row in (rows[0], rows[5]):
        generator = torch.Generator().manual_seed(row["seed"])
        (alone,) = pipeline([row["class_id"]], generator=generator, num_inference_steps=2).images
        stored = np.asarray(Image.open(tmp_path / "out" / row["file"]), dtype=int)
        assert np.abs(stored - np.asarray(alone, dtype=int)).max() <= 1


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler(), EulerAncestralDiscreteScheduler()])
def test_an_interrupted_run_ends_with_the_same_files(tmp_path: Path, scheduler: Any) -> None:
    pipeline = make_pipeline(scheduler)
    generate_images(pipeline, tmp_path / "whole", **SETTINGS)
    calls = 0

    def interrupt(module: Any, *_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 4:  # in the second batch
            raise KeyboardInterrupt

    handle = pipeline.transformer.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        generate_images(pipeline, tmp_path / "cut", **SETTINGS)
    handle.remove()
    assert json.loads((tmp_path / "cut" / MANIFEST).read_text())["complete"] is False
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cut").glob("*.png")}
    assert len(before) == 3
    generate_images(pipeline, tmp_path / "cut", **SETTINGS)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert all(path.stat().st_mtime_ns == time for path, time in before.items()), "finished files are kept"


def test_a_batch_that_lost_a_file_is_made_again(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    generate_images(pipeline, tmp_path, **SETTINGS)
    expected = contents(tmp_path)
    (tmp_path / "000004.png").unlink()
    generate_images(pipeline, tmp_path, **SETTINGS)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize("noted", [{}, {"_noted": 1}], ids=["by this version", "by another"])
def test_what_diffusers_notes_of_itself_makes_no_other_run(tmp_path: Path, noted: dict[str, int]) -> None:
    pipeline = make_pipeline()
    manifest = generate_images(pipeline, tmp_path, **SETTINGS)
    expected, content = contents(tmp_path), json.loads(manifest.read_text())
    assert any(key.startswith("_") for key in content["scheduler"])
    own = {key: value for key, value in content["scheduler"].items() if not key.startswith("_")}
    manifest.write_text(json.dumps({**content, "scheduler": own | noted}))
    (tmp_path / "000004.png").unlink()
    generate_images(pipeline, tmp_path, **SETTINGS)
    assert contents(tmp_path) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 6}, r"holds another run \(images: 7 rows -> 7 rows\)"),
        ({"num_inference_steps": 3}, r"num_inference_steps: 2 -> 3"),
        ({"guidance_scale": 1.0, "batch_size": 2}, r"batch_size: 3 -> 2; guidance_scale: 4.0 -> 1.0"),
        ({"class_labels": ["b"]}, r"holds another run"),
    ],
)
def test_another_run_is_not_mixed_in(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    pipeline = make_pipeline()
    generate_images(pipeline, tmp_path, **SETTINGS)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=message):
        generate_images(pipeline, tmp_path, **SETTINGS | change)
    assert contents(tmp_path) == before


def test_more_samples_are_added(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    generate_images(pipeline, tmp_path / "more", **SETTINGS)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "more").glob("*.png")}
    generate_images(pipeline, tmp_path / "more", **SETTINGS | {"num_images": 11})
    generate_images(pipeline, tmp_path / "whole", **SETTINGS | {"num_images": 11})
    assert contents(tmp_path / "more") == contents(tmp_path / "whole")
    kept = [path for path, time in before.items() if path.stat().st_mtime_ns == time]
    assert len(kept) == 6, "whole batches of 3 stay"
    with pytest.raises(ValueError, match="11 rows -> 7 rows"):
        generate_images(pipeline, tmp_path / "more", **SETTINGS)


def test_settings_may_change_while_nothing_is_made(tmp_path: Path) -> None:
    pipeline = make_pipeline()
    with pytest.raises(ValueError, match="height"):
        generate_images(pipeline, tmp_path, **SETTINGS, height=7)
    assert (tmp_path / MANIFEST).is_file(), "the run had begun"
    generate_images(pipeline, tmp_path, **SETTINGS)
    assert len(contents(tmp_path)) == SETTINGS["num_images"]


def test_another_model_is_not_mixed_in(tmp_path: Path) -> None:
    generate_images(make_pipeline(), tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=r"weights_sha256"):
        generate_images(make_pipeline(), tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match=r"scheduler"):
        generate_images(make_pipeline(DDIMScheduler()), tmp_path, **SETTINGS)


def test_bad_settings_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    pipeline, out = make_pipeline(), tmp_path / "out"
    for change, message in (
        ({"num_images": 0}, "num_images must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"height": -8}, "height must be at least 1, got -8"),
        ({"seed": -1}, "seed must be a whole number from 0 to .*, got -1"),
        ({"seed": 1.5}, r"seed must be a whole number from 0 to .*, got 1\.5"),
        ({"seed": None}, "seed must be a whole number from 0 to .*, got None"),
        ({"num_images": 1.5}, r"num_images must be a whole number, got 1\.5"),
        ({"seed": 2**63 - 3}, f"seed must lie between 0 and .*, got {2**63}"),
        ({"options": {"latents": 1}}, "options latents cannot be given"),
        ({"class_labels": [3]}, "class id 3 is out of range: the model knows 0 to 2"),
        ({"class_labels": []}, "class_labels is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            generate_images(pipeline, out, **SETTINGS | change)
    assert not out.exists()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds files but no manifest.json"):
        generate_images(pipeline, tmp_path, **SETTINGS)


def test_the_grid_has_a_column_for_each_class(tmp_path: Path) -> None:
    generate_images(make_pipeline(), tmp_path / "out", **SETTINGS)
    save_grid(tmp_path / "out", tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    # 7 images of 3 classes: 2 of each at least. Small ones are enlarged, from 8 pixels to 64.
    assert grid.shape[:2] == (2 * 64, 3 * 64)
    first = np.asarray(Image.open(tmp_path / "out" / "000004.png"))
    np.testing.assert_array_equal(grid[64::8, 64:128:8, 0], first)


def test_files_that_are_not_what_was_written_are_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline, files = make_pipeline(), [tmp_path / f"00000{number}.png" for number in range(7)]
    generate_images(pipeline, tmp_path, **SETTINGS)
    whole = contents(tmp_path)
    damages: list[Callable[[Path], Any]] = [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:60]),
        lambda path: shutil.copy(files[0], path),
        lambda path: path.unlink(),
    ]
    for damage in damages:
        kept = files[0].stat().st_mtime_ns
        damage(files[5])
        generate_images(pipeline, tmp_path, **SETTINGS)
        assert contents(tmp_path) == whole
        assert files[0].stat().st_mtime_ns == kept
    assert caplog.text.count("000005.png: not what this run wrote, and made again") == 3
    # A folder of an earlier version, which wrote no hashes: what can be decoded counts.
    (tmp_path / SUMS).unlink()
    files[5].write_bytes(files[5].read_bytes()[:60])
    generate_images(pipeline, tmp_path, **SETTINGS)
    assert contents(tmp_path) == whole


def test_two_runs_at_once_in_one_folder_are_refused(tmp_path: Path) -> None:
    with only_writer(tmp_path), pytest.raises(ValueError, match="another process is writing to"):
        generate_images(make_pipeline(), tmp_path, **SETTINGS)


def test_the_script_gives_the_same_files_in_one_and_two_processes(tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path / "model")
    arguments = (
        f"--model {tmp_path / 'model'} --num 7 --batch_size 3 --steps 2 --seed 5 --classes [a,2]".split()
    )
    one, two = tmp_path / "one", tmp_path / "two"
    run_script("generate", "image", *arguments, "--out", one).check_returncode()
    pair = run_script("generate", "image", *arguments, "--out", two, num_processes=2)
    pair.check_returncode()
    assert "2 processes share the work" in pair.stderr
    assert contents(one) == contents(two)
    assert len(contents(one)) == 7
    rows = json.loads((two / MANIFEST).read_text())["images"]
    assert [row["class_id"] for row in rows] == [0, 2, 0, 2, 0, 2, 0]
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "model")
    shutil.rmtree(one)
    generate_images(pipeline, one, **SETTINGS, class_labels=["a", 2])
    assert contents(one) == contents(two)

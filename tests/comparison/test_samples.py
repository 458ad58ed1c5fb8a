"""Runs of generation: the real trainer, generation and score, on a few small pictures."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from mhla_diffusion.comparison import (
    Comparison,
    Images,
    Measure,
    Variant,
    Videos,
    compare_attention,
    measured,
    write_page,
)
from mhla_diffusion.comparison.config import Run, runs_of, screening_runs
from mhla_diffusion.comparison.measured import MeasuredRun, common_start
from mhla_diffusion.comparison.media import frame_change
from mhla_diffusion.comparison.runs import left_out
from mhla_diffusion.comparison.screen import Screen
from mhla_diffusion.evaluation.networks import images as networks
from mhla_diffusion.scoring import open_source
from mhla_diffusion.training.data import toys
from tests.extractors import quarters

SAVED = Path(__file__).parents[1] / "saved"
SOFTMAX, LINEAR = Variant("softmax", "softmax"), Variant("linear", "linear")
BOTH = Variant("softmax + both", "softmax", {"cpe": "zero", "gate": True})


@pytest.fixture(autouse=True)
def _small_extractor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "_efficientnet_lite0", quarters)


@pytest.fixture
def task(tmp_path: Path) -> Images:
    """20 pictures of 8 x 8 in 2 classes to train on, 20 more to score against; 16 tokens, 3 steps."""
    for split in ("train", "test"):
        pixels = np.random.default_rng(len(split)).integers(0, 256, (20, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / f"{split}.npz", arr_0=pixels, labels=np.arange(20) % 2)
    base = {
        "output_dir": "runs/nothing",
        "model": {
            "sample_size": 8, "patch_size": 2, "in_channels": 1, "num_layers": 2, "num_attention_heads": 2,
            "attention_head_dim": 8, "num_embeds_ada_norm": 2, "mhla": {"blocks": 4, "gate": True},
        },
        "data": {"source": "npz", "path": str(tmp_path / "train.npz")},
        "trainer": {"max_steps": 3, "batch_size": 4, "checkpoint_every": 1},
        "sampling": {"num_inference_steps": 2, "guidance_scale": 1.0},
    }  # fmt: skip
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    return Images(
        base=str(tmp_path / "base.yaml"), held_out={"data.path": str(tmp_path / "test.npz")}, num_samples=6,
        num_real=20, calls=1, analyzed=1,
    )  # fmt: skip


def test_runs_start_from_the_same_weights_where_names_and_shapes_agree(task: Images, tmp_path: Path) -> None:
    variants = [SOFTMAX, LINEAR, BOTH, Variant("MHLA", mhla={"cpe": "zero", "feature_map": "hedgehog"})]
    starts = [common_start(task.config(variant, 1, tmp_path)).state_dict() for variant in variants]
    names = set.intersection(*(set(start) for start in starts))
    assert sum("attn1.to_q.weight" in name for name in names) == 2
    assert len(starts[2]) > len(starts[0]) == len(names)
    for start in starts[1:]:
        assert all(torch.equal(start[name], starts[0][name]) for name in names)
    other = common_start(task.config(SOFTMAX, 2, tmp_path)).state_dict()
    assert not torch.equal(other["proj_out_2.bias"], 1 + starts[0]["proj_out_2.bias"])
    assert any(not torch.equal(other[name], starts[0][name]) for name in names)


def test_a_variant_has_its_attention_and_its_own_settings_of_training(task: Images, tmp_path: Path) -> None:
    fast = Variant("fast", mhla={"cpe": "zero"}, training={"trainer.optimizer.mixing_rate": 10})
    config = task.config(fast, 3, tmp_path)
    assert config.trainer.optimizer.mixing_rate == 10
    assert (config.trainer.seed, config.model.attention) == (3, "mhla")
    assert (config.model.mhla.blocks, config.model.mhla.cpe, config.model.mhla.gate) == (4, "zero", False)
    assert task.config(SOFTMAX, 0, tmp_path).model.attention == "softmax"
    assert task.config(BOTH, 0, tmp_path).model.mhla.local == "only"
    assert "data.path" not in task.record
    assert "training" not in SOFTMAX.record


def test_the_mixing_has_a_learning_rate_of_its_own(task: Images, tmp_path: Path) -> None:
    moved = {}
    for rate in (0, 1, 10):
        variant = Variant("MHLA", training={"trainer.optimizer.mixing_rate": rate})
        run = MeasuredRun(task, task.config(variant, 0, tmp_path / str(rate)), tmp_path, "cpu")
        start = common_start(run.config).state_dict()
        run._train()
        name = "transformer_blocks.0.attn1.processor.mixing"
        moved[rate] = (run.model.state_dict()[name] - start[name]).abs().max().item()
    assert moved[0] == 0 < 2 * moved[1] < moved[10]


def test_a_run_that_was_stopped_ends_as_one_that_was_not(task: Images, tmp_path: Path) -> None:
    results = {}
    for name in ("whole", "stopped"):
        folder = tmp_path / name / "softmax + both" / "0"
        task.prepare(folder.parents[1])
        if name == "stopped":
            short = dataclasses.replace(task, training={"trainer.max_steps": 2})
            run = MeasuredRun(short, short.config(BOTH, 0, folder / "training"), folder, "cpu")
            run._train()
            (folder / "training/pipeline").rename(tmp_path / "early")
        results[name] = task.train(BOTH, 0, folder, "cpu")
        assert not (folder / "samples").exists()
        assert (folder / "sheet.png").is_file()
    for found in results.values():
        del found["seconds_per_step"]
    assert results["whole"] == results["stopped"]
    found = results["whole"]
    assert found["frechet"] > 0
    assert len(found["loss_by_time"]) == 10
    assert [step for step, _ in found["curve"]] == [1, 2, 3]
    assert found["peak_bytes"] > 0
    assert [(layer["kind"], layer["tokens"]) for layer in found["attention"]] == [("softmax", 16)] * 2
    assert task.trained(BOTH, folder).config.attention == "mhla"
    assert task.trained(BOTH, tmp_path / "nothing") is None


def test_clips_are_trained_generated_and_scored_by_the_same_code(
    tmp_path: Path, clip_training: dict[str, Any]
) -> None:
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(clip_training))
    task = Videos(
        base=str(tmp_path / "base.yaml"), num_samples=3, num_real=4, calls=1, analyzed=1,
        training={"trainer.max_steps": 2, "sampling.num_inference_steps": 2},
        held_out={"data.moving_digits.first_clip": 50},
    )  # fmt: skip
    assert (task.grid, task.tokens, task.default_blocks) == ((2, 3, 3), 18, [1, 1, 2])
    task.prepare(tmp_path)
    train, real = (
        open_source(c).load(0, torch.Generator().manual_seed(0))["samples"]
        for c in (task.config(LINEAR, 0, tmp_path), task.real_config(tmp_path))
    )
    assert train.shape == real.shape
    assert not torch.equal(train, real)
    folder = tmp_path / "linear/0"
    found = task.train(LINEAR, 0, folder, "cpu")
    assert found["frechet"] > 0
    assert found["attention"][0]["kind"] == "linear"
    assert Image.open(folder / "sheet.png").size == (3 * 24, 4 * 24)
    assert 0 < found["frame_change"] != found["real_frame_change"] > 0
    comparison = Comparison("clips", [LINEAR], task, seeds=[0])
    record = {**json.loads(json.dumps(Run(task, LINEAR, 0).record)), "device": "cpu", **found}
    text = write_page(comparison, [record], tmp_path, "mhla compare-attention").read_text()
    assert f"| linear | {found['frame_change']:.2f} (one seed) |" in text
    assert f"| held-out clips | {found['real_frame_change']:.2f} |" in text


def test_frames_change_by_their_mean_difference() -> None:
    still = np.full((3, 4, 4, 3), 200, np.uint8)
    blinking = np.stack([np.full((4, 4, 3), level, np.uint8) for level in (255, 0, 255)])
    assert frame_change([still]) == 0
    assert frame_change([still, blinking]) == 255 / 2


def test_colour_pictures_of_texts_are_generated_from_held_out_captions(tmp_path: Path) -> None:
    base = yaml.safe_load(Path("configs/image_pixart_scenes.yaml").read_text())
    base["text"] = {"encoder": str(SAVED / "training-video/text"), "max_length": 8}
    base["model"] |= {
        "mhla": {"blocks": [2, 2]},
        "num_layers": 1,
        "num_attention_heads": 1,
        "attention_head_dim": 16,
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    task = Images(
        base=str(tmp_path / "base.yaml"), num_samples=3, num_real=4, calls=1, analyzed=1,
        training={"trainer.max_steps": 1, "trainer.batch_size": 2, "sampling.num_inference_steps": 1,
                  "sampling.every": 0, "data.scenes.side": 32},
        held_out={"data.scenes.held_out": True},
    )  # fmt: skip
    task.prepare(tmp_path)
    folder = tmp_path / "MHLA/0"
    run = MeasuredRun(task, task.config(Variant("MHLA"), 0, folder / "training"), folder, "cpu")
    found = run.results()
    assert found["frechet"] > 0
    assert (sheet := Image.open(folder / "sheet.png")).size == (3 * 32, 32)
    assert sheet.mode == "RGB"
    held_out = [scene.caption for scene in toys.all_scenes(held_out=True)]
    assert task.captions(run) == held_out[:3]
    assert not set(held_out) & {scene.caption for scene in toys.all_scenes(held_out=False)}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"base": "nowhere.yaml"}, "nowhere.yaml is no file"),
        ({"base": "README.md"}, "README.md holds none"),
        ({"held_out": {}}, "held_out must say"),
        ({"num_samples": 1}, "num_samples must be 2 or more"),
        ({"training": {"trainer.max_stepz": 3}}, "did you mean trainer.max_steps"),
        ({"training": {"trainer.max_steps": "many"}}, "trainer.max_steps"),
        ({"extractor": "magic"}, "magic"),
        ({"num_real": 21}, "at most the 20 held-out samples"),
        ({"training": {"data.path": "nowhere.npz"}}, "nowhere.npz does not exist"),
        ({"held_out": {"data.path": "gone.npz"}}, "gone.npz does not exist"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_trained(
    task: Images, tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises(ValueError, match=told):
        compare_attention(
            Comparison("c", [SOFTMAX], dataclasses.replace(task, **changes), seeds=[0]), tmp_path / "out"
        )
    assert not list(tmp_path.glob("out/*/*"))


@pytest.mark.parametrize("training", [{"trainer.max_steps": 30}, {"trainer": {"max_steps": 30}}], ids=str)
def test_what_is_others_in_a_section_leaves_the_rest_of_it(
    task: Images, tmp_path: Path, training: dict[str, Any]
) -> None:
    plain = task.config(LINEAR, 0, tmp_path)
    its = dataclasses.replace(LINEAR, training=training)
    for config in (
        task.config(its, 0, tmp_path),
        task.replaced({"training": training}).config(LINEAR, 0, tmp_path),
    ):
        assert (config.trainer.max_steps, config.trainer.batch_size) == (30, plain.trainer.batch_size)
        assert config.sampling == plain.sampling
    held_out = dataclasses.replace(task, held_out={"data": {"path": "x.npz"}})
    assert held_out.real_config(tmp_path).data.source == "npz"
    assert its.shortened(0.25).training["trainer.max_steps"] == 8
    assert LINEAR.shortened(0.25) == LINEAR


def test_what_changes_results_is_another_run(task: Images, tmp_path: Path) -> None:
    def path(**training: Any) -> Path:
        return Run(dataclasses.replace(task, training=training), Variant("MHLA"), 0).path

    blocks, captions = "model.mhla.blocks", "data.captions"
    different: list[dict[str, Any]] = [
        {}, {blocks: [2, 2]}, {blocks: [1, 2]}, {captions: "a.csv"}, {captions: "b.csv"},
        {"data.path": "c.npz"},
    ]  # fmt: skip
    assert len({path(**training) for training in different}) == len(different)
    assert path(**{"data.path": str(tmp_path / "elsewhere" / "train.npz"), "trainer.log_every": 3}) == path()
    assert path(model={"mhla": {"blocks": [2, 2]}}) == path(**{blocks: [2, 2]})


def test_tasks_are_known_by_their_kind() -> None:
    for setting, told in (
        ({"base": 5}, "base of the task images must be a text, got 5"),
        ({"training": [1]}, "training of the task images must be a map of keys to values"),
        ({"held_out": "x"}, "held_out of the task images must be a map of keys to values"),
    ):
        with pytest.raises(ValueError, match=told):
            Comparison(
                "c", [SOFTMAX], {"kind": "images", "base": "a", "extractor": "b", "held_out": {}, **setting}
            )
    with pytest.raises(ValueError, match="start_side of the task recall must be an integer or null, got '2'"):
        Comparison("c", [SOFTMAX], {"start_side": "2"})
    with pytest.raises(ValueError, match=r"task\.kind must be one of classification, images, language, rec"):
        Comparison("c", [SOFTMAX], {"kind": "sounds"})
    with pytest.raises(ValueError, match="the task images needs base"):
        Comparison("c", [SOFTMAX], {"kind": "images"})
    with pytest.raises(ValueError, match="unknown settings side; the task images has"):
        Comparison("c", [SOFTMAX], {"kind": "images", "side": 3})


def test_a_page_has_tables_curves_and_samples(task: Images, tmp_path: Path) -> None:
    comparison = Comparison("small", [SOFTMAX, LINEAR], task, {"model.patch_size": [2, 4]}, [0, 1])
    found = []
    for number, (variant, seed) in enumerate([(SOFTMAX, 0), (SOFTMAX, 1), (LINEAR, 0), (LINEAR, 1)]):
        run = Run(next(comparison.tasks()), variant, seed)
        layers = [{"kind": variant.attention, "rank": 9.0, "entropy": 2.0}]
        results = {
            "frechet": 100.0 + 100 * (number // 2) + seed, "loss": 0.2, "loss_by_time": [0.1] * 10,
            "curve": [[1, 1.0], [2, 0.5]], "seconds_per_step": 0.1, "parameters": 1000, "peak_bytes": 2**21,
            "attention": layers,
        }  # fmt: skip
        found.append({**json.loads(json.dumps(run.record)), "device": "cpu", **results})
        sheet = (tmp_path / "out" / run.path).with_suffix("") / "sheet.png"
        sheet.parent.mkdir(parents=True)
        Image.new("L", (80, 8), 128).save(sheet)
    page = write_page(comparison, found, tmp_path, "mhla compare-attention", out=tmp_path / "out")
    text = page.read_text()
    assert "**Incomplete: 4 of 8 runs are done.**" in text
    assert "| softmax | **100.5 ± 6.4 (sd 0.7)** | 0.2000 ± 0.0000 (sd 0.0000) |" in text
    assert "| linear | 200.5 ± 6.4 (sd 0.7) |" in text
    assert "9 / 2.00" in text
    assert "| softmax | 100.0 |  | 2 |  | 1,000 |" in text
    assert Image.open(tmp_path / "small-samples-0.png").height == 2 * (2 * 8 + 4)
    assert (tmp_path / "small-curves-0.png").is_file()
    assert not (tmp_path / "small-curves-1.png").exists()


def test_screening_leaves_out_what_is_clearly_beaten(task: Images, tmp_path: Path) -> None:
    names = ["best", "near", "beaten", "kept"]
    screen = Screen(share=0.4, margin=0.5, keep=("kept",))
    comparison = Comparison("c", [Variant(name) for name in names], task, seeds=[3, 4], screen=screen)
    runs = [*screening_runs(comparison).values()]
    assert [run.task.steps for run in runs] == [1] * 4
    assert [run.seed for run in runs] == [3] * 4
    found = [{**run.record, "frechet": value} for run, value in zip(runs, (10, 14.9, 15.1, 99), strict=True)]
    assert {name for _, name in left_out(comparison, found[:3])} == {"beaten"}, "by any, it is so by all"
    out = left_out(comparison, found)
    assert {name: value for (_, name), value in out.items()} == {"beaten": 15.1}
    assert [run.variant.name for run in runs_of(comparison) if run.key in out] == ["beaten"] * 2
    text = write_page(comparison, [], tmp_path, "mhla", screened=out).read_text()
    assert "0 of 6 runs are done" in text
    assert "| 16 | beaten | 15.1 |" in text
    assert "worse than the best by more than 50%" in text
    higher = Measure("accuracy", "Accuracy", lower_is_better=False)
    assert screen.beaten({"a": 0.9, "b": 0.61, "c": 0.59, "kept": 0.1}, higher) == ["c"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"share": 0}, "above 0 and at most 1"),
        ({"share": 1.5}, "above 0 and at most 1"),
        ({"margin": 0}, "above 0"),
        ({"keep": ("x",)}, "got x"),
    ],
)
def test_screening_that_cannot_be_is_refused(task: Images, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Comparison("c", [SOFTMAX], task, screen=Screen(**settings))


def test_without_settings_what_is_worse_by_three_tenths_is_left_out_after_a_quarter_of_the_steps() -> None:
    lower = Measure("loss", "Loss", lower_is_better=True)
    assert Screen().beaten({"a": 10, "b": 12.9, "c": 13.1}, lower) == ["c"]
    assert Screen().share == 0.25


def test_a_step_takes_its_batch_over_the_samples_of_a_second(task: Images, tmp_path: Path) -> None:
    run = MeasuredRun(task, task.config(LINEAR, 0, tmp_path), tmp_path, "cpu")
    lines = [{"step": i, "loss": 0.5, "samples_per_second": rate} for i, rate in enumerate((10, 8, 40))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = run._progress()
    assert found["seconds_per_step"] == pytest.approx(0.4)
    assert found["curve"] == [[0, 0.5], [1, 0.5], [2, 0.5]]


def test_losses_are_of_the_calls_of_each_tenth_of_the_time(
    task: Images, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dataclasses.replace(task, calls=3)
    run = MeasuredRun(task, task.config(LINEAR, 0, tmp_path), tmp_path, "cpu")
    run.model = run.calls = None
    monkeypatch.setattr(measured, "losses", lambda model, calls, numbers: [float(n) for n in numbers])
    found = run._losses()
    assert found["loss"] == 29 / 2
    assert found["loss_by_time"] == [n + 10.0 for n in range(10)]


@pytest.mark.parametrize(
    "other", [{"num_real": 19}, {"extractor": "inception"}, {"held_out": {"data.path": "other.npz"}}], ids=str
)
def test_statistics_of_other_samples_or_features_have_a_name_of_their_own(
    task: Images, other: dict[str, Any]
) -> None:
    assert dataclasses.replace(task, num_samples=7).real_name == task.real_name
    assert dataclasses.replace(task, **other).real_name != task.real_name

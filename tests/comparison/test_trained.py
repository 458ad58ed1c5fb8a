"""Tasks on models of transformers: one start for all variants, results that say something, going on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mhla_diffusion.comparison import Classification, Comparison, Language, Variant, write_page
from mhla_diffusion.comparison.config import runs_of
from mhla_diffusion.comparison.language import tokens_per_second
from mhla_diffusion.comparison.runs import records

SOFTMAX, LINEAR, MHLA = Variant("softmax", "softmax"), Variant("linear", "linear"), Variant("MHLA")
DIGITS = Classification(path="mnist", patch_size=7, layers=1, heads=1, steps=30, batch_size=64)
BYTES = Language(context=64, block_size=8, layers=1, heads=1, steps=20, batch_size=8, short=16, long=32)


@pytest.mark.parametrize("variant", [SOFTMAX, MHLA], ids=lambda variant: variant.name)
def test_digits_are_learned_beyond_chance_and_a_run_that_is_done_is_only_read(
    variant: Variant, tmp_path: Path
) -> None:
    found = DIGITS.train(variant, 0, tmp_path, "cpu")
    assert found["accuracy"] > 0.15  # chance is 0.1
    again = DIGITS.train(variant, 0, tmp_path, "cpu")
    assert (again["accuracy"], again["loss"]) == (found["accuracy"], found["loss"])


def test_a_page_has_maps_of_the_mixing_that_was_trained(tmp_path: Path) -> None:
    task = dataclasses.replace(DIGITS, steps=2, layers=2)
    comparison, out = Comparison("digits", [SOFTMAX, MHLA], task, seeds=[0]), tmp_path / "runs"
    for run in runs_of(comparison):
        path = out / run.path
        path.parent.mkdir(parents=True)
        found = task.train(run.variant, 0, path.with_suffix(""), "cpu")
        path.write_text(json.dumps({**run.record, "device": "cpu", **found}))
    trained = task.trained(MHLA, path.with_suffix(""))
    first = trained.get_submodule("vit.layers.0.attention.mhla").mixing
    assert not torch.equal(first, task.model(MHLA, 0).get_submodule("vit.layers.0.attention.mhla").mixing)
    page = write_page(comparison, records(comparison, out), tmp_path, "mhla", out=out)
    assert "after training, in colours from 0 to the largest weight; seed 0" in page.read_text()
    width, height = Image.open(tmp_path / "digits-mixing-0.png").size
    assert width > height  # one variant of two layers: softmax has none
    path.unlink()
    write_page(comparison, [], tmp_path / "again", "mhla", out=out)
    assert not list(tmp_path.glob("again/*.png"))


def test_bytes_are_learned_beyond_chance(tmp_path: Path) -> None:
    found = BYTES.train(MHLA, 0, tmp_path, "cpu")
    assert 1 < found["perplexity"] < 200  # chance is 256
    assert min(found["tokens_per_second_short"], found["seconds_per_step"]) > 0


@pytest.mark.parametrize("task", [DIGITS, BYTES], ids=["classification", "language"])
def test_all_variants_of_a_seed_start_alike(task: Classification | Language) -> None:
    first, *others = (task.model(variant, 3).state_dict() for variant in (SOFTMAX, LINEAR, MHLA))
    assert all(torch.equal(other[key], value) for other in others for key, value in first.items())
    assert not all(torch.equal(task.model(SOFTMAX, 4).state_dict()[key], first[key]) for key in first)


def test_no_held_out_digit_is_trained_on() -> None:
    trained, held_out = (
        {picture["pixel_values"].numpy().tobytes() for picture in DIGITS.pictures(split)}
        for split in ("train", "test")
    )
    assert len(held_out) > 900
    assert len(trained) > 3_900
    assert not trained & held_out


def test_no_held_out_window_is_trained_on_and_speed_is_taken_with_every_attention() -> None:
    held_out, trained = BYTES.windows(held_out=True), BYTES.windows(held_out=False)
    assert len(held_out) == 200
    assert len(trained) > 10_000
    assert all(tokens_per_second(BYTES.model(variant, 0), 40) > 0 for variant in (SOFTMAX, MHLA))


def test_what_a_task_cannot_do_is_refused_before_anything_runs() -> None:
    for variant, message in (
        ({"attention": "softmax", "mhla": {"gate": True}}, "softmax of language is that of transformers"),
        ({"mhla": {"cpe": "zero"}}, "causal MHLA has no cpe"),
    ):
        with pytest.raises(ValueError, match=message):
            Comparison("x", [Variant("variant", **variant)], {"kind": "language"})  # type: ignore[arg-type]

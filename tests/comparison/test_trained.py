"""Tasks on models of transformers: one start for all variants, results that say something, going on."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import Trainer

from mhla_diffusion.comparison import Classification, Comparison, Language, Variant, language, write_page
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


def test_perplexity_is_of_the_loss_and_speed_of_each_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = SimpleNamespace(model=None, evaluate=lambda windows: {"eval_loss": math.log(7)})
    monkeypatch.setattr(Language, "fit", lambda *_: (trainer, {}))
    monkeypatch.setattr(Language, "windows", lambda *_, **__: [])
    monkeypatch.setattr(language, "tokens_per_second", lambda model, length: float(length))
    found = BYTES.train(MHLA, 0, tmp_path, "cpu")
    assert found == {
        "perplexity": pytest.approx(7), "tokens_per_second_short": 16, "tokens_per_second_long": 32,
    }  # fmt: skip


def test_speed_is_of_the_median_time_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    times = (time for token in range(32) for time in (token, token + (0.25 if token else 0.75)))
    monkeypatch.setattr(language, "time", SimpleNamespace(perf_counter=lambda: next(times)))
    assert tokens_per_second(BYTES.model(LINEAR, 0), 8) == 4


def test_speed_is_not_compared_seed_by_seed(tmp_path: Path) -> None:
    comparison = Comparison("bytes", [SOFTMAX, MHLA], BYTES, seeds=[0, 1])
    values = dict.fromkeys((metric.key for metric in BYTES.metrics), 2.0)
    found = [
        {**run.record, "device": "cpu", "seconds_per_step": 0.1, "parameters": 9, **values}
        for run in runs_of(comparison)
    ]
    text = write_page(comparison, json.loads(json.dumps(found)), tmp_path, "x").read_text()
    assert "Perplexity of a held-out byte, less" in text
    assert "Tokens a second behind few others, less" not in text


class Noted(list[dict[str, Tensor]]):
    """Pictures, and the numbers of those that were asked for."""

    def __init__(self, size: int) -> None:
        super().__init__(
            {"pixel_values": torch.randn(1, 28, 28), "labels": torch.tensor(0)} for _ in range(size)
        )
        self.order: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.order.append(index)
        return super().__getitem__(index)


def test_the_seed_shuffles_the_data_the_same_way_for_all_variants(tmp_path: Path) -> None:
    task, orders = dataclasses.replace(DIGITS, steps=1, batch_size=8), []
    for name, (variant, seed) in {"a": (SOFTMAX, 1), "b": (MHLA, 1), "c": (SOFTMAX, 2)}.items():
        data = Noted(16)
        task.fit(variant, seed, tmp_path / name, "cpu", data)
        orders.append(data.order[:8])
    assert orders[0] == orders[1] != orders[2]


def test_a_run_that_was_stopped_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, data = dataclasses.replace(DIGITS, steps=4, batch_size=4, checkpoint_every=2), Noted(16)
    dataclasses.replace(task, steps=2).fit(LINEAR, 0, tmp_path, "cpu", data)
    train, resumed = Trainer.train, []

    def noted(self: Trainer, resume_from_checkpoint: Any = None) -> Any:
        resumed.append(resume_from_checkpoint)
        return train(self, resume_from_checkpoint=resume_from_checkpoint)

    monkeypatch.setattr(Trainer, "train", noted)
    state = tmp_path / "checkpoint-2" / "trainer_state.json"
    clock = json.loads(state.read_text())
    assert 0 < clock["stateful_callbacks"]["Clock"]["attributes"]["seconds"] < 10
    clock["stateful_callbacks"]["Clock"]["attributes"]["seconds"] = 400.0
    state.write_text(json.dumps(clock))
    (tmp_path / "checkpoint-3").mkdir()  # of which the process was killed
    (tmp_path / "checkpoint-3" / "model.safetensors").write_bytes(b"half")
    trainer, found = task.fit(LINEAR, 0, tmp_path, "cpu", data)
    assert resumed == [str(tmp_path / "checkpoint-2")]
    assert trainer.state.global_step == 4
    assert 100 < found["seconds_per_step"] < 110, "of all steps, those before the checkpoint too"
    weights = {name: weight.clone() for name, weight in trainer.model.state_dict().items()}
    trainer, again = task.fit(LINEAR, 0, tmp_path, "cpu", data)
    assert len(resumed) == 1, "what was stopped behind its training is not trained on"
    assert task.trained(LINEAR, tmp_path) is not None
    assert again == found
    assert all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "stateful_callbacks": {}}))
    task.fit(LINEAR, 0, tmp_path, "cpu", data)
    assert resumed[1:] == [None], "without the time of its steps it begins anew"


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


def test_pictures_of_idx_files_are_those_of_the_split(tmp_path: Path) -> None:
    for prefix, label in (("train", 3), ("t10k", 8)):
        for name, shape in (("images-idx3", (2, 28, 28)), ("labels-idx1", (2,))):
            head = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            (tmp_path / f"{prefix}-{name}-ubyte").write_bytes(head + bytes([label] * math.prod(shape)))
    task = dataclasses.replace(DIGITS, path=str(tmp_path))
    labels = {split: [int(x["labels"]) for x in task.pictures(split)] for split in ("train", "test")}
    assert labels == {"train": [3, 3], "test": [8, 8]}


def test_no_held_out_window_is_trained_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = range(1, 31)
    for number in files:
        (tmp_path / f"{number:02}.py").write_bytes(bytes([number]) * 200)
    monkeypatch.setattr(language.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    held_out, trained = (
        {byte for window in BYTES.windows(held_out=which) for byte in window["input_ids"].tolist()}
        for which in (True, False)
    )
    between = {0}
    assert held_out - between == {1, 11, 21}
    assert trained - between == {*files} - held_out


def test_windows_are_many_and_speed_is_taken_with_every_attention() -> None:
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

"""The benchmark of whole models measures what it says; its times are not tested."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mhla_diffusion.benchmarks import model as benchmark
from mhla_diffusion.benchmarks.layer import layer
from mhla_diffusion.benchmarks.model import model
from mhla_diffusion.benchmarks.operator import operator
from tests.backbones.cases import CASES, Case

from .tables import cells


def test_model_writes_times_of_every_attention(tmp_path: Path) -> None:
    text = model([64, 128], layers=1, heads=2, head_dim=8, repeats=1, out=tmp_path, device="cpu")
    assert [line.split(" | ")[:4] for line in text.splitlines()[4:]] == [
        ["| 64", "16", "2", "denoising"],
        ["| 64", "16", "2", "training"],
        ["| 128", "64", "4", "denoising"],
        ["| 128", "64", "4", "training"],
    ]
    record = json.loads((tmp_path / "model.json").read_text())
    assert len(record["measurements"]) == 6
    assert (tmp_path / "model.png").read_bytes().startswith(b"\x89PNG")
    counted = model(
        [64], ["mhla", "softmax"], layers=1, heads=2, head_dim=8, repeats=1, device="cpu", training=False,
        processor_time=True, mhla={"local": "shared", "local_margin": 1},
    )  # fmt: skip
    assert "float32, processor time" in counted
    assert "mhla with {'local': 'shared', 'local_margin': 1}" in counted
    assert "| training |" not in counted


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_any_backbone_is_timed_with_every_attention_that_it_can_have(case: Case, tmp_path: Path) -> None:
    case.stock().save_config(tmp_path)
    side = 2 * case.make().latents_per_token[-1] * case.model.vae_stride[-1]
    frames = 9 if len(case.grids[0]) == 3 else None
    text = model([side], backbone=str(tmp_path), layers=1, frames=frames, repeats=1, device="cpu")
    title, _, head, _, denoising, training = text.splitlines()
    assert f"{tmp_path}, 1 layer" in title
    assert ("softmax, ms" in head) == (case.stock_kind == "softmax")
    assert "| denoising |" in denoising
    assert "| training |" in training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backbone": "Sana-0.6B", "attentions": ["softmax"]}, "attentions must be of mhla, linear, got"),
        ({"backbone": "DiT-S/2", "frames": 9}, "makes images, which have no frames"),
        ({"backbone": "Lumina-Next-2B", "head_dim": 9}, "has no attention_head_dim of its own"),
        ({"backbone": "HunyuanDiT-v1.2", "layers": 3}, "1 layer or an even number"),
        ({"backbone": "Sana-0.6B", "sizes": [1000]}, "does not divide into tokens of 32"),
        ({"backbone": "Sana-0.7B"}, "did you mean Sana-"),
        ({"device": "gpu"}, "device 'gpu' cannot be used: choose one of cpu"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"sizes": []}, "the number of sizes must be at least 1, got 0"),
        (
            {"mhla": {"local": "near"}},
            "local must be one of None, 'shared', 'gate', 'only', 'auto', got 'near'",
        ),
        (
            {"mhla": {"local": "auto"}, "attentions": ["linear"]},
            r"settings of mhla are given, which is not among the attentions \['linear'\]",
        ),
        ({"sizes": [64, 128, 64]}, "sizes must differ, got 64 more than once"),
        ({"attentions": ["mhla", "mhla"]}, "attentions must differ, got 'mhla' more than once"),
        ({"seconds": 0}, "seconds must be above 0, got 0"),
        ({"mhla": {"blocks": 4}}, "blocks are those recommended for each size, got blocks=4"),
    ],
    ids=str,
)
def test_what_cannot_be_timed_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model(**arguments)


def test_results_of_before_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "operator.json").write_text("{}")
    (tmp_path / "layer.md").write_text("")
    for name, call in (
        ("model.json", lambda: model([64], out=tmp_path)),
        ("operator.json", lambda: operator(out=tmp_path)),
        ("layer.md", lambda: layer(out=tmp_path)),
    ):
        with pytest.raises(ValueError, match=name):
            call()
    with pytest.raises(ValueError, match="is a file; a folder is needed"):
        model([64], out=tmp_path / "layer.md")
    assert (tmp_path / "model.json").read_text() == "{}"


def test_a_table_has_milliseconds_of_each_step() -> None:
    row = {"size": 64, "tokens": 16, "attention": "mhla", "blocks": 2, "denoising": 0.012, "training": 1.5}
    assert cells(benchmark._model_table([row], ["mhla"])) == [
        ["64", "16", "2", "denoising", "12"],
        ["64", "16", "2", "training", "1,500"],
    ]


def test_a_model_has_the_batch_and_the_settings_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, Any, torch.dtype]] = []

    def steps(model: Any, inputs: Any, dtype: torch.dtype, device: str) -> list[Any]:
        made.append((model, inputs, dtype))
        return [lambda: None, lambda: None]

    monkeypatch.setattr(benchmark, "_model_steps", steps)
    model(
        [64], ["mhla", "linear"], layers=1, heads=2, head_dim=8, repeats=1, batch_size=3, dtype="bfloat16",
        device="cpu", mhla={"local": "shared"},
    )  # fmt: skip
    assert [inputs["hidden_states"].shape[0] for _, inputs, _ in made] == [3, 3]
    assert [dtype for *_, dtype in made] == [torch.bfloat16] * 2
    assert [its.config.mhla_config.get("local") for its, *_ in made] == ["shared", None]


class One(nn.Module):
    """A model of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Any:
        return SimpleNamespace(sample=self.linear(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_step_is_computed_in_the_dtype_that_was_asked_for(dtype: torch.dtype) -> None:
    denoising, _ = benchmark._model_steps(One(), {"x": torch.ones(1, 2)}, dtype, "cpu")
    assert denoising().dtype == dtype

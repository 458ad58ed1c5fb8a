"""What is saved is what is loaded, to the last bit, in a process that knows nothing but the folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from mhla_diffusion import MHLADiTTransformer2DModel, convert_to_mhla

MakeModel = Callable[..., MHLADiTTransformer2DModel]
MakeInputs = Callable[..., dict[str, Tensor]]

EVERY_PART = {"blocks": 4, "cpe": "zero", "gate": True, "output_norm": True}


@dataclass(frozen=True)
class Case:
    """A model, how it is saved, and how it is loaded."""

    model: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    train: bool = False
    save: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)


CASES = {
    "plain": Case(),
    "every part": Case(model={"mhla_config": EVERY_PART}),
    "hybrid": Case(model={"attention": ["softmax", "mhla"]}),
    "linear": Case(model={"attention": "linear"}),
    "sharded": Case(model={"mhla_config": EVERY_PART}, save={"max_shard_size": "20KB"}),
    "bfloat16": Case(dtype=torch.bfloat16, load={"dtype": torch.bfloat16}),
    "bfloat16, sharded": Case(
        dtype=torch.bfloat16, save={"max_shard_size": "20KB"}, load={"dtype": torch.bfloat16}
    ),
    "trained": Case(model={"mhla_config": EVERY_PART}, train=True),
    "trained, all at once": Case(train=True, load={"low_cpu_mem_usage": False}),
    "low memory": Case(model={"mhla_config": EVERY_PART}, load={"low_cpu_mem_usage": True}),
    "all at once": Case(model={"mhla_config": EVERY_PART}, load={"low_cpu_mem_usage": False}),
    "variant": Case(save={"variant": "ema"}, load={"variant": "ema"}),
    "pickled": Case(save={"safe_serialization": False}, load={"use_safetensors": False}),
}

LOAD_ALL = """
import sys, torch
from mhla_diffusion import MHLADiTTransformer2DModel

cases, inputs, results = torch.load(sys.argv[1], weights_only=False)
outcome = {}
for name, (folder, arguments) in cases.items():
    model, info = MHLADiTTransformer2DModel.from_pretrained(folder, output_loading_info=True, **arguments)
    with torch.no_grad():
        batch = {**inputs, "hidden_states": inputs["hidden_states"].to(model.dtype)}
        outcome[name] = {
            "state": model.state_dict(), "output": model(**batch).sample, "info": info,
            "devices": {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]},
        }
torch.save(outcome, results)
"""


def train(model: MHLADiTTransformer2DModel, inputs: dict[str, Tensor]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        model(**inputs).sample.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def saved_and_loaded(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Callable[..., tuple[dict[str, Any], dict[str, Any]]]:
    """``saved_and_loaded(make_model, inputs)``: by case, what was saved and what another process loaded."""
    done: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def run(make_model: MakeModel, inputs: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
        if done:
            return done[0]
        root = tmp_path_factory.mktemp("saved")
        saved, cases = {}, {}
        for name, case in CASES.items():
            model = make_model(**case.model).to(case.dtype)
            if case.train:
                train(model, inputs)
            folder = root / name.replace(" ", "_")
            model.save_pretrained(folder, **case.save)
            cases[name] = (folder, case.load)
            with torch.no_grad():
                batch = {**inputs, "hidden_states": inputs["hidden_states"].to(case.dtype)}
                saved[name] = {"state": model.state_dict(), "output": model(**batch).sample, "folder": folder}
        torch.save((cases, inputs, root / "results.pt"), root / "cases.pt")
        subprocess.run([sys.executable, "-c", LOAD_ALL, str(root / "cases.pt")], check=True, timeout=200)
        done.append((saved, torch.load(root / "results.pt", weights_only=False)))
        return done[0]

    return run


@pytest.mark.parametrize("name", CASES)
def test_a_new_process_loads_the_same_function(
    saved_and_loaded: Callable[..., Any], make_model: MakeModel, make_inputs: MakeInputs, name: str
) -> None:
    saved, loaded = (part[name] for part in saved_and_loaded(make_model, make_inputs()))
    assert loaded["state"].keys() == saved["state"].keys()
    for key, value in saved["state"].items():
        assert loaded["state"][key].dtype == value.dtype == CASES[name].dtype
        assert torch.equal(loaded["state"][key], value), key
    assert torch.equal(loaded["output"], saved["output"])
    assert loaded["devices"] == {"cpu"}
    assert not any(loaded["info"].values()), loaded["info"]


def test_cases_are_what_they_are_called(
    saved_and_loaded: Callable[..., Any], make_model: MakeModel, make_inputs: MakeInputs
) -> None:
    saved, _ = saved_and_loaded(make_model, make_inputs())
    files = {name: [path.name for path in facts["folder"].iterdir()] for name, facts in saved.items()}
    assert sum(name.endswith(".safetensors") for name in files["sharded"]) > 2
    assert "diffusion_pytorch_model.ema.safetensors" in files["variant"]
    assert "diffusion_pytorch_model.bin" in files["pickled"]


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_dtype_casts_on_loading(
    make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    model, inputs = make_model(mhla_config=EVERY_PART), make_inputs(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = MHLADiTTransformer2DModel.from_pretrained(
        tmp_path, dtype=torch.bfloat16, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded(**inputs).sample, model.to(torch.bfloat16)(**inputs).sample)


@pytest.mark.parametrize(
    "settings", [{}, {"attention": "linear"}, {"attention": ["softmax", "mhla"]}], ids=str
)
def test_the_stock_class_refuses_linear_attention(
    make_model: MakeModel, tmp_path: Path, settings: dict[str, Any]
) -> None:
    make_model(**settings).save_pretrained(tmp_path)
    message = r"load it with mhla_diffusion\.MHLADiTTransformer2DModel"
    with pytest.raises(NotImplementedError, match=message):
        DiTTransformer2DModel.from_pretrained(tmp_path)
    with pytest.raises(NotImplementedError, match=message):
        DiTTransformer2DModel.from_config(DiTTransformer2DModel.load_config(tmp_path))


def test_the_stock_class_opens_softmax_alone(
    make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    model = make_model(attention="softmax")
    model.save_pretrained(tmp_path)
    stock = DiTTransformer2DModel.from_pretrained(tmp_path)
    assert type(stock) is DiTTransformer2DModel
    assert torch.equal(stock(**make_inputs()).sample, model(**make_inputs()).sample)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_a_stock_checkpoint_is_converted_and_not_loaded(
    make_stock: Callable[..., DiTTransformer2DModel], tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    make_stock().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks 2 weights .*processor\.mixing.*convert_to_mhla\(model, config\)"
    ):
        MHLADiTTransformer2DModel.from_pretrained(
            tmp_path, mhla_config={"blocks": 4}, low_cpu_mem_usage=low_cpu_mem_usage
        )


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_mixing_that_the_config_does_not_fit_is_refused(
    make_model: MakeModel, tmp_path: Path, low_cpu_mem_usage: bool
) -> None:
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mhla_config"]["blocks"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"(?s)another number of blocks(?=.*\[4, 4\])(?=.*\[2, 2\])"):
        MHLADiTTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)


def test_loading_with_other_blocks_resizes_the_mixing_and_says_so(
    make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    config = {**model.config.mhla_config, "blocks": [1, 2]}
    loaded = MHLADiTTransformer2DModel.from_pretrained(tmp_path, mhla_config=config)
    assert "mixing matrices resized, blocks (2, 2) to (1, 2)" in caplog.text
    expected = convert_to_mhla(model, config)
    assert torch.equal(loaded(**make_inputs()).sample, expected(**make_inputs()).sample)
    with pytest.raises(ValueError, match=r"lacks .* weights .*gate"):
        MHLADiTTransformer2DModel.from_pretrained(tmp_path, mhla_config={**config, "gate": True})


def test_loading_at_another_size_says_so(
    make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    size = 2 * model.config.sample_size
    loaded = MHLADiTTransformer2DModel.from_pretrained(tmp_path, sample_size=size)
    assert f"sample_size {size} in place of {size // 2}" in caplog.text
    assert loaded.mixing_blocks == model.mixing_blocks
    inputs = make_inputs()
    inputs["hidden_states"] = torch.randn(*inputs["hidden_states"].shape[:2], size, size)
    assert loaded(**inputs).sample.isfinite().all()


def test_an_unknown_setting_in_a_saved_config_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    make_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mhla_config"]["kernel"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown MHLA setting kernel"):
        MHLADiTTransformer2DModel.from_pretrained(tmp_path)


def test_a_converted_model_survives_saving(
    make_stock: Callable[..., DiTTransformer2DModel], make_inputs: MakeInputs, tmp_path: Path
) -> None:
    model = convert_to_mhla(make_stock(), {"blocks": 4, "gate": True})
    model.save_pretrained(tmp_path)
    loaded = MHLADiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(**make_inputs()).sample, model(**make_inputs()).sample)

"""What is saved is what is loaded, to the last bit, in a process that knows nothing but the folder."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mhla_diffusion import convert_to_mhla
from mhla_diffusion.backbones.model import SIZES

from .cases import CASES, EVERY_PART, Case, randomize, sample


@dataclass(frozen=True)
class Saved:
    """How a model is made, saved and loaded."""

    kind: str = "mhla"
    dtype: torch.dtype = torch.float32
    train: bool = False
    save: dict[str, Any] = field(default_factory=dict)
    load: dict[str, Any] = field(default_factory=dict)


WAYS = {
    "every part": Saved(),
    "hybrid": Saved("hybrid"),
    "linear": Saved("linear"),
    "softmax logits": Saved("softmax logits"),
    "sharded": Saved(save={"max_shard_size": "20KB"}),
    "bfloat16": Saved(dtype=torch.bfloat16, load={"dtype": torch.bfloat16}),
    "bfloat16, sharded": Saved(
        dtype=torch.bfloat16, save={"max_shard_size": "20KB"}, load={"dtype": torch.bfloat16}
    ),
    "trained": Saved(train=True),
    "trained, all at once": Saved(train=True, load={"low_cpu_mem_usage": False}),
    "low memory": Saved(load={"low_cpu_mem_usage": True}),
    "all at once": Saved(load={"low_cpu_mem_usage": False}),
    "variant": Saved(save={"variant": "ema"}, load={"variant": "ema"}),
    "pickled": Saved(save={"safe_serialization": False}, load={"use_safetensors": False}),
}

LOAD_ALL = """
import sys, torch
import mhla_diffusion

ways, results = torch.load(sys.argv[1], weights_only=False)
outcome = {}
for key, (name, folder, inputs, arguments) in ways.items():
    model_class = getattr(mhla_diffusion, name)
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **arguments)
    with torch.no_grad():
        outcome[key] = {
            "state": model.state_dict(), "output": model(**inputs).sample, "info": info,
            "devices": {tensor.device.type for tensor in [*model.parameters(), *model.buffers()]},
        }
torch.save(outcome, results)
"""


# What is left to diffusers is tried for a backbone of each kind; what is ours, for all.
OF_EACH_KIND = ("DiT", "QwenImage", "Sana", "Wan", "Kandinsky5")
OURS = ("every part", "hybrid", "linear", "softmax logits", "bfloat16, sharded", "trained")


def possible(case: Case, how: Saved) -> bool:
    """diffusers loads no model all at once that keeps parts in float32."""
    return how.load.get("low_cpu_mem_usage", True) or not case.model._keep_in_fp32_modules


TRIED = [
    (name, way)
    for name, case in CASES.items()
    for way, how in WAYS.items()
    if (way in OURS or name in OF_EACH_KIND) and possible(case, how)
]


def train(model: Any, inputs: dict[str, Any]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(3):
        sample(model, inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="module")
def saved_and_loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Any, Any], dict[Any, Any]]:
    """By backbone and way, what was saved and what another process loaded."""
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("saved")
    saved, ways = {}, {}
    for name, way in TRIED:
        case, how = CASES[name], WAYS[way]
        model = case.make(**case.kinds()[how.kind])
        if how.train:
            train(model, case.inputs(model))
        case.cast(model, how.dtype)
        inputs = case.inputs(model, case.grids[3], dtype=how.dtype)
        folder = root / f"{name}-{way.replace(' ', '_')}"
        model.save_pretrained(folder, **how.save)
        ways[name, way] = (case.model.__name__, folder, inputs, how.load)
        with torch.no_grad():
            saved[name, way] = {"state": model.state_dict(), "output": sample(model, inputs)}
            saved[name, way]["files"] = [path.name for path in folder.iterdir()]
    torch.save((ways, root / "results.pt"), root / "ways.pt")
    subprocess.run([sys.executable, "-c", LOAD_ALL, str(root / "ways.pt")], check=True, timeout=250)
    return saved, torch.load(root / "results.pt", weights_only=False)


@pytest.mark.parametrize(("name", "way"), TRIED)
def test_a_new_process_loads_the_same_function(saved_and_loaded: Any, name: str, way: str) -> None:
    saved, loaded = (part[name, way] for part in saved_and_loaded)
    assert loaded["state"].keys() == saved["state"].keys()
    for key, value in saved["state"].items():
        assert torch.equal(loaded["state"][key].to(value.dtype), value), key
    if WAYS[way].dtype == torch.float32:  # a cast rounds rotary tables too, loading does not
        assert torch.equal(loaded["output"], saved["output"])
    assert loaded["devices"] == {"cpu"}
    assert not any(loaded["info"].values()), loaded["info"]


@pytest.mark.parametrize("name", OF_EACH_KIND)
def test_ways_are_what_they_are_called(saved_and_loaded: Any, name: str) -> None:
    files = {way: part["files"] for (of, way), part in saved_and_loaded[0].items() if of == name}
    assert sum(name.endswith(".safetensors") for name in files["sharded"]) > 2
    assert "diffusion_pytorch_model.ema.safetensors" in files["variant"]
    assert "diffusion_pytorch_model.bin" in files["pickled"]


def test_dtype_casts_on_loading(case: Case, tmp_path: Path) -> None:
    model = case.make(mhla=EVERY_PART)
    model.save_pretrained(tmp_path)
    loaded = case.model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    kept = tuple(case.model._keep_in_fp32_modules or ())
    for name, parameter in loaded.named_parameters():
        in_float32 = any(part in kept for part in name.split("."))
        assert parameter.dtype == (torch.float32 if in_float32 else torch.bfloat16), name
    inputs = case.inputs(model, dtype=torch.bfloat16)
    expected = sample(model, case.inputs(model))
    assert (sample(loaded, inputs).float() - expected).norm() / expected.norm() < 6e-2


def test_the_stock_class_refuses_linear_attention_or_warns_of_it(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = case.make(attention=[case.stock_kind, "mhla"])
    model.save_pretrained(tmp_path)
    if case.name == "DiT":
        with pytest.raises(NotImplementedError, match=r"load it with mhla_diffusion\.MHLADiT"):
            case.model.stock.from_pretrained(tmp_path)
        return
    case.model.stock.from_pretrained(tmp_path)
    dropped = f"{case.model.attention_name}.processor.mixing"
    assert dropped in caplog.text, "every weight that it drops is named"


def test_the_stock_class_opens_stock_layers(case: Case, tmp_path: Path) -> None:
    model = case.make(attention=case.stock_kind)
    model.save_pretrained(tmp_path)
    stock = case.model.stock.from_pretrained(tmp_path)
    assert type(stock) is case.model.stock
    inputs = case.inputs(model)
    assert torch.equal(sample(stock, inputs), sample(model, inputs))


def test_a_stock_checkpoint_is_converted_and_not_loaded(case: Case, tmp_path: Path) -> None:
    case.stock().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=rf"lacks \d weights .*processor\.mixing.*diffusers\.{case.model.stock.__name__}"
    ):
        case.model.from_pretrained(tmp_path, mhla_config=case.config())


def test_mixing_that_the_config_does_not_fit_is_refused(case: Case, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mhla_config"]["blocks"] = [*[1] * (len(case.blocks) - 1), 2]
    (tmp_path / "config.json").write_text(json.dumps(config))
    old, new = (count + (case.model.extra_tokens > 0) for count in (4, 2))
    message = rf"(?s)another number of blocks(?=.*\[{old}, {old}\])(?=.*\[{new}, {new}\])"
    with pytest.raises(ValueError, match=message):
        case.model.from_pretrained(tmp_path)


def test_loading_with_other_blocks_resizes_the_mixing_and_says_so(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = case.make()
    model.save_pretrained(tmp_path)
    config = case.config(blocks=[*[1] * (len(case.blocks) - 1), 2])
    loaded = case.model.from_pretrained(tmp_path, mhla_config=config)
    assert f"mixing matrices resized, blocks {case.blocks} to {tuple(config['blocks'])}" in caplog.text
    expected = convert_to_mhla(model, config)
    inputs = case.inputs(model)
    assert torch.equal(sample(loaded, inputs), sample(expected, inputs))
    with pytest.raises(ValueError, match=r"lacks .* weights .*gate"):
        case.model.from_pretrained(tmp_path, mhla_config={**config, "gate": True})


@pytest.mark.parametrize(
    "settings",
    [{"constraint": "softmax"}, {"mixing_per_head": True}, {"constraint": "none"}, {"mixing_relative": True}],
    ids=str,
)
def test_loading_with_another_form_of_mixing_keeps_its_weights(
    case: Case, settings: dict[str, Any], tmp_path: Path
) -> None:
    if case.model.extra_tokens and "mixing_relative" in settings:
        pytest.skip("tokens that lie on no grid have no offset")
    model = case.make(num_layers=1)
    model.save_pretrained(tmp_path)
    config = case.config(**settings)
    loaded = case.model.from_pretrained(tmp_path, mhla_config=config)
    inputs = case.inputs(model)
    assert torch.equal(sample(loaded, inputs), sample(convert_to_mhla(model, config), inputs))


def test_a_window_of_another_form_is_weighed_anew(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    case.make(num_layers=1, mhla={"local": "shared"}).save_pretrained(tmp_path)
    gate = case.config(local="gate")
    with pytest.raises(ValueError, match=r"lacks .*local.* Load it without mhla_config and call .*convert"):
        case.model.from_pretrained(tmp_path, mhla_config=gate)
    loaded = case.model.from_pretrained(tmp_path)
    before, after = (
        torch.cat([weight for name, weight in model.named_parameters() if name.endswith("processor.local")])
        for model in (loaded, convert_to_mhla(loaded, gate))
    )
    assert before.unique().numel() > 1
    assert after.unique().numel() == 1
    caplog.clear()
    without = case.model.from_pretrained(tmp_path, mhla_config=case.config(local=None))
    assert not any(name.endswith("processor.local") for name, _ in without.named_parameters())
    assert re.search(r"\d+ weights have no place in the new config: .*processor\.local", caplog.text)


def test_a_folder_that_lacks_weights_is_not_blamed_on_a_config(case: Case, tmp_path: Path) -> None:
    model = case.make(num_layers=1)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    lost = max(name for name in weights if ".processor." not in name)
    del weights[lost]
    save_file(weights, tmp_path / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks 1 weights .*{re.escape(lost)}\. If it is a stock model"):
        case.model.from_pretrained(tmp_path)


def test_loading_at_another_size_says_so(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = case.make()
    model.save_pretrained(tmp_path)
    old = {name: model.config[name] for name in SIZES if name in model.config}
    new = {name: 2 * side if isinstance(side, int) else [2 * s for s in side] for name, side in old.items()}
    loaded = case.model.from_pretrained(tmp_path, **new)
    assert all(f"{name} {new[name]} in place of {old[name]}" in caplog.text for name in old)
    assert loaded.mixing_blocks == model.mixing_blocks
    assert loaded.default_grid == tuple(2 * side for side in model.default_grid)
    assert sample(loaded, case.inputs(loaded, loaded.default_grid)).isfinite().all()


def test_an_unknown_setting_in_a_saved_config_is_refused(case: Case, tmp_path: Path) -> None:
    case.make().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["mhla_config"]["kernel"] = "relu"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="unknown MHLA setting kernel"):
        case.model.from_pretrained(tmp_path)


def test_a_converted_model_survives_saving(case: Case, tmp_path: Path) -> None:
    model = convert_to_mhla(case.stock(), case.config(gate=True))
    model.save_pretrained(tmp_path)
    inputs = case.inputs(model)
    assert torch.equal(sample(case.model.from_pretrained(tmp_path), inputs), sample(model, inputs))


@pytest.mark.parametrize("variant", [None, "fp16"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("sizes", itertools.product(["20KB", "5GB"], repeat=2), ids=str)
def test_what_was_saved_last_into_a_folder_is_loaded(
    sizes: tuple[str, str], variant: str | None, tmp_path: Path, *, safe: bool
) -> None:
    case = CASES["DiT"]
    for size in sizes:
        model = case.make()
        randomize(model)
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant, safe_serialization=safe)
        assert (len(list(tmp_path.glob("*-of-*"))) > 1) == (size == "20KB")
    loaded = case.model.from_pretrained(tmp_path, variant=variant, use_safetensors=safe)
    assert all(torch.equal(weight, loaded.state_dict()[key]) for key, weight in model.state_dict().items())


@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_weights_that_others_would_be_loaded_in_place_of_are_not_saved(size: str, tmp_path: Path) -> None:
    case = CASES["DiT"]
    model = case.make()
    model.save_pretrained(tmp_path, max_shard_size=size)
    model.save_pretrained(tmp_path, False, safe_serialization=True)  # by a process that is not the main one
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match="would be loaded in place of weights with safe_serialization=False"):
        model.save_pretrained(tmp_path, safe_serialization=False)
    assert sorted(tmp_path.iterdir()) == before
    model.save_pretrained(tmp_path, safe_serialization=False, variant="fp16")
    with pytest.raises(ValueError, match=r"config\.json is a file: choose a folder"):
        model.save_pretrained(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config\.json is a file: give the folder"):
        case.model.from_pretrained(tmp_path / "config.json")


def test_an_index_is_there_again_when_nothing_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["DiT"]
    model = case.make()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(self: Any, folder: Path) -> None:
        assert not list(folder.glob("*.index.json")), "an upload has none that is dead"
        raise RuntimeError("quantised")

    monkeypatch.setattr(case.model, "save_config", fail)
    with pytest.raises(RuntimeError, match="quantised"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

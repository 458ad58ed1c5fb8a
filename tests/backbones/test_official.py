"""Checkpoints of the public code: their names, their layer, and what is wrong with a wrong one."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mhla_diffusion import MHLAWanTransformer3DModel
from mhla_diffusion.backbones.official import _BEGINNINGS, _BLOCK_RENAMINGS, _rename, load_official_wan
from tests.processes import run_script

GOLDEN = Path(__file__).parents[3] / "shared" / "golden"
TINY: dict[str, Any] = {"blocks": (1, 2, 2), "sample_grid": (2, 4, 4), "head_dim": 12}


def make_model(
    *, image: bool = False, mhla: dict[str, Any] | None = None, **settings: Any
) -> MHLAWanTransformer3DModel:
    model = MHLAWanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=4, num_layers=3,
        text_dim=10, freq_dim=16, ffn_dim=40, sample_grid=(2, 4, 4),
        image_dim=6 if image else None, added_kv_proj_dim=24 if image else None,
        mhla_config={
            "blocks": [1, 2, 2], "normalizer": "none", "constraint": "none", "layers": [1, 2],
            "gate": True, "output_norm": True, **(mhla or {}),
        },
        **settings,
    )  # fmt: skip
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # mixing with negative weights too
    return model.eval()


def their_weights(model: MHLAWanTransformer3DModel) -> dict[str, Tensor]:
    """The state of a model under the names and shapes of the public code."""
    beginnings = {ours: theirs for theirs, ours in _BEGINNINGS.items()}
    parts = {ours: theirs for theirs, ours in _BLOCK_RENAMINGS.items()}
    weights = {}
    for key, value in model.state_dict().items():
        if match := re.match(r"^blocks\.(\d+)\.(.+?)(\.weight|\.bias)?$", key):
            number, part, kind = match.groups()
            if part == "attn1.processor.mixing":
                kind, value = ".weight", value[..., None, None]
            weights[f"blocks.{number}.{parts.get(part, part)}{kind or ''}"] = value.contiguous()
        else:
            ours = next((start for start in beginnings if key.startswith(start)), "")
            weights[beginnings.get(ours, "") + key.removeprefix(ours)] = value.contiguous()
    return weights


def test_names_are_those_of_the_original() -> None:
    for theirs, ours in {
        "blocks.7.self_attn.q.weight": "blocks.7.attn1.to_q.weight",
        "blocks.7.self_attn.block_attn.conv.weight": "blocks.7.attn1.processor.mixing",
        "blocks.7.self_attn.g_norm.weight": "blocks.7.attn1.processor.norm.weight",
        "blocks.7.norm3.bias": "blocks.7.norm2.bias",
        "blocks.7.ffn.2.weight": "blocks.7.ffn.net.2.weight",
        "blocks.7.modulation": "blocks.7.scale_shift_table",
        "blocks.7.cross_attn.v_img.bias": "blocks.7.attn2.add_v_proj.bias",
        "head.head.bias": "proj_out.bias",
        "head.modulation": "scale_shift_table",
        "time_projection.1.weight": "condition_embedder.time_proj.weight",
        "patch_embedding.weight": "patch_embedding.weight",
    }.items():
        assert _rename(theirs) == ours


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
@pytest.mark.parametrize("gate", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("form", ["safetensors", "pth", "shards"])
def test_a_checkpoint_gives_back_the_model(tmp_path: Path, image: bool, gate: bool, form: str) -> None:
    model = make_model(image=image, mhla={"gate": gate})
    weights = their_weights(model)
    path = tmp_path / "checkpoint"
    if form == "pth":
        path = tmp_path / "checkpoint.pth"
        torch.save({"state_dict": weights}, path)
    elif form == "safetensors":
        path = tmp_path / "checkpoint.safetensors"
        save_file(weights, path)
    else:
        path.mkdir()
        keys = sorted(weights)
        for i in range(2):
            save_file({key: weights[key] for key in keys[i::2]}, path / f"model-{i}.safetensors")
    loaded = load_official_wan(path, **TINY)
    assert loaded.layer_attention == ["softmax", "mhla", "mhla"]
    assert loaded.config.mhla_config["gate"] == gate
    assert loaded.config.mhla_config["constraint"] == loaded.config.mhla_config["normalizer"] == "none"
    ours = loaded.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())
    assert any((m < 0).any() for name, m in ours.items() if name.endswith("mixing"))


@pytest.mark.parametrize(
    ("settings", "config"),
    [
        ({"mhla": {"cpe": "zero"}}, {"cpe": "zero", "output_norm": True}),
        ({"mhla": {"output_norm": False}}, {"cpe": None, "output_norm": False}),
        ({"cross_attn_norm": False}, {}),
        ({"image": True, "pos_embed_seq_len": 5}, {}),
    ],
    ids=["convolution", "no norm", "no norm of text", "positions of images"],
)
def test_parts_are_those_that_have_weights(
    tmp_path: Path, settings: dict[str, Any], config: dict[str, Any]
) -> None:
    model = make_model(**settings)
    save_file(their_weights(model), tmp_path / "wan.safetensors")
    loaded = load_official_wan(tmp_path / "wan.safetensors", **TINY)
    assert loaded.config.mhla_config.items() >= config.items()
    ours = loaded.state_dict()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


def test_the_normalizer_is_the_one_asked_for(tmp_path: Path) -> None:
    save_file(their_weights(make_model()), tmp_path / "wan.safetensors")
    loaded = load_official_wan(tmp_path / "wan.safetensors", normalizer="official", **TINY)
    assert loaded.config.mhla_config["normalizer"] == "official"


@pytest.mark.parametrize("table", ["state_dict", "model", "ema", None])
@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model."])
def test_weights_are_found_in_what_a_trainer_saved(tmp_path: Path, table: str | None, prefix: str) -> None:
    model = make_model()
    weights = {f"{prefix}{key}": value for key, value in their_weights(model).items()}
    torch.save({table: weights, "step": 3} if table else weights, tmp_path / "wan.pth")
    ours = load_official_wan(tmp_path / "wan.pth", **TINY).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin"])
def test_shards_of_a_folder_may_be_of_torch(tmp_path: Path, suffix: str) -> None:
    model = make_model()
    weights = their_weights(model)
    for i in range(2):
        torch.save({key: weights[key] for key in sorted(weights)[i::2]}, tmp_path / f"model-{i}.{suffix}")
    ours = load_official_wan(tmp_path, **TINY).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in model.state_dict().items())


class _MakesAFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_no_code_of_a_checkpoint_runs(tmp_path: Path) -> None:
    torch.save({"model": _MakesAFolder(tmp_path / "made")}, tmp_path / "wan.pth")
    with pytest.raises(pickle.UnpicklingError, match="mkdir"):
        load_official_wan(tmp_path / "wan.pth")
    assert not (tmp_path / "made").exists()


def test_everything_wrong_is_listed(tmp_path: Path) -> None:
    weights = their_weights(make_model())
    del weights["blocks.1.self_attn.q.bias"]
    del weights["head.head.bias"]
    weights["blocks.0.self_attn.extra.weight"] = torch.zeros(1)
    weights["blocks.2.self_attn.o.weight"] = torch.zeros(3, 3)
    save_file(weights, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match="does not fit") as error:
        load_official_wan(tmp_path / "wrong.safetensors", **TINY)
    for problem in (
        "missing blocks.1.attn1.to_q.bias", "missing proj_out.bias",
        "unexpected blocks.0.self_attn.extra.weight",
        "blocks.2.attn1.to_out.0.weight has shape (3, 3), not (24, 24)",
    ):  # fmt: skip
        assert problem in str(error.value)


def test_what_is_no_such_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no checkpoint"):
        load_official_wan(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"no Wan checkpoint .* lacks patch_embedding\.weight"):
        load_official_wan(tmp_path / "x.safetensors")
    torch.save({"step": 3}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=r"x\.pt holds no table of weights"):
        load_official_wan(tmp_path / "x.pt")
    weights = their_weights(make_model())
    partly = {key: value for key, value in weights.items() if not key.startswith("blocks.2.self_attn.g.")}
    save_file(partly, tmp_path / "partly.safetensors")
    with pytest.raises(ValueError, match=r"MHLA layers are \[1, 2\], but only \[1\] of them have g"):
        load_official_wan(tmp_path / "partly.safetensors", **TINY)
    softmax = {key: value for key, value in weights.items() if "block_attn" not in key}
    save_file(softmax, tmp_path / "softmax.safetensors")
    with pytest.raises(ValueError, match="has no MHLA layer; convert a softmax model"):
        load_official_wan(tmp_path / "softmax.safetensors", **TINY)


@pytest.mark.skipif(not GOLDEN.is_dir(), reason="reference outputs are not at hand")
@pytest.mark.parametrize(
    "name", ["wan_gated_normalized_lepe", "wan_gated_unnormalized", "wan_ungated_unnormalized"]
)
def test_a_layer_of_the_public_code_is_reproduced(name: str) -> None:
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items()}
    tensors = load_file(path)
    model = MHLAWanTransformer3DModel(
        num_attention_heads=facts["heads"], attention_head_dim=facts["dim"] // facts["heads"], num_layers=1,
        text_dim=4, freq_dim=4, ffn_dim=4, sample_grid=tuple(facts["grid"]),
        mhla_config={
            "blocks": facts["block_layout"], "normalizer": "official" if facts["normalize"] else "none",
            "constraint": "none", "gate": facts["gated"], "output_norm": True,
            "cpe": "zero" if facts["lepe"] else None,
        },
    )  # fmt: skip
    layer, prefix = model.blocks[0].attn1, "blocks.0.attn1."
    state = {
        _rename(f"blocks.0.self_attn.{key.removeprefix('weights.')}").removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith("weights.")
    }
    state["processor.mixing"] = state["processor.mixing"][..., 0, 0]
    layer.load_state_dict(state)
    rotary_emb = tensors["rotary_cos"], tensors["rotary_sin"]
    out = layer(tensors["input"], None, None, rotary_emb, grid=tuple(facts["grid"]))
    error = (out - tensors["output"]).norm() / tensors["output"].norm()
    assert error < 1e-5


def test_the_script_reads_a_checkpoint(tmp_path: Path) -> None:
    """With heads of 128 and the public code's blocks, as the released weights have them."""
    model = MHLAWanTransformer3DModel(
        num_attention_heads=1, attention_head_dim=128, in_channels=3, out_channels=3, num_layers=1,
        text_dim=4, freq_dim=4, ffn_dim=8, sample_grid=(21, 30, 50),
        mhla_config={"blocks": [3, 5, 10], "normalizer": "none", "constraint": "none", "output_norm": True},
    )  # fmt: skip
    save_file(their_weights(model), tmp_path / "wan.safetensors")
    out = tmp_path / "out"
    run_script(
        "convert", "--from", "official-wan-mhla", "--model", tmp_path / "wan.safetensors", "--out", out
    ).check_returncode()
    loaded = MHLAWanTransformer3DModel.from_pretrained(out)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    assert loaded.mixing_blocks == (3, 5, 10)
    assert tuple(loaded.config.sample_grid) == (21, 30, 50)

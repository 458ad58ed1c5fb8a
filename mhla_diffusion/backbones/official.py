"""Wan checkpoints trained with the public MHLA code, read into our model: the convention ``official``."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ..config import MHLAConfig
from .wan import MHLAWanTransformer3DModel

logger = logging.getLogger(__name__)

_HEAD_DIM = 128
# Names of the original Wan code and of the public MHLA code, and ours: how they begin, outside the blocks ...
_BEGINNINGS = {
    "text_embedding.0.": "condition_embedder.text_embedder.linear_1.",
    "text_embedding.2.": "condition_embedder.text_embedder.linear_2.",
    "time_embedding.0.": "condition_embedder.time_embedder.linear_1.",
    "time_embedding.2.": "condition_embedder.time_embedder.linear_2.",
    "time_projection.1.": "condition_embedder.time_proj.",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "img_emb.proj.0.": "condition_embedder.image_embedder.norm1.",
    "img_emb.proj.1.": "condition_embedder.image_embedder.ff.net.0.proj.",
    "img_emb.proj.3.": "condition_embedder.image_embedder.ff.net.2.",
    "img_emb.proj.4.": "condition_embedder.image_embedder.norm2.",
    "head.modulation": "scale_shift_table",
    "head.head.": "proj_out.",
}
# ... and the parts of a block.
_BLOCK_RENAMINGS = {
    "modulation": "scale_shift_table",
    # The original numbers its norms by parts, diffusers by order: cross-attention's is the second here.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    **{
        f"{theirs}.{name}": f"{ours}.{to}"
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for name, to in (
            ("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"),
            ("norm_k", "norm_k"),
        )
    },
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "self_attn.block_attn.conv": "attn1.processor.mixing",
    "self_attn.g_norm": "attn1.processor.norm",
    "self_attn.g": "attn1.processor.gate",
    "self_attn.lepe": "attn1.processor.cpe",
}  # fmt: skip


def load_official_wan(
    path: str | Path,
    *,
    blocks: tuple[int, int, int] = (3, 5, 10),
    sample_grid: tuple[int, int, int] = (21, 30, 50),
    normalizer: str = "none",
    head_dim: int = _HEAD_DIM,
) -> MHLAWanTransformer3DModel:
    """Load a checkpoint trained with the public code, such as that released for Wan2.1-T2V-1.3B.

    Sizes, and which layers are MHLA, gated and with a convolution on v, are read from the names and shapes of
    the weights. Mixing matrices are taken as they are, with negative weights and any row sums: nothing ever
    clamps them (``constraint="none"``).

    Args:
        path: a ``.safetensors`` or ``.pth`` / ``.pt`` / ``.bin`` file, or a folder with the shards of one.
        blocks: along frames, height and width; which ones is not in the weights. (3, 5, 10) is the public
            code's own.
        sample_grid: tokens of the size it was trained for, there 81 frames of 480 x 800.
        normalizer: ``"none"``, or ``"official"`` for runs with a denominator; this is not in the weights.
        head_dim: d; Wan has 128.

    Raises:
        ValueError: for a file that is no such checkpoint; all missing and unexpected weights are listed.
        pickle.UnpicklingError: for one of torch that holds more than weights, such as code, which is not run.
    """
    theirs = _read(Path(path))
    state = {_rename(key): value for key, value in theirs.items()}
    model = MHLAWanTransformer3DModel(
        **_config_of(theirs, blocks, normalizer, head_dim, path), sample_grid=sample_grid
    )
    expected = {key: value.shape for key, value in model.state_dict().items()}
    for key, value in state.items():
        # A 1x1 convolution over blocks; and modulations without their axis of samples.
        if key in expected and value.shape != expected[key] and value.numel() == expected[key].numel():
            state[key] = value.reshape(expected[key])
    _require_equal(path, expected, {key: value.shape for key, value in state.items()})
    model.load_state_dict(state)
    layers = [i for i, kind in enumerate(model.layer_attention) if kind == "mhla"]
    logger.info("%s: %d layers, MHLA in %s, %s", path, len(model.blocks), layers, model.config.mhla_config)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file or of the files of a folder."""
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(
            file for pattern in ("*.pth", "*.pt", "*.bin") for file in path.glob(pattern)
        )
    else:
        files = [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"{path} is no checkpoint: give a .safetensors or .pth file, or a folder of them")
    tensors: dict[str, Tensor] = {}
    for file in files:
        tensors.update(_tensors_of(file))
    return {key.removeprefix("module.").removeprefix("model."): value for key, value in tensors.items()}


def _tensors_of(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    content = torch.load(file, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model", "ema"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{file} holds no table of weights")
    return content


def _rename(key: str) -> str:
    """Our name of a weight; an unknown one stays as it is."""
    if match := re.match(r"^blocks\.(\d+)\.(.+?)(\.weight|\.bias)?$", key):
        number, part, kind = match.groups()
        kind = "" if part == "self_attn.block_attn.conv" else kind or ""
        return f"blocks.{number}.{_BLOCK_RENAMINGS.get(part, part)}{kind}"
    beginning = next((start for start in _BEGINNINGS if key.startswith(start)), "")
    return _BEGINNINGS.get(beginning, "") + key.removeprefix(beginning)


def _config_of(
    weights: dict[str, Tensor], blocks: tuple[int, ...], normalizer: str, head_dim: int, path: str | Path
) -> dict[str, Any]:
    """The arguments of the model that these weights are of."""
    needed = (
        "patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight", "head.head.weight",
        "blocks.0.ffn.0.weight",
    )  # fmt: skip
    if absent := [key for key in needed if key not in weights]:
        raise ValueError(f"{path} is no Wan checkpoint of the original naming: it lacks {', '.join(absent)}")
    patch = tuple(weights["patch_embedding.weight"].shape[2:])
    dim = weights["patch_embedding.weight"].shape[0]
    num_layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("blocks."))
    mhla = [i for i in range(num_layers) if f"blocks.{i}.self_attn.block_attn.conv.weight" in weights]
    if not mhla:
        raise ValueError(f"{path} has no MHLA layer; convert a softmax model with convert_to_mhla")
    parts = {name: list(_layers_with(weights, f"self_attn.{name}")) for name in ("g", "g_norm", "lepe")}
    for name, layers in parts.items():
        if layers and layers != mhla:
            raise ValueError(f"{path}: MHLA layers are {mhla}, but only {layers} of them have {name}")
    image = weights.get("img_emb.proj.0.weight")
    positions = weights.get("img_emb.emb_pos")
    config = MHLAConfig(
        blocks=blocks, normalizer=normalizer, constraint="none", layers=tuple(mhla),
        gate=bool(parts["g"]), output_norm=bool(parts["g_norm"]), cpe="zero" if parts["lepe"] else None,
    )  # fmt: skip
    return {
        "patch_size": patch,
        "num_attention_heads": dim // head_dim,
        "attention_head_dim": head_dim,
        "in_channels": weights["patch_embedding.weight"].shape[1],
        "out_channels": weights["head.head.weight"].shape[0] // (patch[0] * patch[1] * patch[2]),
        "text_dim": weights["text_embedding.0.weight"].shape[1],
        "freq_dim": weights["time_embedding.0.weight"].shape[1],
        "ffn_dim": weights["blocks.0.ffn.0.weight"].shape[0],
        "num_layers": num_layers,
        "cross_attn_norm": "blocks.0.norm3.weight" in weights,
        "image_dim": None if image is None else image.shape[0],
        "added_kv_proj_dim": None if image is None else dim,
        "pos_embed_seq_len": None if positions is None else positions.shape[1],
        "mhla_config": config,
    }


def _layers_with(weights: dict[str, Tensor], part: str) -> Iterator[int]:
    pattern = re.compile(rf"^blocks\.(\d+)\.{re.escape(part)}\.weight$")
    yield from sorted(int(match.group(1)) for key in weights if (match := pattern.match(key)))


def _require_equal(path: str | Path, expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Check every name and shape."""
    problems = [f"missing {key}" for key in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {key}" for key in sorted(found.keys() - expected.keys())]
    problems += [
        f"{key} has shape {tuple(found[key])}, not {tuple(expected[key])}"
        for key in sorted(expected.keys() & found.keys())
        if found[key] != expected[key]
    ]
    if problems:
        raise ValueError(f"{path} does not fit the model that its weights describe: {'; '.join(problems)}")

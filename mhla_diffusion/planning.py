"""What MHLA saves for a model and a size, before anything is trained: FLOPs, bytes, and the blocks to take.

The softmax model is run on torch's meta device, without weights, under torch.utils.flop_counter; formulas
exchange its self-attention for linear attention or MHLA. A multiplication and an addition are 2 FLOPs;
products of matrices and convolutions count, norms, activations and rotations do not. All numbers are for one
sample and one forward; classifier-free guidance doubles both sides of every ratio.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .attention import MHLAConfig
from .backbones import MHLADiTTransformer2DModel
from .backbones.model import layer_attention
from .hub import component_subfolder
from .ops import BlockLayout, exchanged_bytes, recommended_layout

ATTENTIONS = ("softmax", "linear", "mhla")

_Inputs = Callable[[Any, tuple[int, ...]], dict[str, Tensor | None]]


def _preset(name: str, num_layers: int, heads: int, **others: int) -> dict[str, Any]:
    return {"_class_name": name, "num_layers": num_layers, "num_attention_heads": heads, **others}


# DiT's 8 output channels are 4, and their variances.
PRESETS = {
    "DiT-S/2": _preset("DiTTransformer2DModel", 12, 6, attention_head_dim=64, out_channels=8),
    "DiT-B/2": _preset("DiTTransformer2DModel", 12, 12, attention_head_dim=64, out_channels=8),
    "DiT-L/2": _preset("DiTTransformer2DModel", 24, 16, attention_head_dim=64, out_channels=8),
    "DiT-XL/2": _preset("DiTTransformer2DModel", 28, 16, attention_head_dim=72, out_channels=8),
    "Wan2.1-1.3B": _preset("WanTransformer3DModel", 30, 12, ffn_dim=8960),
    "Wan2.1-14B": _preset("WanTransformer3DModel", 40, 40, ffn_dim=13824),
}

# Wan's pipelines pad every prompt to 512 tokens; its image encoder gives 257; its autoencoder makes one
# latent of the first frame and one of every 4 that follow.
_WAN_TEXT_TOKENS, _WAN_IMAGE_TOKENS, _WAN_FRAME_STRIDE = 512, 257, 4


def _dit_inputs(config: Any, latent: tuple[int, ...]) -> dict[str, Tensor | None]:
    return {
        "hidden_states": torch.zeros(1, config.in_channels, *latent),
        "timestep": torch.zeros(1),
        "class_labels": torch.zeros(1, dtype=torch.int64),
    }


def _wan_inputs(config: Any, latent: tuple[int, ...]) -> dict[str, Tensor | None]:
    images = None
    if config.image_dim is not None:
        # With positions there are two images, the first frame and the last, whose tokens are one sequence.
        tokens = config.pos_embed_seq_len
        shape = (1, _WAN_IMAGE_TOKENS) if tokens is None else (2, tokens // 2)
        images = torch.zeros(*shape, config.image_dim)
    return {
        "hidden_states": torch.zeros(1, config.in_channels, *latent),
        "timestep": torch.zeros(1),
        "encoder_hidden_states": torch.zeros(1, _WAN_TEXT_TOKENS, config.text_dim),
        "encoder_hidden_states_image": images,
    }


# Stock class -> the class that is run, with softmax attention, and its inputs. Ours takes any DiT grid.
_MODELS: dict[str, tuple[type[Any], _Inputs]] = {
    "DiTTransformer2DModel": (MHLADiTTransformer2DModel, _dit_inputs),
    "MHLADiTTransformer2DModel": (MHLADiTTransformer2DModel, _dit_inputs),
    "WanTransformer3DModel": (WanTransformer3DModel, _wan_inputs),
    "MHLAWanTransformer3DModel": (WanTransformer3DModel, _wan_inputs),
}
# What diffusers calls the parts of a layer, and we do.
_PARTS = {"norm1": "modulation", "attn2": "cross-attention", "ff": "feed-forward", "ffn": "feed-forward"}


@dataclass(frozen=True)
class Plan:
    """A model on a grid of tokens with blocks, and what each attention costs there.

    ``attention`` is ``"softmax"``, ``"linear"`` (one block) or ``"mhla"`` throughout. ``str(plan)`` is a
    table of everything, 100 columns wide at most.

    Args:
        model, size: what the table calls them.
        layout: the grid of tokens and its blocks.
        heads, head_dim: H and d.
        num_layers, linear_layers: layers, and those whose attention is or becomes linear.
        gate, cpe: whether linear layers have an output gate, and a convolution on v.
        layer: FLOPs of a softmax layer by part, named as in the model; ``attn1`` is its self-attention.
        total: FLOPs of the whole softmax model.
        dtype: of q, k, v and the output.
    """

    model: str
    size: str
    layout: BlockLayout
    heads: int
    head_dim: int
    num_layers: int
    linear_layers: int
    gate: bool
    cpe: bool
    layer: dict[str, int]
    total: int
    dtype: torch.dtype = torch.bfloat16

    def operator_flops(self, attention: str) -> int:
        """Softmax ``4 N^2 d H``, linear ``4 N d^2 H``, MHLA ``H d^2 (4 N + 2 M^2)`` (section 4.2).

        Not in it: the denominators, a 1 / d of the linear forms.
        """
        tokens, d = self.layout.num_tokens, self.head_dim
        if attention == "softmax":
            return 4 * tokens**2 * d * self.heads
        mixing = 2 * self.layout.num_blocks**2 if attention == "mhla" and self.layout.num_blocks > 1 else 0
        return (4 * tokens + mixing) * d**2 * self.heads

    def layer_flops(self, attention: str) -> dict[str, int]:
        """FLOPs of each part of a layer."""
        width, extras = self.heads * self.head_dim, 0
        if attention != "softmax":
            convolution = 2 * 3 ** len(self.layout.grid) * width
            extras = self.layout.num_tokens * (self.gate * 2 * width**2 + self.cpe * convolution)
        return {
            "attention operator": self.operator_flops(attention),
            "projections q, k, v, out": self.layer["attn1"] - self.operator_flops("softmax"),
            "gate and convolution": extras,
            **{_PARTS.get(name, name): flops for name, flops in self.layer.items() if name != "attn1"},
        }

    def model_flops(self, attention: str) -> int:
        """FLOPs of the whole model with this attention in its linear layers and softmax in the others."""
        change = sum(self.layer_flops(attention).values()) - sum(self.layer.values())
        return self.total + self.linear_layers * change

    def speedups(self, attention: str) -> dict[str, float]:
        """FLOPs of softmax over those of this attention, for the operator, one linear layer and the model.

        By Amdahl's law the last is the most that the model can gain where time is spent on FLOPs.
        """
        return {
            "operator": self.operator_flops("softmax") / self.operator_flops(attention),
            "one layer": sum(self.layer.values()) / sum(self.layer_flops(attention).values()),
            "whole model": self.total / self.model_flops(attention),
        }

    @property
    def speedup_limit(self) -> float:
        """The whole model's speed-up if linear attention, gate and convolution cost nothing."""
        return self.total / (self.total - self.linear_layers * self.operator_flops("softmax"))

    @property
    def mixing_share(self) -> float:
        """The part of MHLA's operator that is mixing, ``2 M^2 / (4 N + 2 M^2)``."""
        return 1 - self.operator_flops("linear") / self.operator_flops("mhla")

    @property
    def operator_bytes(self) -> int:
        """What any operator has to read and write in a layer: q, k, v and the output."""
        return 4 * self.layout.num_tokens * self.heads * self.head_dim * self.dtype.itemsize

    def exchange_bytes(self, attention: str) -> int:
        """What context-parallel ranks exchange in a layer: q, k, v and output, or the float32 summaries."""
        if attention == "softmax":
            return self.operator_bytes
        whole = BlockLayout(self.layout.grid, (1,) * len(self.layout.grid))
        layout = self.layout if attention == "mhla" else whole
        return exchanged_bytes(layout, 1, self.heads, self.head_dim, self.head_dim)

    def __str__(self) -> str:
        return "\n".join([*_heading(self), *_table(self)])


def plan(
    model: str,
    height: int,
    width: int,
    frames: int | None = None,
    blocks: int | tuple[int, ...] | None = None,
    gate: bool | None = None,
    cpe: bool | None = None,
    linear_layers: int | None = None,
    vae_stride: int = 8,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
) -> Plan:
    """What MHLA saves for a model and a size: FLOPs, bytes, the bound on the speed-up, and blocks to take.

    Args:
        model: folder, config.json or hub id of a DiT or Wan transformer or pipeline, of which only the config
            is read; or DiT-S/2, DiT-B/2, DiT-L/2, DiT-XL/2, Wan2.1-1.3B, Wan2.1-14B.
        height: of the output in pixels.
        width: of the output in pixels.
        frames: of the output, for video models.
        blocks: number in all or along each axis; by default the model's own, else the recommended ones.
        gate: whether MHLA has an output gate; by default as in the model's config, else no.
        cpe: whether MHLA has the convolution on v; by default as in the model's config, else no.
        linear_layers: number of layers with linear attention; by default as in the model's config, else all.
        vae_stride: pixels for one latent along height and width: 8 for the autoencoders of DiT and Wan2.1,
            16 for Wan2.2-TI2V-5B, 1 for models of pixels.
        dtype: of q, k, v and the output.

    Raises:
        ValueError: for a model that is not of these kinds, and sizes or blocks that do not fit; the message
            names those that do.
    """
    stored = load_model_config(model)
    softmax = _softmax_model(stored)
    config = softmax.config
    patch = (config.patch_size,) * 2 if isinstance(config.patch_size, int) else tuple(config.patch_size)
    grid = token_grid(patch, height, width, frames, vae_stride=vae_stride)
    given = {"blocks": blocks, "gate": gate, "cpe": cpe, "linear_layers": linear_layers}
    settings = _mhla_settings(stored, config)
    settings |= {name: value for name, value in given.items() if value is not None}
    if not 1 <= settings["linear_layers"] <= config.num_layers:
        raise ValueError(f"linear_layers must lie between 1 and {config.num_layers}, got {linear_layers}")
    blocks = settings.pop("blocks")
    layout = recommended_layout(grid) if blocks is None else MHLAConfig(blocks=blocks).layout(grid)
    latent = tuple(tokens * size for tokens, size in zip(grid, patch, strict=True))
    total, layer = _count_flops(softmax, _MODELS[stored["_class_name"]][1], latent)
    return Plan(
        model=model,
        size=f"{height} x {width} pixels" + (f", {frames} frames" if frames is not None else ""),
        layout=layout,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        num_layers=config.num_layers,
        layer=layer,
        total=total,
        dtype=getattr(torch, dtype),
        **settings,
    )


def load_model_config(model: str) -> dict[str, Any]:
    """The config of a transformer as it is stored; no weights are read.

    Args:
        model: a preset, or a folder, config.json or hub id of a transformer or of a pipeline, whose
            ``transformer`` is taken.

    Raises:
        ValueError: for what is not there, or is neither DiT nor Wan.
    """
    if model in PRESETS:
        return PRESETS[model]
    try:
        config = WanTransformer3DModel.load_config(model, subfolder=component_subfolder(model, "transformer"))
    except OSError as error:
        raise ValueError(
            f"{model!r} is no folder or hub id with a config.json, and none of {', '.join(PRESETS)} ({error})"
        ) from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    if name in ("MHLADiTTransformer2DModel", "MHLAWanTransformer3DModel"):
        config = {"attention": "mhla", **config}  # its default
    # Checkpoints of the time when DiT was a Transformer2DModel.
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        name = "DiTTransformer2DModel"
    if name not in _MODELS:
        raise ValueError(
            f"{model} is {f'a {name}' if name else 'no config with a _class_name'}; planned can be "
            f"{', '.join(_MODELS)}"
        )
    return {**config, "_class_name": name}


def _softmax_model(config: dict[str, Any]) -> Any:
    """The model with softmax attention in every layer, on the meta device."""
    model_class = _MODELS[config["_class_name"]][0]
    known = inspect.signature(model_class).parameters
    arguments = {**config, "attention": "softmax", "mhla_config": None}
    with torch.device("meta"):
        return model_class(**{key: value for key, value in arguments.items() if key in known})


def _mhla_settings(stored: dict[str, Any], config: Any) -> dict[str, Any]:
    """What the stored config says of MHLA; a softmax model becomes linear throughout."""
    mhla = MHLAConfig.from_dict(dict(stored.get("mhla_config") or {}))
    kinds = layer_attention(stored.get("attention", "softmax"), mhla.layers, config.num_layers)
    if set(kinds) == {"softmax"}:
        return {"linear_layers": config.num_layers, "blocks": None, "gate": False, "cpe": False}
    # The grid that a number of blocks in all is divided over.
    grid = stored.get("sample_grid") or (config.sample_size // config.patch_size,) * 2
    return {
        "linear_layers": config.num_layers - kinds.count("softmax"),
        "blocks": mhla.layout(tuple(grid)).blocks if "mhla" in kinds else None,
        "gate": mhla.gate,
        "cpe": mhla.cpe is not None,
    }


@torch.no_grad()
def _count_flops(model: Any, inputs: _Inputs, latent: tuple[int, ...]) -> tuple[int, dict[str, int]]:
    """FLOPs of the whole model, and of the parts of its first layer."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**inputs(model.config, latent))
    layers = next(name for name, part in model.named_children() if isinstance(part, nn.ModuleList))
    prefix = f"{type(model).__name__}.{layers}.0."
    parts = {
        name.removeprefix(prefix): sum(operators.values())
        for name, operators in counter.get_flop_counts().items()
        if name.startswith(prefix) and "." not in name.removeprefix(prefix)
    }
    return counter.get_total_flops(), parts


def token_grid(
    patch_size: tuple[int, ...], height: int, width: int, frames: int | None = None, *, vae_stride: int = 8
) -> tuple[int, ...]:
    """Tokens along each axis: ``(H, W)`` for images, ``(F, H, W)`` for video.

    The autoencoder makes one latent of ``vae_stride`` pixels each way and, for video, of the first frame and
    then of 4 frames each.

    Raises:
        ValueError: for sizes that do not divide, naming the nearest that do; for an image with frames and a
            video without.
    """
    if len(patch_size) == 2 and frames is not None:
        raise ValueError(f"an image model has no frames, got frames={frames}; leave it out")
    if len(patch_size) == 3 and frames is None:
        raise ValueError("a video model needs frames, such as frames=81")
    if vae_stride < 1:
        raise ValueError(f"vae_stride must be at least 1 pixel for a latent, got {vae_stride}")
    along = [
        _tokens(name, pixels, vae_stride * patch, f"vae_stride {vae_stride} x patch {patch}")
        for name, pixels, patch in zip(("height", "width"), (height, width), patch_size[-2:], strict=True)
    ]
    if frames is not None:
        unit = _WAN_FRAME_STRIDE * patch_size[0]
        reason = f"the autoencoder's {_WAN_FRAME_STRIDE} frames x patch {patch_size[0]}"
        along.insert(0, _tokens("frames", frames, unit, reason, lead=_WAN_FRAME_STRIDE - 1))
    return tuple(along)


def _tokens(name: str, size: int, unit: int, reason: str, *, lead: int = 0) -> int:
    """Tokens along an axis of ``size`` elements, before which ``lead`` are thought."""
    tokens, rest = divmod(size + lead, unit)
    if rest or tokens < 1:
        nearest = [unit * count - lead for count in (tokens, tokens + 1) if count >= 1] or [unit - lead]
        raise ValueError(
            f"{name} {size} does not divide into tokens of {unit} ({reason}); the nearest that does is "
            f"{' or '.join(map(str, nearest))}"
        )
    return tokens


def _heading(plan: Plan) -> Iterator[str]:
    layout, recommended = plan.layout, recommended_layout(plan.layout.grid)
    layers = "all" if plan.linear_layers == plan.num_layers else f"{plan.linear_layers} of"
    even = "" if layout.is_even else "at most "
    yield f"{plan.model}, {plan.size}: {_times(layout.grid)} = {layout.num_tokens:,} tokens"
    yield f"linear attention in {layers} {plan.num_layers} layers, {plan.heads} heads of {plan.head_dim}"
    yield (
        f"blocks {_times(layout.blocks)} = {layout.num_blocks}, each of {even}{_times(layout.block_shape)} "
        f"tokens; mixing is {100 * plan.mixing_share:.0f} % of the operator"
    )
    yield (
        "these blocks are the recommended ones"
        if layout == recommended
        else f"recommended: blocks {_times(recommended.blocks)} = {recommended.num_blocks}"
    )


def _table(plan: Plan) -> Iterator[str]:
    """A column for each attention, in sections with a heading each."""

    def section(heading: str, columns: list[dict[str, Any]], write: Callable[[float], str]) -> Iterator[str]:
        yield from ("", heading)
        for name in columns[0]:
            if any(column[name] for column in columns):
                yield f"  {name:30}{''.join(f'{write(column[name]):>14}' for column in columns)}"

    layers = [plan.layer_flops(attention) for attention in ATTENTIONS]
    flops = [
        {**layer, "one layer": sum(layer.values()), "whole model": plan.model_flops(attention)}
        for layer, attention in zip(layers, ATTENTIONS, strict=True)
    ]
    traffic = [
        {"q, k, v, out": plan.operator_bytes, "exchange between ranks": plan.exchange_bytes(attention)}
        for attention in ATTENTIONS
    ]
    intensity = [{"attention operator": plan.operator_flops(a) / plan.operator_bytes} for a in ATTENTIONS]
    yield from ("", f"{'':32}{'softmax':>14}{'linear':>14}{'MHLA':>14}")
    yield from section("GFLOPs", flops, lambda value: _digits(value / 1e9))
    yield from section(
        f"speed-up at most, by FLOPs (the model's if attention were free: {_digits(plan.speedup_limit)} x)",
        [plan.speedups(attention) for attention in ATTENTIONS],
        lambda value: f"{_digits(value)} x",
    )
    dtype = str(plan.dtype).removeprefix("torch.")
    yield from section(
        f"MB in a layer, {dtype} (linear attention and MHLA exchange key/value summaries, float32)",
        traffic,
        lambda value: _digits(value / 1e6),
    )
    yield from section("FLOPs a byte", intensity, _digits)


def _times(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))


def _digits(value: float) -> str:
    """Three digits or more, or a dash for nothing."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "-"

"""What MHLA saves for a model and a size, before anything is trained: FLOPs, bytes, and the blocks to take.

Counted as torch.utils.flop_counter.FlopCounterMode counts: a multiplication and an addition are 2 FLOPs;
products of matrices, convolutions and softmax attention count, norms, activations and rotations do not.
All numbers are for one sample and one forward; classifier-free guidance doubles both sides of every ratio.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from diffusers import DiTTransformer2DModel, WanTransformer3DModel

from mhla_diffusion.pipelines.auto import component_subfolder

from .attention import MHLAConfig
from .backbones.image import MHLADiTTransformer2DModel, layer_attention
from .ops import BlockLayout, recommended_layout

ATTENTIONS = ("softmax", "linear", "mhla")


def _dit(num_layers: int, heads: int, head_dim: int) -> dict[str, Any]:
    return {
        "_class_name": "DiTTransformer2DModel",
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "out_channels": 8,  # 4, and their variances
    }


def _wan(num_layers: int, heads: int, ffn_dim: int) -> dict[str, Any]:
    return {
        "_class_name": "WanTransformer3DModel",
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "ffn_dim": ffn_dim,
    }


PRESETS = {
    "DiT-S/2": _dit(12, 6, 64),
    "DiT-B/2": _dit(12, 12, 64),
    "DiT-L/2": _dit(24, 16, 64),
    "DiT-XL/2": _dit(28, 16, 72),
    "Wan2.1-1.3B": _wan(30, 12, 8960),
    "Wan2.1-14B": _wan(40, 40, 13824),
}

# Wan's pipelines pad every prompt to 512 tokens; its image encoder gives 257.
_WAN_TEXT_TOKENS, _WAN_IMAGE_TOKENS = 512, 257
_WAN_FRAME_STRIDE = 4


@dataclass(frozen=True)
class TransformerShape:
    """The numbers of a transformer that its FLOPs depend on.

    Args:
        num_layers, heads, head_dim: layers, H and d; the width is H d.
        patch_size: latent elements in a token along each axis, ``(h, w)`` or ``(f, h, w)``.
        feed_forward: FLOPs a token and layer.
        contexts: ``(tokens, width)`` of each sequence that cross-attention reads.
        modulation: FLOPs a layer that do not grow with the tokens.
        token_ends: FLOPs a token before and behind the layers: patch embedding, output.
        sample_ends: FLOPs outside the layers that do not grow with the tokens: embeddings of time and text.
        linear_layers: layers whose attention is or becomes linear; the others keep softmax.
        blocks: along each axis, of a model that has MHLA already.
        gate, cpe: whether linear layers have an output gate, and a convolution on v.
    """

    num_layers: int
    heads: int
    head_dim: int
    patch_size: tuple[int, ...]
    feed_forward: int
    contexts: tuple[tuple[int, int], ...]
    modulation: int
    token_ends: int
    sample_ends: int
    linear_layers: int
    blocks: tuple[int, ...] | None = None
    gate: bool = False
    cpe: bool = False

    @property
    def width(self) -> int:
        """H d."""
        return self.heads * self.head_dim


@dataclass(frozen=True)
class Plan:
    """A model on a grid of tokens with blocks, and what each attention costs there.

    ``attention`` is ``"softmax"``, ``"linear"`` (one block) or ``"mhla"`` throughout. ``str(plan)`` is a
    table of everything, 100 columns wide at most.

    Args:
        model: what the table calls the model.
        size: what the table calls the size.
        shape: see :class:`TransformerShape`.
        layout: the grid of tokens and its blocks.
        dtype: of q, k, v and the output.
    """

    model: str
    size: str
    shape: TransformerShape
    layout: BlockLayout
    dtype: torch.dtype = torch.bfloat16

    def operator_flops(self, attention: str) -> int:
        """Softmax ``4 N^2 d H``, linear ``4 N d^2 H``, MHLA ``H d^2 (4 N + 2 M^2)`` (section 4.2).

        Not in it: the denominators, a 1 / d of the linear forms, and the zeros that pad ragged blocks.
        """
        tokens, d = self.layout.num_tokens, self.shape.head_dim
        if attention == "softmax":
            return 4 * tokens**2 * self.shape.width
        mixing = 2 * self.layout.num_blocks**2 if attention == "mhla" and self.layout.num_blocks > 1 else 0
        return (4 * tokens + mixing) * d * self.shape.width

    def layer_flops(self, attention: str) -> dict[str, int]:
        """FLOPs of each part of a layer."""
        shape, tokens = self.shape, self.layout.num_tokens
        extras = 0
        if attention != "softmax":
            gate = 2 * shape.width**2 if shape.gate else 0
            convolution = 2 * 3 ** len(self.layout.grid) * shape.width if shape.cpe else 0
            extras = tokens * (gate + convolution)
        return {
            "attention operator": self.operator_flops(attention),
            "projections q, k, v, out": 8 * tokens * shape.width**2,
            "gate and convolution": extras,
            "cross-attention": self._cross_attention_flops(),
            "feed-forward": tokens * shape.feed_forward,
            "modulation": shape.modulation,
        }

    def _cross_attention_flops(self) -> int:
        """Queries and output, then keys, values and softmax attention for each context."""
        if not self.shape.contexts:
            return 0
        tokens, width = self.layout.num_tokens, self.shape.width
        contexts = sum(4 * count * width * (size + tokens) for count, size in self.shape.contexts)
        return 4 * tokens * width**2 + contexts

    def model_flops(self, attention: str) -> int:
        """FLOPs of the whole model with this attention in its linear layers and softmax in the others."""
        shape = self.shape
        linear = shape.linear_layers * sum(self.layer_flops(attention).values())
        kept = (shape.num_layers - shape.linear_layers) * sum(self.layer_flops("softmax").values())
        return linear + kept + self.layout.num_tokens * shape.token_ends + shape.sample_ends

    def speedups(self, attention: str) -> dict[str, float]:
        """FLOPs of softmax over those of this attention, for the operator, one linear layer and the model.

        By Amdahl's law the last is the most that the model can gain where time is spent on FLOPs.
        """
        return {
            "operator": self.operator_flops("softmax") / self.operator_flops(attention),
            "one layer": sum(self.layer_flops("softmax").values())
            / sum(self.layer_flops(attention).values()),
            "whole model": self.model_flops("softmax") / self.model_flops(attention),
        }

    @property
    def speedup_limit(self) -> float:
        """The whole model's speed-up if linear attention, gate and convolution cost nothing."""
        softmax = self.model_flops("softmax")
        return softmax / (softmax - self.shape.linear_layers * self.operator_flops("softmax"))

    @property
    def mixing_share(self) -> float:
        """The part of MHLA's operator that is mixing, ``2 M^2 / (4 N + 2 M^2)``."""
        return 1 - self.operator_flops("linear") / self.operator_flops("mhla")

    @property
    def operator_bytes(self) -> int:
        """What any operator has to read and write in a layer: q, k, v and the output."""
        return 4 * self.layout.num_tokens * self.shape.width * self.dtype.itemsize

    def state_elements(self, attention: str) -> int:
        """Numbers in all key/value summaries of a layer with their key sums, ``M d (d + 1)`` a head."""
        if attention == "softmax":
            return 0
        blocks = self.layout.num_blocks if attention == "mhla" else 1
        return blocks * self.shape.width * (self.shape.head_dim + 1)

    def exchange_bytes(self, attention: str) -> int:
        """What context-parallel ranks exchange in a layer: q, k, v and output, or the summaries in dtype."""
        if attention == "softmax":
            return self.operator_bytes
        return self.state_elements(attention) * self.dtype.itemsize

    def __str__(self) -> str:
        return _format(self)


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
        model: folder or hub id of a DiT or Wan transformer or pipeline, of which only the config is read; or
            DiT-S/2, DiT-B/2, DiT-L/2, DiT-XL/2, Wan2.1-1.3B, Wan2.1-14B.
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
    config = load_model_config(model)
    shape = transformer_shape(config)
    grid = token_grid(shape.patch_size, height, width, frames, vae_stride=vae_stride)
    linear_layers = shape.linear_layers if linear_layers is None else linear_layers
    if not 1 <= linear_layers <= shape.num_layers:
        raise ValueError(f"linear_layers must lie between 1 and {shape.num_layers}, got {linear_layers}")
    shape = dataclasses.replace(
        shape,
        linear_layers=linear_layers,
        gate=shape.gate if gate is None else gate,
        cpe=shape.cpe if cpe is None else cpe,
    )
    blocks = shape.blocks if blocks is None else blocks
    layout = recommended_layout(grid) if blocks is None else MHLAConfig(blocks=blocks).layout(grid)
    size = f"{height} x {width} pixels" + (f", {frames} frames" if frames is not None else "")
    return Plan(model=model, size=size, shape=shape, layout=layout, dtype=getattr(torch, dtype))


def load_model_config(model: str) -> dict[str, Any]:
    """The config of a transformer, with its class's defaults for what is not in it; no weights are read.

    Args:
        model: a preset, or a folder or hub id of a transformer or of a pipeline, whose ``transformer`` is
            taken.

    Raises:
        ValueError: for what is not there, or is neither DiT nor Wan.
    """
    if model in PRESETS:
        config = PRESETS[model]
    else:
        try:
            subfolder = component_subfolder(model, "transformer")
            config = DiTTransformer2DModel.load_config(model, subfolder=subfolder)
        except OSError as error:
            raise ValueError(
                f"{model!r} is no folder or hub id with a config.json, and none of {', '.join(PRESETS)} "
                f"({error})"
            ) from error
    model_class = _model_class(config)
    if model_class is None:
        raise ValueError(
            f"{model} is a {config.get('_class_name')}; planned can be DiTTransformer2DModel, "
            "MHLADiTTransformer2DModel and WanTransformer3DModel"
        )
    parameters = inspect.signature(model_class).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters} | config


def _model_class(config: dict[str, Any]) -> type[Any] | None:
    name = config.get("_class_name")
    # Checkpoints of the time when DiT was a Transformer2DModel.
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        return DiTTransformer2DModel
    classes = (DiTTransformer2DModel, MHLADiTTransformer2DModel, WanTransformer3DModel)
    return next((c for c in classes if c.__name__ == name), None)


def transformer_shape(config: dict[str, Any]) -> TransformerShape:
    """The shape of a transformer with this config, see :func:`load_model_config`."""
    return _wan_shape(config) if config["_class_name"] == "WanTransformer3DModel" else _dit_shape(config)


def _dit_shape(config: dict[str, Any]) -> TransformerShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch = config["patch_size"]
    channels = config["in_channels"] + (config["out_channels"] or config["in_channels"])
    # Each layer embeds the time anew (256 sines), and the output layer once more.
    embedding = 2 * (256 * width + width**2)
    # Hidden width 4 H d; a gated activation has a third matrix.
    matrices = 3 if config["activation_fn"] in ("geglu", "swiglu") else 2
    return TransformerShape(
        num_layers=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        patch_size=(patch, patch),
        feed_forward=matrices * 2 * 4 * width**2,
        contexts=(),
        modulation=embedding + 2 * 6 * width**2,
        token_ends=2 * width * patch**2 * channels,
        sample_ends=embedding + 2 * 2 * width**2,
        **_mhla_settings(config),
    )


def _mhla_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What the config of a model with MHLA adds to its shape; a softmax model becomes linear throughout."""
    num_layers = config["num_layers"]
    mhla = MHLAConfig.from_dict(dict(config.get("mhla_config") or {}))
    kinds = layer_attention(config.get("attention", "softmax"), mhla.layers, num_layers)
    if set(kinds) == {"softmax"}:
        return {"linear_layers": num_layers}
    grid = (config["sample_size"] // config["patch_size"],) * 2
    return {
        "linear_layers": num_layers - kinds.count("softmax"),
        "blocks": mhla.layout(grid).blocks if "mhla" in kinds else None,
        "gate": mhla.gate,
        "cpe": mhla.cpe is not None,
    }


def _wan_shape(config: dict[str, Any]) -> TransformerShape:
    width = config["num_attention_heads"] * config["attention_head_dim"]
    channels = config["in_channels"] + (config["out_channels"] or config["in_channels"])
    time = config["freq_dim"] * width + width**2 + 6 * width**2
    text = _WAN_TEXT_TOKENS * (config["text_dim"] * width + width**2)
    contexts, image = [(_WAN_TEXT_TOKENS, width)], 0
    if config["added_kv_proj_dim"] is not None:
        count = config["pos_embed_seq_len"] or _WAN_IMAGE_TOKENS
        contexts.append((count, config["added_kv_proj_dim"]))
        image = count * (config["image_dim"] ** 2 + config["image_dim"] * width)
    return TransformerShape(
        num_layers=config["num_layers"],
        heads=config["num_attention_heads"],
        head_dim=config["attention_head_dim"],
        patch_size=tuple(config["patch_size"]),
        feed_forward=4 * width * config["ffn_dim"],
        contexts=tuple(contexts),
        modulation=0,  # a table, not a layer
        token_ends=2 * width * math.prod(config["patch_size"]) * channels,
        sample_ends=2 * (time + text + image),
        linear_layers=config["num_layers"],
    )


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


def _format(plan: Plan) -> str:
    shape, layout = plan.shape, plan.layout
    layers = "all" if shape.linear_layers == shape.num_layers else f"{shape.linear_layers} of"
    lines = [
        f"{plan.model}, {plan.size}: {_times(layout.grid)} = {layout.num_tokens:,} tokens",
        f"linear attention in {layers} {shape.num_layers} layers, {shape.heads} heads of {shape.head_dim}",
        *_format_blocks(plan),
        "",
        f"{'':32}{'softmax':>14}{'linear':>14}{'MHLA':>14}",
    ]
    for heading, rows in _sections(plan):
        lines += [
            "",
            heading,
            *(f"  {name:30}{''.join(f'{cell:>14}' for cell in cells)}" for name, cells in rows),
        ]
    return "\n".join(lines)


def _format_blocks(plan: Plan) -> Iterator[str]:
    layout, recommended = plan.layout, recommended_layout(plan.layout.grid)
    even = "" if layout.is_even else "at most "
    yield (
        f"blocks {_times(layout.blocks)} = {layout.num_blocks}, each of {even}{_times(layout.block_shape)} "
        f"tokens; mixing is {100 * plan.mixing_share:.0f} % of the operator"
    )
    if layout == recommended:
        yield "these blocks are the recommended ones"
    else:
        yield f"recommended: blocks {_times(recommended.blocks)} = {recommended.num_blocks}"


_Row = tuple[str, list[str]]


def _sections(plan: Plan) -> Iterator[tuple[str, list[_Row]]]:
    layer = {attention: plan.layer_flops(attention) for attention in ATTENTIONS}
    flops = {part: [layer[attention][part] for attention in ATTENTIONS] for part in layer["softmax"]}
    flops["one layer"] = [sum(layer[attention].values()) for attention in ATTENTIONS]
    flops["whole model"] = [plan.model_flops(attention) for attention in ATTENTIONS]
    yield "GFLOPs", [(part, [_scaled(x, 1e9) for x in row]) for part, row in flops.items() if any(row)]
    speedups = {attention: plan.speedups(attention) for attention in ATTENTIONS}
    yield (
        f"speed-up at most, by FLOPs (the model's if attention were free: {_ratio(plan.speedup_limit)})",
        [(part, [_ratio(speedups[a][part]) for a in ATTENTIONS]) for part in speedups["mhla"]],
    )
    traffic = plan.operator_bytes
    yield (
        f"MB in a layer, {str(plan.dtype).removeprefix('torch.')} (key/value summaries float32)",
        [
            ("q, k, v, out", [_scaled(traffic, 1e6)] * len(ATTENTIONS)),
            ("key/value summaries", [_scaled(4 * plan.state_elements(a), 1e6) for a in ATTENTIONS]),
            ("exchange between ranks", [_scaled(plan.exchange_bytes(a), 1e6) for a in ATTENTIONS]),
        ],
    )
    intensity = [f"{plan.operator_flops(a) / traffic:,.0f}" for a in ATTENTIONS]
    yield "FLOPs a byte", [("attention operator", intensity)]


def _times(numbers: tuple[int, ...]) -> str:
    return " x ".join(map(str, numbers))


def _scaled(value: float, unit: float) -> str:
    """Three digits or more, or a dash for nothing."""
    value /= unit
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "-"


def _ratio(value: float) -> str:
    return f"{value:,.0f} x" if value >= 100 else f"{value:.3g} x"

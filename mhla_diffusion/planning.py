"""What MHLA saves for a model and a size, before anything is trained: FLOPs, bytes, and the blocks to take.

The model with its stock attention is run on torch's meta device, without weights, under
torch.utils.flop_counter; formulas exchange the self-attention for softmax, linear attention or MHLA. A
multiplication and an addition are 2 FLOPs; products of matrices and convolutions count, norms, activations
and rotations do not. All numbers are for one sample and one forward; classifier-free guidance doubles both
sides of every ratio.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import diffusers
import torch
from accelerate.utils import send_to_device
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .autoencoders import vae_strides
from .backbones import BACKBONES, backbone_of_config, stock_names
from .backbones.layer_plan import layer_settings
from .config import AUTO_WINDOW, POWER_MAP, WIDE_MAPS, WINDOW_ONLY, MHLAConfig
from .files.text import sizes_text
from .hub import holds_pixels, load_component_config, load_config
from .ops import BlockLayout, exchanged_bytes, recommended_layout

ATTENTIONS = ("softmax", "linear", "mhla")
_DTYPES = ("bfloat16", "float16", "float32")

PRESETS = {
    name: {"_class_name": stock.__name__, **arguments}
    for stock, ours in BACKBONES.items()
    for name, arguments in ours.presets.items()
}

# What diffusers calls the parts of a layer, and we do.
_PARTS = {
    "norm1": "modulation", "attn2": "cross-attention", "ff": "feed-forward", "ffn": "feed-forward",
    "img_mod": "modulation", "txt_mod": "modulation of text",
    "img_mlp": "feed-forward", "txt_mlp": "feed-forward of text",
}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Model on a grid of tokens with blocks, and what each attention costs there.

    ``attention`` is ``"softmax"``, ``"linear"`` (one block) or ``"mhla"`` throughout. ``str(plan)`` is a
    table of everything, 100 columns wide at most.

    Args:
        model, size: what the table calls them.
        layout: the grid of tokens and its blocks, and the text, if it takes part in self-attention.
        heads, head_dim: H and d.
        num_layers, linear_layers: layers, and those whose attention is or becomes linear.
        mhla: settings of those.
        layer: FLOPs of a layer by part, named as in the model, without its self-attention.
        projections: FLOPs of the self-attention's projections in a layer.
        rest: FLOPs of the whole model without the operators of self-attention.
        grids: how often self-attention goes over the grid for a sample; once for each frame in Latte.
        operators, linear_operators: of self-attention in the whole model, and those that are or become
            linear; more than layers where a model has branches beside them.
        stock_attention: of the layers that do not become linear, ``"softmax"`` or ``"linear"``.
        dtype: of q, k, v and the output.
    """

    model: str
    size: str
    layout: BlockLayout
    heads: int
    head_dim: int
    num_layers: int
    linear_layers: int
    mhla: MHLAConfig
    layer: dict[str, int]
    projections: int
    rest: int
    operators: int
    linear_operators: int
    stock_attention: str = "softmax"
    dtype: torch.dtype = torch.bfloat16
    grids: int = 1

    def operator_flops(self, attention: str) -> int:
        """Softmax ``4 N^2 d H``, linear ``4 N d^2 H``, MHLA ``H d^2 (4 N + 2 M^2)`` (section 4.2).

        Wide features double the linear forms, learned ones add ``4 N d^2 H``. A softmax window of n tokens,
        with its margin, adds ``4 N n d H``, or is all (``local="only"``); each further block adds as many as
        it has tokens, and choosing them ``2 N d (M (d + 1) + d) H``, or ``2 N^2 d H`` if exact. Not in it:
        the denominators, a 1 / d of the linear forms, and what is filled up to whole registers.
        """
        tokens, d = self.layout.num_tokens, self.head_dim
        if attention == "softmax":
            return 4 * tokens**2 * d * self.heads * self.grids
        flops = (4 * tokens + self._mixing * (attention == "mhla")) * d**2 * self._width
        if self.mhla.feature_map == "hedgehog":
            flops += 4 * tokens * d**2
        if self.mhla.window and attention == "mhla":
            flops = self._window_flops + (0 if self.mhla.window == WINDOW_ONLY else flops)
        return flops * self.heads * self.grids

    @property
    def _window_flops(self) -> int:
        """Softmax of a head in each block and further ones, extra tokens apart; in one block all together."""
        tokens, extra, d = self.layout.num_tokens, sum(self.layout.extra or ()), self.head_dim
        blocks, block = math.prod(self.layout.blocks), math.prod(self.layout.block_shape)
        if blocks == 1:
            return 4 * tokens**2 * d
        flops = 4 * ((tokens - extra) * self.layout.reach_size(self.mhla.margin) + extra**2) * d
        if routes := min(self.mhla.routed_blocks, blocks - 1):
            choosing = blocks * block if self.mhla.exact_routing else blocks * (d + 1) + d
            flops += 4 * tokens * routes * block * d + 2 * tokens * d * choosing
        return flops

    @property
    def _mixing(self) -> int:
        """FLOPs of mixing in a head, over d^2."""
        mixed = self.layout.num_blocks > 1 and self.mhla.window != WINDOW_ONLY
        return 2 * self.layout.num_blocks**2 * mixed

    @property
    def _width(self) -> int:
        """Features for each channel."""
        return 2 if self.mhla.feature_map in WIDE_MAPS else 1

    def layer_flops(self, attention: str) -> dict[str, int]:
        """FLOPs of each part of a layer."""
        width, extras = self.heads * self.head_dim, 0
        if attention != "softmax":
            convolution = 2 * 3 ** len(self.layout.grid) * width
            convolutions = (self.mhla.cpe is not None) + 2 * self.mhla.qk_conv
            extras = self.layout.num_tokens * self.mhla.gate * 2 * width**2
            extras += math.prod(self.layout.grid) * convolutions * convolution
        return {
            "attention operator": self.operator_flops(attention),
            "projections q, k, v, out": self.projections,
            "gate and convolution": extras * self.grids,
            **{_PARTS.get(name, name): flops for name, flops in self.layer.items()},
        }

    def model_flops(self, attention: str) -> int:
        """FLOPs of the whole model with this attention in its linear layers, the stock one in the others."""
        layer = self.layer_flops(attention)
        return self._fixed_flops + self.linear_operators * (
            layer["attention operator"] + layer["gate and convolution"]
        )

    def with_config(self, config: MHLAConfig) -> Plan:
        """Return the plan of the same model and size with these settings in its linear layers."""
        layout = replace(config.layout(self.layout.grid), extra=self.layout.extra)
        return replace(self, layout=layout, mhla=replace(config, blocks=layout.blocks))

    @property
    def _fixed_flops(self) -> int:
        others = self.operators - self.linear_operators
        stock = replace(self, mhla=MHLAConfig.paper())  # relu, which linear attention of stock models has
        return self.rest + others * stock.operator_flops(self.stock_attention)

    def speedups(self, attention: str) -> dict[str, float]:
        """FLOPs of softmax over those of this attention, for the operator, one linear layer and the model.

        By Amdahl's law the last is the most that the model can gain where time is spent on FLOPs.
        """
        layers = [sum(self.layer_flops(kind).values()) for kind in ("softmax", attention)]
        return {
            "operator": self.operator_flops("softmax") / self.operator_flops(attention),
            "one layer": layers[0] / layers[1],
            "whole model": self.model_flops("softmax") / self.model_flops(attention),
        }

    @property
    def speedup_limit(self) -> float:
        """Speed-up of the whole model if linear attention and what is beside it cost nothing."""
        return self.model_flops("softmax") / self._fixed_flops

    @property
    def mixing_share(self) -> float:
        """Share of mixing in MHLA's operator; ``2 M^2 / (4 N + 2 M^2)`` in the paper's form."""
        mixing = self._mixing * self.head_dim**2 * self._width * self.heads * self.grids
        return mixing / self.operator_flops("mhla")

    @property
    def operator_bytes(self) -> int:
        """Bytes that any operator reads and writes in a layer: q, k, v and the output."""
        tokens = self.layout.num_tokens * self.grids
        return 4 * tokens * self.heads * self.head_dim * self.dtype.itemsize

    def exchange_bytes(self, attention: str) -> int:
        """Bytes that parallel ranks exchange in a layer: float32 summaries, or q, k, v and the output.

        Those of softmax and of what needs the tokens of other ranks, with what a convolution on v adds to the
        output.
        """
        config = self.mhla if attention == "mhla" else replace(self.mhla.without_window(), blocks=1)
        if attention != "softmax" and config.cpe:
            return self.operator_bytes * 5 // 4
        if attention == "softmax" or config.needs_all_tokens:
            return self.operator_bytes
        whole = BlockLayout(self.layout.grid, (1,) * len(self.layout.grid), self.layout.extra)
        layout, features = self.layout if attention == "mhla" else whole, self.head_dim * self._width
        return exchanged_bytes(
            layout, self.grids, self.heads, features, self.head_dim, normalizer=config.normalizer
        )

    def __str__(self) -> str:
        return "\n".join([*_heading(self), *_table(self)])


def plan(
    model: str,
    height: int,
    width: int,
    frames: int | None = None,
    *,
    blocks: int | tuple[int, ...] | None = None,
    gate: bool | None = None,
    cpe: bool | None = None,
    local: bool | None = None,
    hedgehog: bool | None = None,
    linear_layers: int | None = None,
    vae_stride: int | None = None,
    extra_tokens: int | None = None,
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
) -> Plan:
    """Plan MHLA for a model and a size: FLOPs, bytes, the bound on the speed-up, and blocks to take.

    Args:
        model: folder, config.json or hub id of a transformer that has an MHLA form, or of a pipeline of one,
            of which only the config is read; or a published size, such as DiT-XL/2, PixArt-Sigma-XL/2,
            Sana-0.6B, Wan2.1-1.3B or LTX-Video-2B; another name is answered with all of them.
        height: of the output in pixels.
        width: of the output in pixels.
        frames: of the output, for video models.
        blocks: number in all or along each axis; by default the model's own, else the recommended ones.
        gate: whether MHLA has an output gate; by default as in the model's config, else no.
        cpe: whether MHLA has the convolution on v; by default as in the model's config, else no.
        local: whether MHLA has a softmax window; by default as in the model's config, else as in new models:
            with a margin of a quarter of a block, where there are several.
        hedgehog: whether its features are learned; by default as in the model's config, else no.
        linear_layers: number of layers with linear attention; by default as in the model's config, else all.
        vae_stride: pixels for one latent along height and width; by default that of the pipeline's own
            autoencoder, 1 where it has none; of a transformer alone that of the one that the stock model
            comes with: 8 for DiT and Wan2.1, 32 for Sana. Wan2.2-TI2V-5B has 16, one of pixels 1.
        extra_tokens: tokens of the text, for models whose self-attention it takes part in; 128 by default.
        dtype: of q, k, v and the output.

    Raises:
        ValueError: for a model that is not of these kinds, and sizes or blocks that do not fit; the message
            names those that do.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    stored = load_model_config(model)
    transformer = _stock_model(stored)
    attn, num_layers = transformer.self_attention[0], len(transformer.layer_attention)
    if extra_tokens is not None:
        _set_extra_tokens(transformer, extra_tokens, model)
    strides = transformer.vae_stride if model in PRESETS else _stored_strides(model, transformer)
    grid = grid_of_pixels(
        transformer.latents_per_token, height, width, frames, frame_stride=strides[0],
        vae_stride=strides[-1] if vae_stride is None else vae_stride,
    )  # fmt: skip
    config, stored_layers, stored_blocks = _stored_form(stored, transformer)
    if linear_layers is None:
        linear_layers = stored_layers
    if not 1 <= linear_layers <= num_layers:
        raise ValueError(f"linear_layers must lie between 1 and {num_layers}, got {linear_layers}")
    blocks = blocks if blocks is not None else stored_blocks
    try:
        flops = _count_flops(transformer, grid)
    except RuntimeError as error:  # tables of the model, or counts of torch, end there
        text = f" and {extra_tokens} of text" if extra_tokens else ""
        raise ValueError(
            f"{model} does not run on {sizes_text(grid)} tokens{text}: take fewer ({error})"
        ) from error
    layout = recommended_layout(grid) if blocks is None else MHLAConfig(blocks=blocks).layout(grid)
    config = _changed_form(config, layout.blocks, gate=gate, cpe=cpe, local=local, hedgehog=hedgehog)
    if transformer.extra_tokens:
        layout = replace(layout, extra=(transformer.extra_tokens, 0))
    operators, linear_operators = _count_operators(transformer, linear_layers)
    return Plan(
        model=model,
        size=f"{height} x {width} pixels" + (f", {frames} frames" if frames is not None else ""),
        layout=layout,
        heads=attn.heads,
        head_dim=attn.inner_dim // attn.heads,
        num_layers=num_layers,
        linear_layers=linear_layers,
        mhla=config,
        stock_attention=transformer.stock_attention,
        operators=operators,
        linear_operators=linear_operators,
        **flops,
        dtype=getattr(torch, dtype),
        grids=transformer.grids_of_sample,
    )


def _set_extra_tokens(transformer: Any, extra_tokens: int, name: str) -> None:
    if not transformer.extra_tokens or extra_tokens < 1:
        raise ValueError(
            f"extra_tokens must be 1 or more, and the text a part of self-attention, which it is "
            f"{'' if transformer.extra_tokens else 'not '}in {name}; got {extra_tokens}"
        )
    transformer.extra_tokens = extra_tokens


def _changed_form(
    config: MHLAConfig,
    blocks: tuple[int, ...],
    *,
    gate: bool | None,
    cpe: bool | None,
    local: bool | None,
    hedgehog: bool | None,
) -> MHLAConfig:
    """The settings with these blocks, and parts that are asked for where the settings lack or have them."""
    one = math.prod(blocks) == 1
    if local is False or (one and config.window != WINDOW_ONLY):
        config = config.without_window()
    config = replace(config, blocks=blocks)
    if local and config.window is None:
        config = replace(config, local=AUTO_WINDOW)
        if config.window is None:
            raise ValueError(
                "local is a softmax window in one of several blocks, with the normalizer 'paper'; got blocks "
                f"{sizes_text(blocks)} and normalizer {config.normalizer!r}: take others, or leave it out"
            )
    if hedgehog is not None and hedgehog != (config.feature_map == "hedgehog"):
        config = replace(config, feature_map="hedgehog" if hedgehog else "relu")
    if cpe is not None and cpe != (config.cpe is not None):
        config = replace(config, cpe="zero" if cpe else None)
    return config if gate is None else replace(config, gate=gate)


def load_model_config(model: str) -> dict[str, Any]:
    """Read the config of a transformer as it is stored; no weights are read.

    Args:
        model: a preset, or a folder, config.json or hub id of a transformer or of a pipeline, whose
            ``transformer`` is taken.

    Raises:
        ValueError: for what is not there, or has no MHLA form.
    """
    if model in PRESETS:
        return PRESETS[model]
    presets = {name.lower(): name for name in PRESETS}
    if not Path(model).exists() and (close := get_close_matches(model.lower(), presets, n=1, cutoff=0.85)):
        raise ValueError(f"unknown preset {model!r}, did you mean {presets[close[0]]}?")
    try:
        config = load_component_config(model, "transformer")
    except OSError as error:
        raise ValueError(
            f"{model!r} is no folder or hub id with a config.json, and none of {', '.join(PRESETS)} ({error})"
        ) from error
    name = config.get("_class_name") if isinstance(config, dict) else None
    ours = backbone_of_config(config) if name else None
    if ours is None:
        raise ValueError(
            f"{model} is {f'a {name}' if name else 'no config with a _class_name'}; planned can be "
            f"{stock_names()}"
        )
    if name == ours.__name__:
        return {"attention": "mhla", **config}  # its default
    return {**config, "_class_name": ours.stock.__name__}


def count_parameters(model: str) -> int:
    """Count the parameters of a model with its stock attention; see :func:`load_model_config`."""
    return sum(weight.numel() for weight in _stock_model(load_model_config(model)).parameters())


def _stored_strides(path: str, model: Any) -> tuple[int, ...]:
    """Frames, of videos, and pixels of a latent: of a pipeline's own autoencoder, or of the stock one."""
    if holds_pixels(path):
        return (1,)
    try:
        config = load_config(path, subfolder="vae")
    except OSError:
        return model.vae_stride
    name = config.get("_class_name", "")
    if not name.startswith("Autoencoder"):  # of the file of a config there is but that
        return model.vae_stride
    with torch.device("meta"):
        return vae_strides(getattr(diffusers, name).from_config(config))


def _stock_model(config: dict[str, Any]) -> Any:
    """Our form of a model with its stock attention in every layer, on the meta device."""
    ours = backbone_of_config(config)
    assert ours is not None
    known = inspect.signature(ours.__init__).parameters
    arguments = {**config, "attention": ours.stock_attention, "mhla_config": None}
    with torch.device("meta"):
        return ours(**{key: value for key, value in arguments.items() if key in known})


def _stored_form(stored: dict[str, Any], model: Any) -> tuple[MHLAConfig, int, tuple[int, ...] | None]:
    """What the stored config says: settings of its first linear layer, how many there are, their blocks.

    A stock model becomes linear, and has no blocks of its own.
    """
    num_layers, stock = len(model.layer_attention), model.stock_attention
    kinds, configs = layer_settings(
        stored.get("attention", stock), stored.get("mhla_config"), num_layers, stock=stock
    )
    linear = [number for number, kind in enumerate(kinds) if kind != stock]
    if not linear:
        return MHLAConfig(), num_layers, None
    config = configs[linear[0]]
    if "mhla" not in kinds:
        return config.linear(), len(linear), None
    return config, len(linear), config.layout(model.default_grid).blocks


def _count_operators(model: Any, linear_layers: int) -> tuple[int, int]:
    """Count self-attention in layers and branches, all and linear; the first layers are the linear ones."""
    kinds = ["linear"] * linear_layers + ["other"] * (len(model.layer_attention) - linear_layers)
    kinds += model.branch_kinds(kinds)
    return len(kinds), kinds.count("linear")


@torch.no_grad()
def _count_flops(model: Any, grid: tuple[int, ...]) -> dict[str, Any]:
    """Count the whole model and the parts of its first layer, without the operators of self-attention."""
    with torch.device("meta"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        # Tables that come from numpy are on the CPU whatever the context says.
        model(**send_to_device(model.example_inputs(grid), "meta"))
    prefix = f"{type(model).__name__}.{model.block_list}.0."
    counts = {
        name.removeprefix(prefix): sum(operators.values())
        for name, operators in counter.get_flop_counts().items()
        if name.startswith(prefix)
    }
    attention = model.attention_name
    projections = sum(flops for name, flops in counts.items() if name.startswith(f"{attention}."))
    operators = _count_operators(model, 0)[0] * (counts[attention] - projections)
    return {
        "layer": {name: flops for name, flops in counts.items() if "." not in name and name != attention},
        "projections": projections,
        "rest": counter.get_total_flops() - operators,
    }


def grid_of_pixels(
    patch_size: tuple[int, ...],
    height: int,
    width: int,
    frames: int | None = None,
    *,
    vae_stride: int = 8,
    frame_stride: int = 4,
) -> tuple[int, ...]:
    """Return the tokens along each axis: ``(H, W)`` for images, ``(F, H, W)`` for video.

    The autoencoder makes one latent of ``vae_stride`` pixels each way and, for video, of the first frame and
    then of ``frame_stride`` frames each.

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
        unit = frame_stride * patch_size[0]
        reason = f"the autoencoder's {frame_stride} frames x patch {patch_size[0]}"
        along.insert(0, _tokens("frames", frames, unit, reason, lead=frame_stride - 1))
    return tuple(along)


def _tokens(name: str, size: int, unit: int, reason: str, *, lead: int = 0) -> int:
    """Tokens along an axis of ``size`` elements, before which ``lead`` are thought."""
    tokens, rest = divmod(size + lead, unit)
    if rest or tokens < 1:
        nearest = [unit * count - lead for count in (tokens, tokens + 1) if count >= 1] or [unit - lead]
        raise ValueError(
            f"{name} {size} does not divide into tokens of {unit} ({reason}; of pixels alone vae_stride is "
            f"1); the nearest that does is {' or '.join(map(str, nearest))}"
        )
    return tokens


def _heading(plan: Plan) -> Iterator[str]:
    layout, recommended = plan.layout, recommended_layout(plan.layout.grid)
    layers = "all" if plan.linear_layers == plan.num_layers else f"{plan.linear_layers} of"
    even = "" if BlockLayout(layout.grid, layout.blocks).is_even else "at most "
    extra = "" if layout.extra is None else f" and {sum(layout.extra):,} of text"
    yield f"{plan.model}, {plan.size}: {sizes_text(layout.grid)} = {math.prod(layout.grid):,} tokens{extra}"
    yield f"linear attention in {layers} {plan.num_layers} layers, {plan.heads} heads of {plan.head_dim}"
    yield (
        f"blocks {sizes_text(layout.blocks)} = {math.prod(layout.blocks)}, each of {even}"
        f"{sizes_text(layout.block_shape)} tokens{' and one of text' if extra else ''}; mixing is "
        f"{100 * plan.mixing_share:.0f} % of the operator"
    )
    yield f"MHLA {_form(plan)}"
    yield (
        "these blocks are the recommended ones"
        if layout.blocks == recommended.blocks
        else f"recommended: blocks {sizes_text(recommended.blocks)} = {recommended.num_blocks}"
    )
    usual = MHLAConfig().blocks
    assert isinstance(usual, int)
    if len(layout.grid) == 2 and recommended.num_blocks < usual <= math.isqrt(layout.num_tokens):
        yield f"  (mixing is at most 20 % of the operator then; the paper and the configs take {usual} for"
        yield "  images, which M^2 <= N allows here: more to mix, for more of the time)"


def _form(plan: Plan) -> str:
    """Name what costs FLOPs beside the paper's operator."""
    config = plan.mhla
    margin = f", margin {config.margin}" if config.margin else ""
    parts = {
        f"a softmax window ({config.window}{margin})": config.window,
        f"{config.routed_blocks} {'exactly ' * config.exact_routing}routed blocks": config.routed_blocks,
        f"features {config.feature_map}": config.feature_map in (*WIDE_MAPS, POWER_MAP),
        "a gate": config.gate,
        "a convolution on v": config.cpe,
        "convolutions on q and k": config.qk_conv,
    }
    chosen = [name for name, has in parts.items() if has]
    return f"with {', '.join(chosen)}" if chosen else "without window, gate and convolution"


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
        f"MB in a layer, {dtype} (ranks exchange tokens, or where these suffice summaries, float32)",
        traffic,
        lambda value: _digits(value / 1e6),
    )
    yield from section("FLOPs a byte", intensity, _digits)


def _digits(value: float) -> str:
    """Three digits or more, or a dash for nothing."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value else "-"

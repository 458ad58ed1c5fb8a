"""Queries and keys of every self-attention layer that a call of a model goes through."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..arguments import require_seed
from ..attention import MHLA
from ..backbones import backbone_of, convert_to_mhla, load_transformer
from ..backbones.grid import our_arguments, token_grid
from ..backbones.positions import rotary_pairs
from ..backbones.processors import is_joint, join_heads, joint_mask
from ..backbones.quantised import require_not_quantised
from ..config import WINDOW_ONLY, MHLAConfig
from ..ops import initial_mixing, locality_mixing, recommended_layout
from .matrices import (
    MatrixStatistics,
    attention_matrices,
    audit_mixing,
    matrix_statistics,
    mean_statistics,
    mixing_map,
    tables_of,
    window_matrices,
)
from .page import Analysis, LayerAnalysis

# Most of diffusers' newer models have a class of their own, with this mixin.
_ATTENTION_LAYERS = (Attention, AttentionModuleMixin)


@torch.no_grad()
def analyze_stored(
    model: str,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    timestep: int = 500,
    batch_size: int = 2,
    seed: int = 0,
    max_tokens: int = 4096,
) -> Analysis:
    """Analyse a stored model on noise and drawn conditions; see :func:`analyze`.

    Args:
        model: folder or hub id of a transformer that has an MHLA form, stock or ours, or of its pipeline.
        height, width, frames: of the latents; those that the model was made for by default.
        timestep: 0 to 999.
        batch_size: samples.
        seed: of the noise and conditions.
        max_tokens: see :func:`analyze`.

    Raises:
        ValueError: for another model, a quantised one, too many tokens, a size that is not positive or that
            its patches do not divide, or a seed that torch does not take.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    require_seed(seed)
    if not 0 <= timestep < 1000:
        raise ValueError(f"timestep must lie between 0 and 999, got {timestep}")
    transformer = _load(model)
    patch = transformer.latents_per_token
    own = [tokens * size for tokens, size in zip(transformer.default_grid, patch, strict=True)]
    if frames is not None and len(own) == 2:
        raise ValueError(f"{model} is a model of images and has no frames, got frames={frames}; leave it out")
    asked = (frames, height, width if width is not None or height is None else height)
    if not all(size is None or size > 0 for size in asked):
        raise ValueError(
            f"height, width and frames must be 1 or more, got {height}, {width} and {frames}: leave out what "
            "the model was made for"
        )
    latents = [given or size for given, size in zip(asked[-len(own) :], own, strict=True)]
    grid, generator = token_grid(latents, patch), torch.Generator().manual_seed(seed)
    _require_few(model, math.prod(grid), max_tokens)
    inputs = transformer.example_inputs(grid, batch_size=batch_size, generator=generator)
    inputs = transformer.at_time(inputs, timestep)
    return analyze(
        transformer,
        lambda: transformer(**inputs),
        max_tokens=max_tokens,
        settings={
            "model": model,
            "latents": f"{batch_size} x {' x '.join(map(str, latents))}, noise",
            "timestep": timestep,
            "seed": seed,
        },
    )


def _load(model: str) -> Any:
    """Load our form of a stored transformer, which runs any grid."""
    transformer = load_transformer(model).eval()
    require_not_quantised(transformer, model, "analysis")
    ours = backbone_of(transformer)
    assert ours is not None
    if isinstance(transformer, ours):
        return transformer
    return convert_to_mhla(transformer, MHLAConfig(layers=()))


@torch.no_grad()
def analyze(
    model: nn.Module,
    run: Callable[[], Any],
    *,
    max_tokens: int = 4096,
    max_matrices: int = 8,
    settings: dict[str, Any] | None = None,
) -> Analysis:
    """Analyse every self-attention layer that a call of a model goes through.

    Layers are MHLA modules but for causal ones, and attention layers of diffusers with any other processor.

    Args:
        model: any model with such layers.
        run: calls the model on a batch.
        max_tokens: more tokens than this are refused: the matrices of a layer take 8 N^2 bytes each.
        max_matrices: samples and heads to look at in each layer, spread evenly.
        settings: what the report should say of the call.

    Raises:
        ValueError: for a model without such layers, too many tokens, or queries and keys that are not finite.
    """
    if max_matrices < 1:
        raise ValueError(f"max_matrices must be at least 1, got {max_matrices}")
    calls: dict[str, tuple[nn.Module, Tensor, Tensor, dict[str, Any]]] = {}
    with _recording(model, calls, max_tokens):
        run()
    if not calls:
        raise ValueError(
            f"{type(model).__name__} went through no self-attention that can be analysed: MHLA modules, but "
            "for causal ones, and attention layers of diffusers"
        )
    layers = [
        _analyze_layer(name, *call, max_matrices=max_matrices)
        for name, call in tqdm(calls.items(), desc="layers", disable=None)
    ]
    return Analysis(layers, settings or {})


def _require_few(name: str, tokens: int, max_tokens: int) -> None:
    if tokens > max_tokens:
        raise ValueError(
            f"{name} has {tokens} tokens, more than max_tokens = {max_tokens}: take smaller latents (height, "
            "width, frames), or raise it (a matrix takes 8 N^2 bytes, its rank O(N^3) time)"
        )


@contextmanager
def _recording(
    model: nn.Module, calls: dict[str, tuple[nn.Module, Tensor, Tensor, dict[str, Any]]], max_tokens: int
) -> Iterator[None]:
    """Note queries and keys ``[B, H, N, d]`` of each layer's first call."""

    def note(name: str, module: nn.Module, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> None:
        _require_few(name, q.shape[2], max_tokens)
        if not (q.isfinite().all() and k.isfinite().all()):
            raise ValueError(
                f"queries or keys of {name} are not finite: the model's inputs or weights are not"
            )
        calls.setdefault(name, (module, q.detach(), k.detach(), kwargs))

    def before_mhla(name: str, module: MHLA, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("key_grid") is None and "grid" in kwargs:  # causal layers have none
            q, k, v = (*args, *(kwargs[name] for name in "qkv"[len(args) :]))
            layout, _, _ = module.fit(tuple(kwargs["grid"]), extra=kwargs.get("extra"))
            q, k = module.normed(q, k, layout, kwargs.get("key_mask"), dtype=v.dtype)
            note(name, module, q, k, kwargs)

    def before_attention(name: str, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        args, kwargs = our_arguments(attn, args, kwargs)
        x = args[0] if args else kwargs["hidden_states"]
        text = args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")
        if x.ndim == 3 and (text is None or is_joint(attn)):
            q, k, grid = [attn.to_q(x)], [attn.to_k(x)], kwargs["grid"]
            found: dict[str, Any] = {"grid": grid}
            if text is not None:
                q, k = [*q, attn.add_q_proj(text)], [*k, attn.add_k_proj(text)]
                mask = joint_mask(kwargs.get("encoder_hidden_states_mask"), x)
                found |= {
                    "extra": (text.shape[1], x.shape[1] - math.prod(grid or (x.shape[1],))),
                    "key_mask": mask,
                }
            # The fourth argument, or by one of two names.
            by_name = kwargs.get("rotary_emb", kwargs.get("image_rotary_emb"))
            if (tables := args[3] if len(args) > 3 else by_name) is not None:
                found["rotary_emb"] = rotary_pairs(tables, attn)
            note(name, attn, join_heads(attn, q, "norm_q"), join_heads(attn, k, "norm_k"), found)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MHLA):
            hook: Callable[..., None] = functools.partial(before_mhla, name)
        elif _is_stock(module):
            hook = functools.partial(before_attention, name)
        else:
            continue
        # Before the layer takes the grid off its arguments.
        handles.append(module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_stock(module: nn.Module) -> bool:
    """Tell layers of diffusers, without those of texts in Kandinsky, which name their parts otherwise."""
    if not isinstance(module, _ATTENTION_LAYERS) or isinstance(module.processor, MHLA):
        return False
    return hasattr(module, "to_q")


def _analyze_layer(
    name: str, module: nn.Module, q: Tensor, k: Tensor, kwargs: dict[str, Any], *, max_matrices: int
) -> LayerAnalysis:
    tokens = q.shape[2]
    rotary_emb, key_mask, extra = (kwargs.get(name) for name in ("rotary_emb", "key_mask", "extra"))
    options: dict[str, Any] = {}
    audit = picture = None
    features = (q, k)
    if isinstance(module, MHLA):
        layout, _, mixing = module.fit(tuple(kwargs["grid"]), extra=extra)
        options = {"feature_map": module.operator_map, "eps": module.config.eps}
        features = module.features(q, k, key_mask)
        kind = "linear" if module.mixing is None else "mhla"
        if module.config.window is not None:
            alone = module.config.window == WINDOW_ONLY and math.prod(layout.blocks) == 1
            kind = "softmax" if alone else "local"
        if module.mixing is not None:
            start = initial_mixing(layout, module.config.mixing_init)
            audit = audit_mixing(mixing, start, extra=layout.extra is not None)
            picture = mixing_map(mixing, layout)
        mixing = module.weighed(mixing, q, k, layout, key_mask=key_mask)
    else:
        kind = "linear" if "Linear" in type(module.processor).__name__ else "softmax"  # Sana's own is linear
        grid = kwargs["grid"] or _square(tokens - sum(extra or ()))
        layout = dataclasses.replace(recommended_layout(grid), extra=extra)
        mixing = locality_mixing(layout)
    # One matrix at a time: samples and heads as a batch of single heads.
    pairs = [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]
    pairs = pairs[:: -(-len(pairs) // max_matrices)]
    found: dict[str, list[MatrixStatistics]] = {}
    for b, h in pairs:
        one_q, one_k, *mapped = (x[b : b + 1, h : h + 1].double() for x in (q, k, *features))
        tables = None if rotary_emb is None else tables_of(rotary_emb, b, h)
        weights = mixing[(b, h)[4 - mixing.ndim :]] if mixing.ndim > 2 else mixing
        options["key_mask"] = None if key_mask is None else key_mask[b : b + 1]
        call = (one_q, one_k, weights.to(q.device), layout, tables, options, (mapped[0], mapped[1]))
        matrices = dict(attention_matrices(*call))
        if kind == "local":
            matrices["local"] = window_matrices(*call, **_window_of(module, h))
        for attention, (acting, plain) in matrices.items():
            if key_mask is not None:  # padding asks nothing, either
                acting, plain = (matrix[key_mask[b]][:, key_mask[b]] for matrix in (acting, plain))
            found.setdefault(attention, []).append(matrix_statistics(acting, plain))
    return LayerAnalysis(
        name, kind, layout.grid, layout.blocks, extra=sum(layout.extra or ()),
        rank_bound=min(tokens, int(layout.block_index().bincount().clamp_max(features[0].shape[-1]).sum())),
        matrices={attention: mean_statistics(statistics) for attention, statistics in found.items()},
        mixing=audit, mixing_map=picture,
    )  # fmt: skip


def _window_of(module: nn.Module, head: int) -> dict[str, Any]:
    """Form of the softmax window of a layer, its weight in a head, and the blocks that it takes in."""
    assert isinstance(module, MHLA)
    weight = None if module.local is None else module.local[head : head + 1].double()
    config = module.config
    return {
        "form": config.window, "weight": weight, "margin": config.margin, "routes": config.routed_blocks,
        "exact": config.exact_routing,
    }  # fmt: skip


def _square(tokens: int) -> tuple[int, ...]:
    """Guess the grid of a layer that is not told it: square where that is possible."""
    side = math.isqrt(tokens)
    return (side, side) if side**2 == tokens else (tokens,)

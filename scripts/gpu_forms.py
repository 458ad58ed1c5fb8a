"""Forms beside the paper's, for scripts/gpu_validate.py: results against float64, and times."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_checks import NAMES, SHAPES, Check, Machine, Shape, gradients, peers, verdict
from torch import Tensor

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.config import WIDE_MAPS, WINDOW_ONLY
from mhla_diffusion.ops import (
    BlockLayout,
    choose_blocks,
    mhla_local_reference,
    mhla_reference,
)
from mhla_diffusion.ops.features import turned

FORMS: dict[str, dict[str, Any]] = {
    "the paper's": {},
    "relative mixing": {"mixing_relative": True},
    "mixing from content": {"mixing_content": True},
    "extra tokens": {"extra_block": True},
    "crelu": {"feature_map": "crelu"},
    "power": {"feature_map": "power"},
    "convolutions and norms of q and k": {"qk_conv": True, "qk_norm": True},
    "hedgehog": {"feature_map": "hedgehog"},
    "window, one denominator": {"local": "shared"},
    "window, gate": {"local": "gate"},
    "window alone": {"local": "only"},
    "window with a margin": {"local": "shared", "local_margin": 1},
    "routed blocks": {"local": "shared", "routed_blocks": 2},
    "all at once": {
        "mixing_per_head": True, "mixing_relative": True, "mixing_content": True, "extra_block": True,
        "feature_map": "hedgehog", "local": "gate", "local_margin": 2, "routed_blocks": 2,
        "exact_routing": True,
    },
}  # fmt: skip
# Tokens before and after those of the grid, for forms that have a block of them.
EXTRA = (1, 76)
# Twice those of the operator in narrow dtypes: features and scores are rounded as well.
LIMIT = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 4e-3}
TIMED = {name: SHAPES[name] for name in ("DiT-XL/2, 2048 px", "Wan2.1-1.3B")}
# Dense in float64, and the kernels of those above: blocks that are not all alike, and a video of such.
SMALL = {"image": Shape(72, 16, (13, 11), (3, 4)), "video": Shape(128, 12, (3, 6, 10), (1, 3, 5), True)}
TINY = {"image": Shape(16, 2, (7, 5), (2, 3)), "video": Shape(16, 2, (2, 4, 6), (1, 2, 3), True)}


def form_checks(at: Machine) -> Iterator[tuple[str, Check]]:
    """Yield checks of the output and of each gradient, of inputs and parameters."""
    for shape_name, shape in (TINY if at.tiny else SMALL).items():
        for form, settings in FORMS.items():
            for dtype in LIMIT:
                check = functools.partial(_compare, at, shape, settings, dtype)
                yield f"{form}, {shape_name}, {dtype}", check


def form_time_checks(at: Machine) -> Iterator[tuple[str, Check]]:
    """Yield measurements at the shapes of two models."""
    for shape_name, shape in (TINY if at.tiny else TIMED).items():
        for form, settings in FORMS.items():
            yield f"{form}, {shape_name}", functools.partial(_times, at, shape, settings)


def _make(
    at: Machine, shape: Shape, settings: dict[str, Any], dtype: str
) -> tuple[MHLA, list[Tensor], dict[str, Any]]:
    """Module with parameters away from their start, q, k and v, and what else it is called with."""
    torch.manual_seed(0)
    module = MHLA(
        MHLAConfig.paper(blocks=shape.blocks, **settings),
        heads=shape.heads,
        head_dim=shape.d,
        grid=shape.grid,
    )
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.rand_like(parameter)
    extra = EXTRA if module.config.extra_block else None
    layout = BlockLayout(shape.grid, shape.blocks, extra)
    tensors = [at.heads_inside(1, layout.num_tokens, shape.heads, shape.d, dtype) for _ in range(3)]
    rotary = at.angles(BlockLayout(shape.grid, shape.blocks).num_tokens, shape.d) if shape.rotary else None
    arguments = {"grid": shape.grid, "extra": extra, "rotary_emb": rotary}
    return module.to(at.device, getattr(torch, dtype)), tensors, arguments


def _compare(at: Machine, shape: Shape, settings: dict[str, Any], dtype: str) -> tuple[str, bool]:
    module, tensors, arguments = _make(at, shape, settings, dtype)
    exact = copy.deepcopy(module).double()
    names = *NAMES[:4], *(f"d{name}" for name, _ in module.named_parameters())
    chosen, alike = _chosen(module, tensors, arguments)
    leaves, exact_leaves = _leaves(tensors), _leaves([x.double() for x in tensors])
    found = gradients(
        functools.partial(module, *leaves, **arguments), [*leaves, *module.parameters()], leaves[0].dtype
    )
    expected = gradients(
        functools.partial(_dense, exact, arguments, chosen, *exact_leaves),
        [*exact_leaves, *exact.parameters()],
        leaves[0].dtype,
    )
    text, good = verdict(found, expected, LIMIT[dtype], names)
    if chosen is not None:
        text += f"; blocks chosen as on a CPU: {alike:.1%}"
    return text, good and alike > 0.99


def _leaves(tensors: list[Tensor]) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]


def _chosen(module: MHLA, tensors: list[Tensor], arguments: dict[str, Any]) -> tuple[Tensor | None, float]:
    """Blocks that queries choose, and which share of them a CPU would choose as well."""
    if not module.config.routed_blocks:
        return None, 1.0
    layout = BlockLayout(arguments["grid"], module.blocks, arguments["extra"])
    q, k = turned(tensors[0], tensors[1], arguments["rotary_emb"], layout)
    count, exact = module.config.routed_blocks, module.config.exact_routing
    here, there = (choose_blocks(x, y, layout, count, exact=exact) for x, y in ((q, k), (q.cpu(), k.cpu())))
    return here, (here.cpu() == there).double().mean().item()


def _dense(
    module: MHLA, arguments: dict[str, Any], chosen: Tensor | None, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """What the module gives, ``[B, N, H d]``, as dense attention."""
    config, rotary, extra = module.config, arguments["rotary_emb"], arguments["extra"]
    layout, _, mixing = module.fit(arguments["grid"], extra=extra, device=q.device)
    q, k = module.normed(q, k, layout)
    mixing = module.weighed(mixing, q, k, layout)
    features, window = module.features(q, k), turned(q, k, rotary, layout)
    if rotary is not None and config.feature_map in WIDE_MAPS:
        rotary = tuple(torch.cat((x, x), -1) for x in rotary)
    options: dict[str, Any] = {"feature_map": module.operator_map, "rotary_emb": rotary, "eps": config.eps}
    if config.window is None:
        out = mhla_reference(*features, v, mixing, layout, **options)
    else:
        # The window alone is an open gate: sigmoid(inf) = 1.
        weight = torch.full_like(q[0, :, 0, 0], torch.inf) if module.local is None else module.local
        form = "gate" if config.window == WINDOW_ONLY else config.window
        out = mhla_local_reference(
            *features, v, mixing, layout, window=window, weight=weight, form=form,
            margin=config.margin, chosen=chosen, **options,
        )  # fmt: skip
    return out.transpose(1, 2).flatten(2)


def _times(at: Machine, shape: Shape, settings: dict[str, Any]) -> tuple[str, bool]:
    """Times of the module, and what other attention takes of them."""
    module, tensors, arguments = _make(at, shape, settings, "bfloat16")
    leaves = [*_leaves(tensors), *module.parameters()]
    ours = _both(at, functools.partial(module, *leaves[:3], **arguments), leaves)
    text = f"forward {ours[0] * 1e6:.0f} us, with its backward {ours[1] * 1e6:.0f} us; slower than it:"
    for name, theirs in _peer_times(at, shape).items():
        ratios = (a / b for a, b in zip(theirs, ours, strict=True))
        text += f" {name} {' and '.join(f'{ratio:.2f} x' for ratio in ratios)},"
    return text.rstrip(","), True


def _both(at: Machine, call: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    """Seconds of a forward, and of a forward with its backward."""
    with torch.no_grad():
        forward = at.seconds(call, 5, graph=True)
        cotangent = torch.randn_like(call())
    return forward, at.seconds(lambda: torch.autograd.grad(call(), leaves, cotangent), 5, graph=True)


@functools.cache
def _peer_times(at: Machine, shape: Shape) -> dict[str, tuple[float, float]]:
    tokens = BlockLayout(shape.grid, shape.blocks).num_tokens
    leaves = _leaves([at.heads_inside(1, tokens, shape.heads, shape.d) for _ in range(3)])
    return {name: _both(at, call, leaves) for name, call in peers(*leaves).items()}

"""What attention does in a trained model: rank and entropy of its matrices, and an audit of the mixing.

For each attention layer, on the queries and keys of one batch, three matrices are compared: softmax
attention, plain linear attention, and MHLA with the layer's mixing matrix. "Global context collapse" is a
linear attention of low rank whose rows are nearly uniform (section 3 of the paper).
"""

from __future__ import annotations

import base64
import functools
import io
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention
from PIL import Image, ImageOps
from torch import Tensor, nn
from tqdm.auto import tqdm

from .attention import MHLA, MHLAConfig
from .backbones import backbone_of_config, convert_to_mhla, stock_names
from .backbones.grid import find_grid, token_grid
from .backbones.processors import rotary_pairs, split_heads
from .files.writing import require_absent, write_file
from .hub import component_subfolder, load_component_config
from .ops import (
    BlockLayout,
    apply_rotary_emb,
    initial_mixing,
    locality_mixing,
    mhla_reference,
    recommended_layout,
)  # fmt: skip
from .optional import require

# Most of diffusers' newer models have a class of their own, with this mixin.
_ATTENTION_LAYERS = (Attention, AttentionModuleMixin)

FILE_NAMES = ("report.json", "report.html")


@dataclass(frozen=True)
class MatrixStatistics:
    """Statistics of an attention matrix ``[N, N]``, means over samples and heads.

    Args:
        rank: numerical rank: singular values above ``N eps sigma_max``, eps of float32.
        entropy: of its rows, in nats; ``log N`` where all tokens weigh the same.
    """

    rank: float
    entropy: float


@dataclass(frozen=True)
class MixingAudit:
    """Statistics of a mixing matrix, over all heads.

    Args:
        minimum, maximum: of its weights.
        negatives: how many are below zero, which checkpoints of the public reference code have.
        row_sum_minimum, row_sum_maximum: 1 at the locality start.
        row_entropy: mean over rows of ``|W|``, in nats; ``log M`` where all blocks weigh the same.
        change: Frobenius norm of the difference from the start, over that of the start.
    """

    minimum: float
    maximum: float
    negatives: int
    row_sum_minimum: float
    row_sum_maximum: float
    row_entropy: float
    change: float


@dataclass(frozen=True)
class LayerAnalysis:
    """Analysis of one attention layer.

    Args:
        name: of the module.
        kind: ``"mhla"``, ``"linear"`` (one block) or ``"softmax"``: what the layer does in the model.
        grid, blocks: of its tokens. For softmax layers the blocks are the recommended ones, with the locality
            start.
        rank_bound: what the rank of MHLA cannot exceed, ``min(N, sum_b min(n_b, d))``.
        matrices: of ``softmax``, ``linear`` and ``mhla`` attention on this layer's queries and keys.
        mixing: of layers that mix.
        mixing_map: PNG of the mixing matrix: one tile for each query block, where it lies on the grid; in it
            the weights of all key blocks, as they lie on the grid (figure 4b). Frames stand side by side.
    """

    name: str
    kind: str
    grid: tuple[int, ...]
    blocks: tuple[int, ...]
    rank_bound: int
    matrices: dict[str, MatrixStatistics]
    mixing: MixingAudit | None = None
    mixing_map: bytes | None = None

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def mixing_map_uri(self) -> str | None:
        """Mixing map as a data URI, for a page."""
        if self.mixing_map is None:
            return None
        return "data:image/png;base64," + base64.b64encode(self.mixing_map).decode()


@dataclass(frozen=True)
class Analysis:
    """Analyses of all attention layers of a model, and what it was called with."""

    layers: list[LayerAnalysis]
    settings: dict[str, Any]

    def mean(self, kind: str) -> MatrixStatistics:
        """Over layers, of the matrices of one kind."""
        return _mean([layer.matrices[kind] for layer in self.layers])

    def to_dict(self) -> dict[str, Any]:
        """Return the content of report.json."""
        layers = [asdict(layer) for layer in self.layers]
        for layer in layers:
            del layer["mixing_map"]
        return {"settings": self.settings, "layers": layers}

    def to_html(self) -> str:
        """Return the content of report.html, which needs no other file and no network.

        Raises:
            ImportError: when jinja2 is not installed.
        """
        environment = require("jinja2").Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        template = environment.from_string(files(__package__).joinpath("analysis.html").read_text("utf-8"))
        return template.render(analysis=self, log=math.log)

    def save(self, out: str | Path, *, overwrite: bool = False) -> None:
        """Write report.json and report.html to the folder ``out``.

        Raises:
            ValueError: when ``out`` holds a report and ``overwrite`` is false.
        """
        require_absent([Path(out) / name for name in FILE_NAMES], overwrite=overwrite)
        for name, content in zip(
            FILE_NAMES, (json.dumps(self.to_dict(), indent=2), self.to_html()), strict=True
        ):
            write_file(Path(out) / name, content)


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
) -> Analysis:
    """Analyse a stored model on noise and drawn conditions; see :func:`analyze`.

    Args:
        model: folder or hub id of a transformer that has an MHLA form, stock or ours, or of its pipeline.
        height, width, frames: of the latents; those that the model was made for by default.
        timestep: 0 to 999.
        batch_size: samples.
        seed: of the noise and conditions.

    Raises:
        ValueError: for another model, or a size that its patches do not divide.
    """
    transformer = _load(model)
    patch = transformer.latents_per_token
    own = [tokens * size for tokens, size in zip(transformer.default_grid, patch, strict=True)]
    if frames is not None and len(own) == 2:
        raise ValueError(f"{model} is a model of images and has no frames, got frames={frames}; leave it out")
    asked = (frames, height, width if width is not None or height is None else height)
    latents = [given or size for given, size in zip(asked[-len(own) :], own, strict=True)]
    generator = torch.Generator().manual_seed(seed)
    inputs = transformer.example_inputs(
        token_grid(latents, patch), batch_size=batch_size, generator=generator
    )
    inputs["timestep"] = torch.full((batch_size,), timestep)
    return analyze(
        transformer,
        lambda: transformer(**inputs),
        settings={
            "model": model,
            "latents": f"{batch_size} x {' x '.join(map(str, latents))}, noise",
            "timestep": timestep,
            "seed": seed,
        },
    )


def _load(model: str) -> Any:
    """Load our form of a stored transformer, which runs any grid."""
    subfolder = component_subfolder(model, "transformer")
    stored = load_component_config(model, "transformer")
    ours = backbone_of_config(stored)
    if ours is None:
        name = stored.get("_class_name", "config of no class")
        raise ValueError(f"{model} holds a {name}, which cannot be analysed; those that can: {stock_names()}")
    if stored["_class_name"] == ours.__name__:
        return ours.from_pretrained(model, subfolder=subfolder).eval()
    stock = ours.stock.from_pretrained(model, subfolder=subfolder).eval()
    return convert_to_mhla(stock, MHLAConfig(layers=()))


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

    Layers are MHLA modules, and attention layers of diffusers with any other processor.

    Args:
        model: any model with such layers.
        run: calls the model on a batch.
        max_tokens: more tokens than this are refused: the matrices of a layer take 8 N^2 bytes each.
        max_matrices: samples and heads to look at in each layer, spread evenly.
        settings: what the report should say of the call.

    Raises:
        ValueError: for a model without such layers, or too many tokens.
    """
    calls: dict[str, tuple[nn.Module, Tensor, Tensor, dict[str, Any]]] = {}
    with _recording(model, calls, max_tokens):
        run()
    if not calls:
        raise ValueError(
            f"{type(model).__name__} went through no self-attention that can be analysed: MHLA modules, and "
            "attention layers of diffusers"
        )
    layers = [
        _analyze_layer(name, *call, max_matrices=max_matrices)
        for name, call in tqdm(calls.items(), desc="layers", disable=None)
    ]
    return Analysis(layers, settings or {})


@contextmanager
def _recording(
    model: nn.Module, calls: dict[str, tuple[nn.Module, Tensor, Tensor, dict[str, Any]]], max_tokens: int
) -> Iterator[None]:
    """Note queries and keys ``[B, H, N, d]`` of each layer's first call."""

    def note(name: str, module: nn.Module, q: Tensor, k: Tensor, kwargs: dict[str, Any]) -> None:
        if q.shape[2] > max_tokens:
            raise ValueError(
                f"{name} has {q.shape[2]} tokens, more than max_tokens = {max_tokens}: take a smaller image "
                "or video, or raise it (a matrix takes 8 N^2 bytes, its rank O(N^3) time)"
            )
        calls.setdefault(name, (module, q.detach(), k.detach(), kwargs))

    def before_mhla(name: str, module: MHLA, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if kwargs.get("key_grid") is None:
            q, k = args[:2]
            if module.norm_q is not None and module.norm_k is not None:
                q, k = module.norm_q(q), module.norm_k(k)
            note(name, module, q, k, kwargs)

    def before_attention(name: str, attn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        if x.ndim == 3 and (args[1] if len(args) > 1 else kwargs.get("encoder_hidden_states")) is None:
            q, k = (
                split_heads(project(x), norm, attn.heads)
                for project, norm in ((attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k))
            )
            tables = [value for value in (*args, *kwargs.values()) if isinstance(value, tuple)][:1]
            found: dict[str, Any] = {"grid": find_grid(args, kwargs)}
            if tables and isinstance(tables[0][0], Tensor):
                found["rotary_emb"] = rotary_pairs(tables[0][:2], attn)
            note(name, attn, q, k, found)

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, MHLA):
            hook: Callable[..., None] = functools.partial(before_mhla, name)
        elif isinstance(module, _ATTENTION_LAYERS) and not isinstance(module.processor, MHLA):
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


def _analyze_layer(
    name: str, module: nn.Module, q: Tensor, k: Tensor, kwargs: dict[str, Any], *, max_matrices: int
) -> LayerAnalysis:
    tokens, d = q.shape[2:]
    rotary_emb = kwargs.get("rotary_emb")
    options: dict[str, Any] = {}
    audit = picture = None
    if isinstance(module, MHLA):
        layout, _, mixing = module.fit(tuple(kwargs["grid"]))
        options = {"feature_map": module.config.feature_map, "eps": module.config.eps}
        kind = "linear" if module.mixing is None else "mhla"
        if module.mixing is not None:
            audit = audit_mixing(mixing, initial_mixing(layout, module.config.mixing_init))
            picture = mixing_map(mixing, layout)
    else:
        kind = "linear" if "Linear" in type(module.processor).__name__ else "softmax"  # Sana's own is linear
        layout = recommended_layout(kwargs["grid"] or _square(tokens))
        mixing = locality_mixing(layout)
    # One matrix at a time: samples and heads as a batch of single heads.
    pairs = [(b, h) for b in range(q.shape[0]) for h in range(q.shape[1])]
    pairs = pairs[:: -(-len(pairs) // max_matrices)]
    found: dict[str, list[MatrixStatistics]] = {"softmax": [], "linear": [], "mhla": []}
    for b, h in pairs:
        one_q, one_k = (x[b : b + 1, h : h + 1].double() for x in (q, k))
        tables = None if rotary_emb is None else _tables_of(rotary_emb, b, h)
        weights = mixing[h] if mixing.ndim == 3 else mixing
        for attention, matrices in _matrices(one_q, one_k, weights.to(q.device), layout, tables, options):
            found[attention].append(_statistics(*matrices))
    return LayerAnalysis(
        name, kind, layout.grid, layout.blocks,
        rank_bound=min(tokens, int(layout.block_index().bincount().clamp_max(d).sum())),
        matrices={attention: _mean(statistics) for attention, statistics in found.items()},
        mixing=audit, mixing_map=picture,
    )  # fmt: skip


def _matrices(
    q: Tensor, k: Tensor, mixing: Tensor, layout: BlockLayout, rotary_emb: Any, options: dict[str, Any]
) -> Iterator[tuple[str, tuple[Tensor, Tensor]]]:
    """For each attention the matrix that acts on values, and the positive one whose rows sum to 1."""
    turned = [q, k] if rotary_emb is None else [apply_rotary_emb(x, rotary_emb) for x in (q, k)]
    softmax = (turned[0] @ turned[1].mT / math.sqrt(q.shape[-1])).softmax(-1)[0, 0]
    yield "softmax", (softmax, softmax)
    # The operator on values that are a unit matrix is its matrix.
    unit = torch.eye(q.shape[2], dtype=torch.float64, device=q.device)[None, None]
    whole = BlockLayout(layout.grid, (1,) * len(layout.grid))
    for name, weights, blocks in (("linear", mixing.new_ones(1, 1), whole), ("mhla", mixing, layout)):
        plain = mhla_reference(q, k, unit, weights, blocks, **options)[0, 0]
        if rotary_emb is None:
            yield name, (plain, plain)
        else:
            acting = mhla_reference(q, k, unit, weights, blocks, rotary_emb=rotary_emb, **options)[0, 0]
            yield name, (acting, plain)


def _statistics(acting: Tensor, weights: Tensor) -> MatrixStatistics:
    rtol = len(acting) * torch.finfo(torch.float32).eps
    rank = float(torch.linalg.matrix_rank(acting, rtol=rtol))
    return MatrixStatistics(rank, _entropy(weights))


def _entropy(weights: Tensor) -> float:
    """Mean over rows of ``- sum p log p``, p being the row over its sum; of weights below zero their size."""
    p = weights.abs()
    p = p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)
    return float(torch.special.entr(p).sum(-1).mean())


def _mean(statistics: list[MatrixStatistics]) -> MatrixStatistics:
    count = len(statistics)
    return MatrixStatistics(
        sum(s.rank for s in statistics) / count, sum(s.entropy for s in statistics) / count
    )


def _tables_of(rotary_emb: tuple[Tensor, Tensor], batch: int, head: int) -> tuple[Tensor, Tensor]:
    """Tables of one sample and head, ``[N, d / 2]``."""
    cos, sin = (table.double().expand(*(1,) * max(0, 4 - table.ndim), *table.shape) for table in rotary_emb)
    return tuple(t[min(batch, len(t) - 1), min(head, t.shape[1] - 1)] for t in (cos, sin))  # type: ignore[return-value]


def _square(tokens: int) -> tuple[int, ...]:
    """Guess the grid of a layer that is not told it: square where that is possible."""
    side = math.isqrt(tokens)
    return (side, side) if side**2 == tokens else (tokens,)


def audit_mixing(mixing: Tensor, start: Tensor) -> MixingAudit:
    """See :class:`MixingAudit`; mixing ``[M, M]`` or ``[H, M, M]``, start ``[M, M]``."""
    mixing, start = mixing.detach().double().cpu(), start.double()
    sums = mixing.sum(-1)
    return MixingAudit(
        minimum=float(mixing.min()), maximum=float(mixing.max()), negatives=int((mixing < 0).sum()),
        row_sum_minimum=float(sums.min()), row_sum_maximum=float(sums.max()), row_entropy=_entropy(mixing),
        change=float((mixing - start).norm() / start.expand_as(mixing).norm()),
    )  # fmt: skip


def mixing_map(mixing: Tensor, layout: BlockLayout, *, gap: int = 1, side: int = 480) -> bytes:
    """Draw a PNG of a mixing matrix as in figure 4b of the paper; see :class:`LayerAnalysis`.

    Args:
        mixing: ``[M, M]``, or ``[H, M, M]``, of which the mean is drawn.
        layout: the blocks.
        gap: pixels between tiles, before scaling.
        side: of the longer side of the picture, in pixels, about.
    """
    weights = mixing.detach().float().cpu()
    weights = weights.mean(0) if weights.ndim == 3 else weights
    # Frames go beside each other: (F, H, W) is drawn as H x (F W).
    frames, height, width = ((1,) * 3 + layout.blocks)[-3:]
    tiles = weights.view(frames, height, width, frames, height, width).permute(1, 0, 2, 4, 3, 5)
    tiles = tiles.reshape(height, frames * width, height, frames * width)
    low, high = min(0.0, float(tiles.min())), float(tiles.max())
    shades = ((tiles - low) / max(high - low, 1e-12) * 255).round().byte()
    rows, columns = height * (height + gap) - gap, frames * width * (frames * width + gap) - gap
    canvas = Image.new("RGB", (columns, rows), (128, 128, 128))
    for i in range(height):
        for j in range(frames * width):
            tile = Image.fromarray(shades[i, j].numpy()).convert("RGB")
            canvas.paste(_coloured(tile), (j * (frames * width + gap), i * (height + gap)))
    scale = max(1, side // max(canvas.size))
    canvas = canvas.resize((scale * columns, scale * rows), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    canvas.save(buffer, "png")
    return buffer.getvalue()


def _coloured(tile: Image.Image) -> Image.Image:
    """Grey levels from dark blue over green to yellow."""
    return ImageOps.colorize(tile.convert("L"), black="#1d1147", mid="#2a9d8f", white="#fde725")

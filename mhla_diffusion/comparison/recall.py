"""Grid recall: which attention finds the cell that carries a key, and how far away."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..attention import MHLA
from ..config import MHLAConfig
from ..ops import BlockLayout
from .task import Measure, Task
from .variant import Variant

DISTANCES = ("near", "far", "anywhere")

# Batches that accuracy is taken over, 32 questions times 32 samples each by default; none was trained on.
_TEST_BATCHES = 16
_TEST_SEED = 2**31 - 1


@dataclass(frozen=True)
class Recall(Task, kind="recall"):
    """Associative recall on a grid.

    Each cell carries a key, a random direction, and one of ``values`` values. ``queries`` cells show the key
    of another cell and no value: the answer is the value of that cell. Chance is right in 1 of ``values``.

    Args:
        side: the grid is ``side x side``.
        distance: where the other cell lies: ``near`` (in the query's block), ``far`` (in another block) or
            ``anywhere``.
        head_dim: d; N / d says how many associations a summary has to hold for each of its columns.
        blocks: along each axis, of the task and of MHLA.
        heads, layers, key_dim, values, queries: of model and task.
        steps, batch_size, learning_rate: of training, AdamW with a cosine schedule.
        start_side: side of the grid that training begins on, ``side`` if None. It doubles up to that, for
            equal shares of the steps, with as many cells in a batch and the same part of them that asks: what
            has not learnt to look for a key among hundreds does not find one among thousands.
    """

    metrics: ClassVar = (Measure("accuracy", "Share of answers that are right", lower_is_better=False),)

    side: int = 16
    distance: str = "anywhere"
    head_dim: int = 32
    blocks: int = 4
    heads: int = 2
    layers: int = 2
    key_dim: int = 16
    values: int = 16
    queries: int = 32
    steps: int = 1500
    batch_size: int = 32
    learning_rate: float = 2e-3
    start_side: int | None = None

    def __post_init__(self) -> None:
        for name, value in self.record.items():
            if name != "distance" and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if self.distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}, got {self.distance!r}")
        if self.blocks < 2 or self.side % self.blocks:
            raise ValueError(
                f"blocks must be 2 or more and divide side, got {self.blocks} blocks on a side of {self.side}"
            )
        if self.queries > self.side**2 // 2:
            raise ValueError(
                f"queries may be half of the {self.side**2} cells, as the others answer, got {self.queries}"
            )
        if self.start_side is None:
            return
        halves = self._halves
        if self.start_side not in halves:
            raise ValueError(
                f"start_side must be one of {', '.join(map(str, halves))}: {self.side} halved, with "
                f"{self.blocks} blocks and a query, got {self.start_side}"
            )
        sides = halves.index(self.start_side) + 1
        if self.steps < sides:
            raise ValueError(f"steps must be {sides} or more, one for each side, got {self.steps}")

    @property
    def record(self) -> dict[str, Any]:
        # Without its kind and what is not set, as results of before there were others have it.
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}

    @property
    def stages(self) -> list[Recall]:
        """Tasks of training one after another, each on a grid of its own side."""
        if self.start_side is None:
            return [self]
        sides = [side for side in reversed(self._halves) if side >= self.start_side]
        ends = [self.steps * at // len(sides) for at in range(len(sides) + 1)]
        return [
            dataclasses.replace(
                self, side=side, start_side=None, steps=end - begin,
                batch_size=self.batch_size * self.side**2 // side**2,
                queries=self.queries * side**2 // self.side**2,
            )
            for side, (begin, end) in zip(sides, itertools.pairwise(ends), strict=True)
        ]  # fmt: skip

    @property
    def _halves(self) -> list[int]:
        """Sides that double up to this one, with blocks and a query, the largest first."""
        halves = [self.side]
        while halves[-1] % (2 * self.blocks) == 0 and self.queries * (halves[-1] // 2) ** 2 >= self.side**2:
            halves.append(halves[-1] // 2)
        return halves

    @property
    def default_blocks(self) -> list[int]:
        return [self.blocks, self.blocks]

    @property
    def tokens(self) -> int:
        return self.side**2

    @property
    def about(self) -> str:
        return f"Chance is 1 in the number of values, {self.values}."

    def check(self, variant: Variant, config: MHLAConfig | None) -> None:
        if variant.training:
            raise ValueError(f"{variant.name}: training is of tasks with a training run, not of recall")
        if config is not None:
            config.layout((self.side, self.side))

    def train(self, variant: Variant, seed: int, folder: Path, device: str) -> dict[str, Any]:
        return train_recall(self, variant, seed, device)


def recall_batch(task: Recall, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw cells, places of queries and answers.

    Returns:
        ``[B, N, key_dim + values + 1]``: key, value (none in queries), and whether the cell is a query; the
        numbers of the query cells ``[B, Q]``; the values that are right, ``[B, Q]``.
    """
    device, (batch, cells) = generator.device, (task.batch_size, task.side**2)
    draw: dict[str, Any] = {"generator": generator, "device": device}
    keys = F.normalize(torch.randn(batch, cells, task.key_dim, **draw), dim=-1)
    values = torch.randint(task.values, (batch, cells), **draw)
    queries = torch.rand(batch, cells, **draw).topk(task.queries, -1).indices
    is_query = torch.zeros(batch, cells, dtype=torch.bool, device=device).scatter_(1, queries, True)
    block = BlockLayout((task.side, task.side), (task.blocks, task.blocks)).block_index(device)
    same = block[queries][..., None] == block  # [B, Q, N]
    allowed = {"near": same, "far": ~same, "anywhere": torch.ones_like(same)}[task.distance]
    chances = torch.rand(batch, task.queries, cells, **draw)
    # A block may hold queries alone: then the answer lies elsewhere, in one of a very great many.
    targets = (chances + 1.0 * allowed - 2.0 * is_query[:, None]).argmax(-1)
    found = keys.gather(1, targets[..., None].expand(-1, -1, task.key_dim))
    keys = keys.scatter(1, queries[..., None].expand(-1, -1, task.key_dim), found)
    shown = F.one_hot(values, task.values) * ~is_query[..., None]
    scale = math.sqrt(task.key_dim)
    inputs = torch.cat((keys * scale, shown.to(keys.dtype), is_query[..., None].to(keys.dtype)), -1)
    return inputs, queries, values.gather(1, targets)


class RecallModel(nn.Module):
    """Transformer on the cells of a grid, with any attention.

    Args:
        task: sizes of the model and of the grid.
        attention: settings of the layers, None for softmax.
    """

    def __init__(self, task: Recall, attention: MHLAConfig | None) -> None:
        super().__init__()
        width = task.heads * task.head_dim
        self.embed = nn.Linear(task.key_dim + task.values + 1, width)
        self.layers = nn.ModuleList(_Layer(task, attention) for _ in range(task.layers))
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, task.values)

    def forward(self, inputs: Tensor, queries: Tensor) -> Tensor:
        """Return logits of the values ``[B, Q, values]``."""
        x = self.embed(inputs)
        for layer in self.layers:
            x = layer(x)
        x = x.gather(1, queries[..., None].expand(-1, -1, x.shape[-1]))
        return self.head(self.norm(x))


class _Layer(nn.Module):
    def __init__(self, task: Recall, attention: MHLAConfig | None) -> None:
        super().__init__()
        width = task.heads * task.head_dim
        self.heads = task.heads
        self.norm_attention, self.norm_mlp = nn.RMSNorm(width), nn.RMSNorm(width)
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mhla = (
            None
            if attention is None
            else MHLA(attention, heads=task.heads, head_dim=task.head_dim, grid=(task.side, task.side))
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm_attention(x)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.to_qkv(normed).chunk(3, -1)
        )
        if self.mhla is None:
            out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        else:
            side = math.isqrt(x.shape[1])
            out = self.mhla(q, k, v, grid=(side, side), hidden_states=normed)
        x = x + self.to_out(out)
        return x + self.mlp(self.norm_mlp(x))


def train_recall(task: Recall, variant: Variant, seed: int, device: str = "cpu") -> dict[str, Any]:
    """Train one model and ask it.

    All variants see the same cells in the same order for a seed.

    Returns:
        ``accuracy``, from 0 to 1, on cells that were not trained on; ``loss`` of the last tenth of the steps
        in nats; ``seconds_per_step`` on the grid of the task; ``parameters``.

    Raises:
        ValueError: when the loss is not finite.
    """
    model = _common_start(task, variant.config(task.default_blocks), seed).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), task.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    # A tenth of few steps is no warm-up; of ten it is one, which OneCycleLR divides by that less one.
    warmup = 0.1 if task.steps > 10 else 0.0
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, task.learning_rate, task.steps, pct_start=warmup
    )
    generator = torch.Generator(device).manual_seed(seed)
    losses = []
    for stage in task.stages:
        start = time.perf_counter()
        for _ in range(stage.steps):
            inputs, queries, answers = recall_batch(stage, generator)
            loss = F.cross_entropy(model(inputs, queries).flatten(0, 1), answers.flatten())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        losses[-1].item()  # a GPU has done all steps then
        seconds = (time.perf_counter() - start) / stage.steps
    final = torch.stack(losses[-max(1, task.steps // 10) :]).mean().item()
    if not math.isfinite(final):
        raise ValueError(f"the loss became {final}; lower learning_rate")
    return {
        "accuracy": _accuracy(model.eval(), task, device),
        "loss": final,
        "seconds_per_step": seconds,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _common_start(task: Recall, attention: MHLAConfig | None, seed: int) -> RecallModel:
    """Make a model, its weights those of softmax where that has them, whatever else is drawn."""
    torch.manual_seed(seed)
    reference = RecallModel(task, None)
    torch.manual_seed(seed)
    model = RecallModel(task, attention)
    model.load_state_dict(reference.state_dict(), strict=False)
    return model


@torch.no_grad()
def _accuracy(model: nn.Module, task: Recall, device: str) -> float:
    generator = torch.Generator(device).manual_seed(_TEST_SEED)
    right: list[Tensor] = []
    for _ in range(_TEST_BATCHES):
        inputs, queries, answers = recall_batch(task, generator)
        right.append((model(inputs, queries).argmax(-1) == answers).float().mean())
    return torch.stack(right).mean().item()

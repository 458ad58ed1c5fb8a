"""Language: a small Llama on the bytes of Python's standard library, and how fast it generates."""

from __future__ import annotations

import math
import statistics
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from .task import Measure
from .trained import TrainedByTransformers
from .variant import Variant

# Each tenth file is held out; of those as many windows are read.
_EVERY, _TEST_WINDOWS = 10, 200
_DECODED, _PIECE = 32, 1024


def _speed(key: str, title: str) -> Measure:
    return Measure(key, title, lower_is_better=False, digits=0, paired=False)


@dataclass(frozen=True, kw_only=True)
class Language(TrainedByTransformers, kind="language"):
    """Prediction of the next byte in the source of Python's standard library (PSF license, in every Python).

    Args:
        context: bytes of a window.
        block_size: bytes in a block of MHLA.
        short, long: tokens that are remembered while the time of the next ones is taken.
    """

    metrics: ClassVar = (
        Measure("perplexity", "Perplexity of a held-out byte", lower_is_better=True),
        _speed("tokens_per_second_short", "Tokens a second behind few others"),
        _speed("tokens_per_second_long", "Tokens a second behind many others"),
    )

    context: int = 512
    block_size: int = 32
    short: int = 1024
    long: int = 16384
    steps: int = 400
    batch_size: int = 8

    @property
    def default_blocks(self) -> int:
        return self.context // self.block_size

    @property
    def tokens(self) -> int:
        return self.context

    @property
    def about(self) -> str:
        return (
            f"A Llama on the bytes of Python's standard library, {self.steps:,} steps of {self.batch_size} "
            f"windows of {self.context}; each tenth file is held out. Tokens a second are of one sequence, "
            f"behind {self.short:,} and {self.long:,} others, by the median time of {_DECODED}."
        )

    def stock(self) -> Any:
        """Make the model with softmax."""
        from transformers import LlamaConfig, LlamaForCausalLM

        width = self.heads * self.head_dim
        config = LlamaConfig(
            vocab_size=256, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=self.layers,
            num_attention_heads=self.heads, max_position_embeddings=self.context, use_cache=False,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        config.block_size = self.block_size
        return LlamaForCausalLM(config)

    def windows(self, *, held_out: bool) -> list[dict[str, Tensor]]:
        """Return windows of the text, in the order of the files' names.

        Raises:
            ValueError: for a Python that has no sources.
        """
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        kept = [path for i, path in enumerate(paths) if (i % _EVERY == 0) == held_out]
        text = b"\0".join(path.read_bytes() for path in kept)
        windows = torch.frombuffer(bytearray(text), dtype=torch.uint8).long().split(self.context)[:-1]
        if not windows:
            raise ValueError(f"{sysconfig.get_paths()['stdlib']} holds too little of Python's sources")
        return [
            {"input_ids": window, "labels": window}
            for window in windows[: _TEST_WINDOWS if held_out else None]
        ]

    def prepare(self, out: Path) -> None:
        self.windows(held_out=True)

    def train(self, variant: Variant, seed: int, folder: Path, device: str) -> dict[str, Any]:
        """Train one model, read the held-out windows and time decoding."""
        trainer, results = self.fit(variant, seed, folder, device, self.windows(held_out=False))
        found = trainer.evaluate(self.windows(held_out=True))
        return {
            "perplexity": math.exp(found["eval_loss"]),
            "tokens_per_second_short": tokens_per_second(trainer.model, self.short),
            "tokens_per_second_long": tokens_per_second(trainer.model, self.long),
            **results,
        }


@torch.no_grad()
def tokens_per_second(model: Any, length: int) -> float:
    """Return how many tokens a second one sequence is continued by, behind ``length`` others.

    The median of a token's time, so that what else the machine does for a moment does not count.
    """
    from transformers import DynamicCache

    model.eval()
    cache = DynamicCache(config=model.config)
    for piece in torch.randint(model.config.vocab_size, (1, length), device=model.device).split(_PIECE, 1):
        token = model(piece, cache=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)
    seconds = []
    for _ in range(_DECODED):
        start = time.perf_counter()
        token = model(token, cache=cache, use_cache=True).logits.argmax(-1)
        token.tolist()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 1 / statistics.median(seconds)

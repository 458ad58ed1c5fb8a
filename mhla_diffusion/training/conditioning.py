"""Conditioning: what a model is told of a sample, and what it is told instead for guidance.

With a probability of ``dropout``, drawn from the sample's own generator, a sample is trained without its
condition (Ho and Salimans 2022, classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from .text import embed_caption


class Conditioning(Protocol):
    """Way from the columns of a batch to arguments of the model."""

    def arguments(self, batch: Mapping[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        """Return the model's keyword arguments, each with B rows.

        Args:
            batch: on the device, its ``"samples"`` taken out.
            generators: one per sample, for what is dropped.
        """
        ...

    def unconditional(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return arguments of the model without their conditions."""
        ...

    def facts(self, data: str) -> dict[str, Any]:
        """Return what a model card says of the conditioning, and under ``data`` of the data."""
        ...

    def to(self, device: torch.device) -> None:
        """Move what is needed in training to a device."""
        ...


@dataclass
class ClassLabels:
    """Classes by number, from the column ``class_labels``; dropped ones become the null class.

    Args:
        names: of the classes.
        null_label: the number that stands for none.
        dropout: probability in [0, 1).
    """

    names: list[str]
    null_label: int
    dropout: float

    def arguments(self, batch: Mapping[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        labels = batch["class_labels"]
        dropped = _draw(generators, self.dropout).to(labels.device)
        return {"class_labels": labels.masked_fill(dropped, self.null_label)}

    def unconditional(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"class_labels": torch.full_like(arguments["class_labels"], self.null_label)}

    def facts(self, data: str) -> dict[str, Any]:
        return {"data": f"{data} of {len(self.names)} classes", "class dropout": self.dropout}

    def to(self, device: torch.device) -> None:
        pass


class Captions:
    """Texts, from the column ``caption``, or embedded ones ``[B, L, text_dim]`` from the column ``text``.

    Dropped ones become the empty text.

    Args:
        parts: a pipeline that encodes prompts; it needs no transformer.
        dropout: probability in [0, 1).
        embedded: whether the column is ``text``; then the encoder stays where it is, as a large one takes the
            room of the model.
    """

    def __init__(self, parts: Any, dropout: float, *, embedded: bool = False) -> None:
        self.parts, self.dropout, self.embedded = parts, dropout, embedded
        # Of one caption at a time, so that an embedding does not depend on what is beside it in a batch.
        self._embed = lru_cache(maxsize=4096)(partial(embed_caption, parts))

    def arguments(self, batch: Mapping[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
        device = self.parts.text_encoder.device
        texts = (
            batch["text"].split(1)
            if self.embedded
            else [self._embed(caption, device) for caption in batch["caption"]]
        )
        dropped = _draw(generators, self.dropout).tolist()
        embeddings = [
            self._embed("", device).to(text.device) if drop else text
            for drop, text in zip(dropped, texts, strict=True)
        ]
        return {"encoder_hidden_states": torch.cat(embeddings)}

    def unconditional(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        text = arguments["encoder_hidden_states"]
        empty = self._embed("", self.parts.text_encoder.device).to(text.device)
        return {"encoder_hidden_states": empty.expand_as(text)}

    def facts(self, data: str) -> dict[str, Any]:
        return {"data": data, "caption dropout": self.dropout}

    def to(self, device: torch.device) -> None:
        if not self.embedded:
            self.parts.text_encoder.to(device)


def require_probability(name: str, value: float) -> None:
    """Check a dropout.

    Raises:
        ValueError: when it is not in [0, 1).
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name} must be in [0, 1), got {value}")


def _draw(generators: Sequence[torch.Generator], probability: float) -> Tensor:
    """Draw what is dropped, bool ``[B]`` on the CPU."""
    return torch.stack([torch.rand((), generator=generator) for generator in generators]) < probability

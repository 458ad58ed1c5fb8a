"""Conditioning: what a model is told of a sample, and what it is told instead for guidance.

With a probability of ``dropout``, drawn from the sample's own generator, a sample is trained without its
condition (Ho and Salimans 2022, classifier-free guidance).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .objectives.objective import BESIDE
from .text import CaptionEncoder, EmbeddedText


class Conditioning(Protocol):
    """Way from the columns of a batch to arguments of the model."""

    def arguments(self, batch: Mapping[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Any]:
        """Return the model's keyword arguments, each with B rows.

        Args:
            batch: on the device.
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
    """Texts, from the column ``caption``, or embedded ones from the columns ``text`` and ``tokens``.

    Those of a second text encoder are in ``text_2`` and ``tokens_2``, and so are the model's arguments. A
    text is dropped for all encoders, or for none.

    What is known of a clip, in the columns ``condition``, ``image_embeds`` and ``control``, is never dropped.

    Dropped ones become the empty text. The embeddings are ``[B, L, D]``.

    Args:
        encoders: embed captions, one after the other.
        dropout: probability in [0, 1).
        embedded: whether the column is ``text``; then the encoders stay where they are, as large ones take
            the room of the model.
        masked: tell the model which tokens are the text's; otherwise it sees the zeros after them.
        sizes: what else the model is told of samples, such as their size or rate, by the number of rows, the
            samples' height and width and their device.
    """

    def __init__(
        self,
        encoders: Sequence[CaptionEncoder],
        dropout: float,
        *,
        embedded: bool = False,
        masked: bool = False,
        sizes: Callable[[int, int, int, torch.device], dict[str, Any]] | None = None,
    ) -> None:
        self.encoders, self.dropout, self.embedded = list(encoders), dropout, embedded
        self.masked, self.sizes = masked, sizes

    def arguments(self, batch: Mapping[str, Any], generators: Sequence[torch.Generator]) -> dict[str, Any]:
        dropped = _draw(generators, self.dropout).tolist()
        arguments: dict[str, Any] = {}
        for encoder in self.encoders:
            texts = self._texts(encoder, batch)
            arguments |= self._conditions(
                encoder,
                [
                    encoder.empty_for(text) if drop else text
                    for drop, text in zip(dropped, texts, strict=True)
                ],
            )
        if "condition" in batch:  # of image-to-video models
            arguments[BESIDE] = batch["condition"]
        if "image_embeds" in batch:
            arguments["encoder_hidden_states_image"] = batch["image_embeds"].flatten(0, 1)
        if "control" in batch:  # of Wan VACE
            arguments["control_hidden_states"] = batch["control"]
        if self.sizes is not None:
            samples = batch["samples"]
            height, width = samples.shape[-2:]
            arguments |= self.sizes(len(samples), height, width, samples.device)
        return arguments

    def unconditional(self, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = dict(arguments)
        for encoder in self.encoders:
            values = arguments[f"encoder_hidden_states{encoder.suffix}"]
            mask = arguments.get(f"encoder_attention_mask{encoder.suffix}")
            tokens = [values.shape[1]] * len(values) if mask is None else mask.sum(1).tolist()
            texts = [EmbeddedText(*text) for text in zip(values, tokens, strict=True)]
            found |= self._conditions(encoder, [encoder.empty_for(text) for text in texts])
        return found

    def _texts(self, encoder: CaptionEncoder, batch: Mapping[str, Any]) -> list[EmbeddedText]:
        """Texts of a batch as an encoder embeds them, or has."""
        if not self.embedded:
            return [encoder(caption) for caption in batch["caption"]]
        columns = batch[f"text{encoder.suffix}"], batch[f"tokens{encoder.suffix}"].tolist()
        return [EmbeddedText(text, tokens) for text, tokens in zip(*columns, strict=True)]

    def _conditions(self, encoder: CaptionEncoder, texts: Sequence[EmbeddedText]) -> dict[str, Tensor]:
        """Arguments of the model for texts of one encoder."""
        embeddings, mask = encoder.fill_up(texts)
        masks = {f"encoder_attention_mask{encoder.suffix}": mask} if self.masked else {}
        return {f"encoder_hidden_states{encoder.suffix}": embeddings, **masks}

    def facts(self, data: str) -> dict[str, Any]:
        return {"data": data, "caption dropout": self.dropout}

    def to(self, device: torch.device) -> None:
        for encoder in self.encoders:
            if not self.embedded:
                encoder.to(device)


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

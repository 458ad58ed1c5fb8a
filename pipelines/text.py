"""Prompts as a text encoder is given them, and those that it is not shown to their end."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SanaPipeline
from torch import Tensor

logger = logging.getLogger(__name__)

# What SanaPipeline puts in front of every prompt, but not of negative ones.
SANA_INSTRUCTION = "\n".join(
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


@torch.no_grad()
def encode_texts(
    tokenizer: Any,
    text_encoder: Any,
    texts: Sequence[str],
    *,
    max_length: int,
    instruction: str = "",
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed texts as the pipelines of PixArt and Sana do: in small letters, filled up to one length.

    Args:
        tokenizer, text_encoder: of transformers; the embeddings are the last hidden states.
        texts: to be embedded; longer ones are cut.
        max_length: tokens of each.
        instruction: put in front of the texts; the encoder reads it, and its embeddings are left out but for
            the first, as in Sana (Xie et al. 2024, arXiv 2410.10629).
        device: of the results; the encoder's own by default.

    Returns:
        Embeddings ``[B, max_length, D]`` and mask ``[B, max_length]``, 1 for the tokens of the texts.
    """
    device = text_encoder.device if device is None else device
    # Sana counts two tokens of the instruction, its begin and its end, with the texts.
    longest = max_length + len(tokenizer.encode(instruction)) - 2 if instruction else max_length
    tokens = tokenizer(
        [instruction + text.lower().strip() for text in texts],
        padding="max_length", padding_side="right", max_length=longest, truncation=True, return_tensors="pt",
    ).to(device)  # fmt: skip
    embeddings = text_encoder(tokens.input_ids, attention_mask=tokens.attention_mask)[0]
    shown = [0, *range(longest - max_length + 1, longest)]
    return embeddings[:, shown], tokens.attention_mask[:, shown]


def long_prompts(prompts: Sequence[str], tokenizer: Any, max_length: int) -> list[str]:
    """List the distinct prompts of more tokens, which the text encoder is not shown to their end."""
    distinct = list(dict.fromkeys(prompts))
    parts = (distinct[start : start + 10_000] for start in range(0, len(distinct), 10_000))
    return [
        prompt
        for part in parts
        for prompt, ids in zip(part, tokenizer(part, verbose=False)["input_ids"], strict=True)
        if len(ids) > max_length
    ]


def warn_of_long_prompts(tokenizer: Any, max_length: int, *prompts: str | list[str] | None) -> None:
    """Name the prompts of a call that are cut; what is no text is left for others to refuse."""
    texts = [
        text
        for given in prompts
        for text in (given if isinstance(given, list) else [given])
        if isinstance(text, str)
    ]
    for prompt in long_prompts(texts, tokenizer, max_length):
        logger.warning("cut after max_sequence_length %d tokens: %r", max_length, prompt)

"""Prompts as a text encoder is given them, and those that it is not shown to their end."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from diffusers import SanaPipeline
from diffusers.utils.torch_utils import get_module_execution_device
from tokenizers import Tokenizer
from torch import Tensor

logger = logging.getLogger(__name__)

# What SanaPipeline puts in front of every prompt, but not of negative ones.
SANA_INSTRUCTION = "\n".join(
    inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default
)


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
        device: of the results; the encoder's own by default, which may be another.

    Returns:
        Embeddings ``[B, max_length, D]`` and mask ``[B, max_length]``, 1 for the tokens of the texts.

    Raises:
        ValueError: when the text encoder has positions for fewer tokens.
    """
    longest = longest_text(tokenizer, max_length, instruction)
    texts = [instruction + text.lower().strip() for text in texts]
    embeddings, mask = embed(tokenizer, text_encoder, texts, length=longest, device=device)
    shown = [0, *range(longest - max_length + 1, longest)]
    return embeddings[:, shown], mask[:, shown]


@torch.no_grad()
def embed(
    tokenizer: Any,
    text_encoder: Any,
    texts: Sequence[str],
    *,
    length: int,
    device: torch.device | None = None,
) -> tuple[Tensor, Tensor]:
    """Embed texts as they are, filled up at their end or cut to one length.

    Args:
        tokenizer, text_encoder, texts, device: see :func:`encode_texts`.
        length: tokens of each.

    Returns:
        Last hidden states ``[B, length, D]`` and mask ``[B, length]``, 1 for the tokens of the texts.

    Raises:
        ValueError: when the text encoder has positions for fewer tokens.
    """
    require_positions(text_encoder, length)
    prepare_tokenizer(tokenizer)
    place = get_module_execution_device(text_encoder)
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).to(place)
    mask = tokens.attention_mask
    embeddings = text_encoder(tokens.input_ids, attention_mask=mask).last_hidden_state
    # One without a token, as GPT's tokenizer makes of the empty text, has seen nothing: perhaps NaN.
    embeddings = embeddings.masked_fill(~mask.any(dim=1)[:, None, None], 0.0)
    return embeddings.to(device or place), mask.to(device or place)


def prepare_tokenizer(tokenizer: Any) -> None:
    """Let a tokenizer fill up texts at their end, as pipelines need it.

    Those of decoders fill up at the beginning (Gemma, Llama), or not at all (GPT). Which token fills up does
    not matter, as the mask hides it.
    """
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token


def longest_text(tokenizer: Any, max_length: int, instruction: str = "") -> int:
    """Count the tokens that a text encoder is given at most: of an instruction, and of a text after it."""
    # Sana counts two tokens of the instruction, its begin and its end, with the texts.
    return max_length + len(tokenizer.encode(instruction)) - 2 if instruction else max_length


def require_positions(text_encoder: Any, tokens: int) -> None:
    """Check that a text encoder has positions for so many tokens.

    Raises:
        ValueError: when it has fewer.
    """
    limit = getattr(text_encoder.config, "max_position_embeddings", None)
    if limit is None:  # of T5, for one, which are relative
        return
    # RoBERTa and its like count positions from behind that of what fills up.
    tables = [m for name, m in text_encoder.named_modules() if name.endswith("position_embeddings")]
    limit -= max((table.padding_idx + 1 for table in tables if table.padding_idx is not None), default=0)
    if tokens > limit:
        raise ValueError(
            f"texts of {tokens} tokens, with what stands before them, are longer than the {limit} that "
            f"{type(text_encoder).__name__} has positions for: lower text.max_length (in a call "
            "max_sequence_length), or take another text encoder"
        )


def long_prompts(prompts: Sequence[str], tokenizer: Any, max_length: int) -> list[str]:
    """List the distinct prompts of more tokens, which the text encoder is not shown to their end."""
    if not prompts:  # as embeddings are given, perhaps without a tokenizer
        return []
    # A character of ASCII is a token at most, and beside them there is one more for the beginning of a word.
    short = max_length - 1 - tokenizer.num_special_tokens_to_add()
    distinct = [text for text in dict.fromkeys(prompts) if len(text) > short or not text.isascii()]
    return [
        prompt
        for start in range(0, len(distinct), 10_000)
        for prompt, ids in _token_ids(distinct[start : start + 10_000], tokenizer)
        if len(ids) > max_length
    ]


def _token_ids(texts: list[str], tokenizer: Any) -> Iterable[tuple[str, Any]]:
    """Pair texts with their tokens, all of them."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        return zip(texts, tokenizer(texts, verbose=False)["input_ids"], strict=True)
    backend.no_truncation()
    backend.no_padding()
    return zip(texts, backend.encode_batch_fast(texts), strict=True)  # in half of the time


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

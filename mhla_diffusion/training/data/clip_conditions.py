"""What models are given of a clip: of Wan the first frame, perhaps the last, of Wan VACE any part of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torchvision.transforms.v2.functional as tvf
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPImageProcessor, CLIPVisionModel

from ...autoencoders import vae_strides
from ...hub import component_subfolder
from .captions import draw_index
from .stream import from_pixels, to_pixels
from .video_autoencoders import encode_clip, require_clips
from .videos import VideoFile, VideoFiles, prepare_clip

ControlTask = Literal["first", "first_and_last", "inpainting", "outpainting", "gray"]


def load_image_encoder(path: str) -> tuple[CLIPImageProcessor, CLIPVisionModel]:
    """Load the processor and the frozen encoder of images, of a pipeline or beside each other in a folder.

    Raises:
        ValueError: when one of them is not there.
    """
    folders = {name: component_subfolder(path, name) or "" for name in ("image_processor", "image_encoder")}
    try:
        encoder = CLIPVisionModel.from_pretrained(
            path, subfolder=folders["image_encoder"], dtype=torch.float32
        )
        processor = CLIPImageProcessor.from_pretrained(path, subfolder=folders["image_processor"])
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"image_encoder {path} holds no CLIP vision model with its processor, here or on the hub: {error}"
        ) from error
    return processor, encoder.eval().requires_grad_(False)


class ImageConditions:
    """Known frames of clips, as WanImageToVideoPipeline gives them to its transformer.

    Args:
        vae: AutoencoderKLWan.
        last: whether the last frame is known too.
        processor, encoder: of images, for models with ``image_dim``.
    """

    def __init__(
        self,
        vae: Any,
        *,
        last: bool,
        processor: CLIPImageProcessor | None = None,
        encoder: CLIPVisionModel | None = None,
    ) -> None:
        self.vae, self.last, self.encoder = vae, last, encoder
        self._pipeline = WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            image_processor=processor,
            image_encoder=encoder,
        )

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> dict[str, Tensor]:
        """Encode the known frames of a clip ``[C, F, H, W]`` in [-1, 1].

        Returns:
            ``condition`` float16 ``[4 + C', f, h, w]``, a mask and the latents of a clip that is gray where
            it is not known; with an encoder ``image_embeds`` ``[1 or 2, n, D]``.
        """
        frames = [clip[:, 0], clip[:, -1]] if self.last else [clip[:, 0]]
        known = [frame[None].to(self.vae.device, self.vae.dtype) for frame in frames]
        _, condition = self._pipeline.prepare_latents(
            known[0], 1, height=clip.shape[2], width=clip.shape[3], num_frames=clip.shape[1],
            dtype=torch.float32, device=self.vae.device, latents=torch.zeros(1),
            last_image=known[1] if self.last else None,
        )  # fmt: skip
        encoded = {"condition": condition[0].half().cpu()}
        if self.encoder is not None:
            pixels = [to_pixels(frame) for frame in frames]
            pictures = [Image.fromarray(frame.movedim(0, -1).cpu().numpy()) for frame in pixels]
            encoded["image_embeds"] = self._pipeline.encode_image(pictures, self.vae.device).cpu()
        return encoded


def require_edits(vae: Any, frames: int, sizes: Sequence[tuple[int, int]]) -> None:
    """Check that clips have a first frame and a last, and that an autoencoder takes these sizes.

    Raises:
        ValueError: otherwise.
    """
    if frames < 2:
        raise ValueError(
            f"image_condition edit takes the first and the last frame of a clip: data.frames must be 2 or "
            f"more, got {frames}"
        )
    require_clips(vae, 1 + vae_strides(vae)[0], sizes)


def edit_of(vae: Any, clip: Tensor) -> Tensor:
    """Return the first frame of a clip ``[C, F, H, W]``, and the last held for all frames of a latent.

    So ChronoEdit sees a picture and its edit: its pipeline makes two frames of latents, the last of an edit.
    """
    return torch.cat([clip[:, :1], clip[:, -1:].expand(-1, vae_strides(vae)[0], -1, -1)], dim=1)


class Controls:
    """Known parts of clips, as WanVACEPipeline gives them to its transformer.

    Args:
        vae: AutoencoderKLWan.
        tasks: one of which is drawn for each clip, see :func:`draw_control`.
    """

    def __init__(self, vae: Any, tasks: Sequence[ControlTask]) -> None:
        self.vae, self.tasks = vae, tasks

    @torch.no_grad()
    def __call__(self, clip: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Encode the control of a clip ``[C, F, H, W]`` in [-1, 1].

        Returns:
            ``control`` float16 ``[2 C' + s s, f, h, w]``: the latents of what is kept, those of what is made
            anew, each gray elsewhere, and the mask, whose s x s pixels of a latent are channels.
        """
        task = self.tasks[draw_index([1.0] * len(self.tasks), generator)]
        video, mask = draw_control(clip, task, generator)
        kept, made = (encode_clip(self.vae, video * part) for part in (1 - mask, mask))
        channels = F.pixel_unshuffle(mask[:, None], vae_strides(self.vae)[1]).transpose(0, 1)
        # The masks of a few frames, one for each of the latents, the first of which is not the first frame's.
        packed = F.interpolate(channels[None], size=kept.shape[1:], mode="nearest-exact")[0]
        return {"control": torch.cat([kept, made, packed.half()])}


def draw_control(clip: Tensor, task: ControlTask, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw what a model is told of a clip ``[C, F, H, W]`` in [-1, 1].

    Args:
        clip: to be made.
        task: what is known of it: the ``"first"`` frame, the ``"first_and_last"``, for ``"inpainting"`` all
            but a box that is the same in all frames, for ``"outpainting"`` such a box alone, or how bright
            it is (``"gray"``), which is to be coloured.
        generator: for the box.

    Returns:
        The control video, of the clip's shape and gray where nothing is known, and the mask ``[F, H, W]``: 0
        where the video is kept, 1 where it is made anew.
    """
    mask = torch.ones(clip.shape[1:])
    if task == "gray":
        return tvf.rgb_to_grayscale(clip.transpose(0, 1), clip.shape[0]).transpose(0, 1), mask
    if task in ("first", "first_and_last"):
        mask[0 if task == "first" else [0, -1]] = 0
    else:
        rows, columns = (_draw_side(side, generator) for side in clip.shape[2:])
        mask[:, rows, columns] = 0
        mask = 1 - mask if task == "inpainting" else mask
    return clip * (1 - mask), mask


def _draw_side(side: int, generator: torch.Generator) -> slice:
    """Draw an interval of a quarter to three quarters of a side."""
    share, place = torch.rand(2, generator=generator).tolist()
    length = max(1, round(side * (0.25 + 0.5 * share)))
    first = round(place * (side - length))
    return slice(first, first + length)


def read_control(
    path: str,
    task: ControlTask,
    *,
    size: tuple[int, ...],
    fps: float | None,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Return the control of the first clip of a video as arguments of WanVACEPipeline.

    Args:
        path: of the video.
        task, generator: see :func:`draw_control`.
        size: frames, height and width in pixels.
        fps: frames per second of the clip; every frame of the file when None.

    Returns:
        ``video`` and ``mask`` ``[1, F, 3, H, W]`` in [0, 1].

    Raises:
        ValueError: when it cannot be decoded or is too short.
    """
    frames, height, width = size
    read = VideoFiles([VideoFile(Path(path), "")]).read(0, length=frames, fps=fps, start=0.0)
    clip = from_pixels(prepare_clip(read, size=(height, width), channels=3)).transpose(0, 1)
    video, mask = draw_control(clip, task, generator)
    shown = (video.transpose(0, 1)[None] + 1) / 2
    return {"video": shown, "mask": mask[None, :, None].expand_as(shown)}

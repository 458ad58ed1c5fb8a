"""What Wan's image-to-video models are given of a clip: its first frame, and perhaps its last."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanImageToVideoPipeline
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPVisionModel

from ...hub import component_subfolder


def load_image_encoder(path: str) -> tuple[CLIPImageProcessor, CLIPVisionModel]:
    """Load the processor and the frozen encoder of images, of a pipeline or beside each other in a folder."""
    folders = {name: component_subfolder(path, name) or "" for name in ("image_processor", "image_encoder")}
    encoder = CLIPVisionModel.from_pretrained(path, subfolder=folders["image_encoder"], dtype=torch.float32)
    processor = CLIPImageProcessor.from_pretrained(path, subfolder=folders["image_processor"])
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
            pixels = [((frame + 1) * 127.5).round().clamp(0, 255).byte() for frame in frames]
            pictures = [Image.fromarray(frame.movedim(0, -1).cpu().numpy()) for frame in pixels]
            encoded["image_embeds"] = self._pipeline.encode_image(pictures, self.vae.device).cpu()
        return encoded

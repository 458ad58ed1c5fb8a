"""Task of a run: how samples are conditioned, shown on the way, and wrapped into a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from .conditioning import Conditioning
from .config import changeable


@dataclass(frozen=True, kw_only=True)
class SampleSheetConfig:
    """Pictures during training, of the averaged weights.

    Args:
        every: steps between them, 0 for none.
        guidance_scale: strength of classifier-free guidance; 1 for none.
        num_inference_steps: of the scheduler.
        seed: of the noise, the same each time.
    """

    every: int = changeable(0)
    guidance_scale: float = changeable(4.0)
    num_inference_steps: int = changeable(50)
    seed: int = changeable(0)

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("num_inference_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"sampling.{name} must be {least} or more, got {getattr(self, name)}")

    def rows(self) -> list[dict[str, Any]]:
        """Return what the pipeline is asked for in each row, as its arguments."""
        raise NotImplementedError


@dataclass
class TrainingTask:
    """Conditioning, sample sheet and pipeline of a run.

    Args:
        conditioning: of the samples.
        sampling: of the config.
        pipeline: called with ``transformer`` and ``training``, the facts for its model card or None.
        data_name: what the model card calls the data.
    """

    conditioning: Conditioning
    sampling: SampleSheetConfig
    pipeline: Callable[..., Any]
    data_name: str

    def sample(self, model: Any, device: torch.device) -> Image.Image:
        """Draw the sample sheet, the same in every process; see :meth:`samples`."""
        rows = self.samples(model, device)
        return make_image_grid([image for row in rows for image in row], rows=len(rows), cols=len(rows[0]))

    @torch.no_grad()
    def samples(self, model: Any, device: torch.device) -> list[list[Image.Image]]:
        """Draw the rows of the sample sheet: images, or the frames of a video.

        Every process calls it, as a sharded model needs. It does not draw from the global generators.
        """
        sampling = self.sampling
        pipeline = self.pipeline(transformer=model, training=None).to(device)
        pipeline.set_progress_bar_config(disable=True)
        return [
            _pictures(
                pipeline(
                    **arguments,
                    guidance_scale=sampling.guidance_scale,
                    num_inference_steps=sampling.num_inference_steps,
                    generator=torch.Generator().manual_seed(sampling.seed),
                    output_type="pil",
                )
            )
            for arguments in sampling.rows()
        ]

    def save_pipeline(self, model: Any, folder: Path, training: Mapping[str, Any]) -> None:
        """Write the finished pipeline; ``training`` are the facts for its model card."""
        facts = {**training, **self.conditioning.facts(f"{self.data_name}, {training['data']}")}
        self.pipeline(transformer=model, training=facts).save_pretrained(folder)


def _pictures(output: Any) -> list[Image.Image]:
    """Return the images of a pipeline's output, or the frames of its first video."""
    return output.frames[0] if hasattr(output, "frames") else output.images

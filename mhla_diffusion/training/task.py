"""Task of a run: how samples are conditioned, shown on the way, and wrapped into a pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mhla_diffusion.pipelines.model_card import PICTURE, save_with_card
from mhla_diffusion.pipelines.sampling import (
    DEFAULT_FPS,
    FRAMES,
    call_parameters,
    guidance_name,
    with_negative_prompt,
)

from ..arguments import require_seed
from .conditioning import Conditioning
from .config import changeable
from .sheets import SampleSheet, SheetClock


@dataclass(frozen=True, kw_only=True)
class SampleSheetConfig:
    """Pictures during training, of the averaged weights.

    Args:
        every: steps between them, 0 for none.
        guidance_scale: strength of classifier-free guidance; 1 for none.
        num_inference_steps: of the scheduler.
        seed: of the noise, the same each time.
        max_share: of the time of the run that sheets may take without a warning.
    """

    every: int = changeable(0)
    guidance_scale: float = changeable(4.0)
    num_inference_steps: int = changeable(50)
    seed: int = changeable(0)
    max_share: float = changeable(0.25)

    def __post_init__(self) -> None:
        for name, least in (("every", 0), ("num_inference_steps", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"sampling.{name} must be {least} or more, got {getattr(self, name)}")
        require_seed(self.seed, "sampling.seed")
        if not 0 < self.max_share <= 1:
            raise ValueError(f"sampling.max_share must be above 0 and at most 1, got {self.max_share}")

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
        facts: what else it says of them.
        call: further arguments of the pipeline's call, of those that it takes, for sample sheets and whoever
            generates with it.
        fps: of videos, where the pipeline does not know it and the data have one.
        prepare: called with the number of a row and what it asks for; returns the arguments of the call.
    """

    conditioning: Conditioning
    sampling: SampleSheetConfig
    pipeline: Callable[..., Any]
    data_name: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    fps: float | None = None
    prepare: Callable[[int, dict[str, Any]], dict[str, Any]] | None = None

    @torch.no_grad()
    def sample(self, model: Any, device: torch.device, clock: SheetClock | None = None) -> SampleSheet:
        """Make the sample sheet, the same in every process.

        Every process calls it, as a sharded model needs. It does not draw from the global generators.
        """
        sampling, asked = self.sampling, self.sampling.rows()
        if clock is not None:
            clock.start(len(asked) * sampling.num_inference_steps)
        pipeline = self.pipeline(transformer=model, training=None).to(device)
        pipeline.set_progress_bar_config(disable=True)
        takes = call_parameters(pipeline)
        # Some pipelines of diffusers know callbacks of another kind alone.
        watch = {"callback_on_step_end": clock} if "callback_on_step_end" in takes else {}
        call = {name: value for name, value in self.call.items() if name in takes}
        guidance = {guidance_name(pipeline): sampling.guidance_scale}
        outputs = [
            pipeline(
                **with_negative_prompt({**arguments, **call, **guidance}),
                **watch,
                num_inference_steps=sampling.num_inference_steps,
                generator=torch.Generator().manual_seed(sampling.seed),
                output_type="pil",
            )
            for arguments in self._prepared(asked)
        ]
        if hasattr(outputs[0], "frames"):
            fps = pipeline.config.get("fps") or self.fps or DEFAULT_FPS
            return SampleSheet([output.frames[0] for output in outputs], fps=fps)
        return SampleSheet([output.images for output in outputs])

    def _prepared(self, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for number, row in enumerate(rows):
            yield row if self.prepare is None else self.prepare(number, row)

    def save_pipeline(
        self, model: Any, folder: Path, training: Mapping[str, Any], picture: Path | None = None
    ) -> None:
        """Write the finished pipeline; ``training`` and ``picture`` are for its model card."""
        if picture is not None:
            shutil.copyfile(picture, folder / PICTURE)
        facts = self.all_facts(training)
        save_with_card(self.pipeline(transformer=model, training=facts), folder, self.beside(facts))

    def beside(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Return the facts of a run and what pipelines of diffusers do not say: size and rate of samples."""
        rate = {} if self.fps is None else {"fps": self.fps}
        return {**self._size(), **rate, **facts, "call": dict(self.call)}

    def _size(self) -> dict[str, str]:
        """Size of what a sheet shows, for a model card; empty where the pipeline knows it."""
        if "height" not in self.call:
            return {}
        frames = next((self.call[name] for name in FRAMES if name in self.call), None)
        size = f"{self.call['height']} x {self.call['width']} pixels, latents"
        return {"size": f"{frames} frames of {size}" if frames else size}

    def all_facts(self, training: Mapping[str, Any]) -> dict[str, Any]:
        """Return the facts of a run and those of its data."""
        return {**training, **self.conditioning.facts(f"{self.data_name}, {training['data']}"), **self.facts}

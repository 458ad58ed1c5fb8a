"""Samples of a training run's models, and the held-out data that they are scored against."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mhla_diffusion.pipelines.generation import generate_images, generate_videos

from .autoencoders import size_in_pixels
from .evaluation import FeatureExtractor, Report, evaluate_images, evaluate_videos
from .evaluation.measure import PassSettings, measure
from .evaluation.networks.images import load_extractor
from .evaluation.networks.videos import load_video_extractor
from .evaluation.sets.images import open_images
from .evaluation.sets.samples import SampleSet
from .evaluation.sets.videos import open_videos
from .files.videos import write_video
from .processes import in_first_process
from .training import VideoTrainingConfig
from .training.data.latents import CachedLatents
from .training.data.stream import to_pixels
from .training.objectives import build_objective

FPS = 8.0
"""Frames per second of the files of clips, generated and real."""


def open_source(config: Any) -> Any:
    """Open the data of a run in the size that its model takes.

    Raises:
        ValueError: when they are not there, or do not fit.
    """
    _, source, _ = config.build(build_objective(config.objective))
    return source


def clip_size(run: Any) -> tuple[int, ...]:
    """Return frames, height and width in pixels of the clips that the models of a run make."""
    if run.data.source == "latents":  # whose config has no sizes
        return _decoded_size(run.data.path)
    return run.data.frames, *run.data.sizes[0]


def size_beside_config(run: Any) -> list[tuple[int, ...]]:
    """List the size of clips where the config of a run does not say it: scores depend on that too."""
    of_latents = isinstance(run, VideoTrainingConfig) and run.data.source == "latents"
    return [clip_size(run)] if of_latents else []


@functools.lru_cache
def _decoded_size(path: str) -> tuple[int, ...]:
    latents = CachedLatents(path)
    vae = latents.load_vae()
    return size_in_pixels(vae, latents.sizes_as_listed(vae)[0])


def load_extractor_of(run: Any, name: str, *, device: str | None = None) -> FeatureExtractor:
    """Load an extractor, see ``mhla evaluate``, for what the models of a run make."""
    if isinstance(run, VideoTrainingConfig):
        return load_video_extractor(name, frames=clip_size(run)[0], device=device)
    return load_extractor(name, device=device)


def open_set_of(run: Any, folder: str | Path) -> SampleSet:
    """Open images or, as long as the clips of the run, videos."""
    if isinstance(run, VideoTrainingConfig):
        return open_videos(folder, frames=clip_size(run)[0])
    return open_images(folder)


def generate_samples(
    run: Any,
    pipeline: Any,
    out: Path,
    num_samples: int,
    *,
    prompts: Sequence[str],
    batch_size: int,
    fps: float | None = None,
) -> None:
    """Generate samples with the settings of a run; what is there is gone on with.

    Args:
        run: config of a training run.
        pipeline: makes images or videos, as the run's models do.
        out: folder of the samples, sample i from seed i.
        num_samples: to generate, of the prompts in turn, or of all classes.
        prompts: of models of texts.
        batch_size: samples at a time.
        fps: of the files of videos, see :func:`.generate_videos`.
    """
    sampling: dict[str, Any] = {
        "num_inference_steps": run.sampling.num_inference_steps,
        "guidance_scale": run.sampling.guidance_scale, "batch_size": batch_size,
    }  # fmt: skip
    if isinstance(run, VideoTrainingConfig):
        frames, height, width = clip_size(run)
        generate_videos(
            pipeline, out, prompts=list(prompts), num_videos=num_samples, height=height, width=width,
            num_frames=frames, fps=fps, **sampling,
        )  # fmt: skip
    else:
        generate_images(pipeline, out, prompts=list(prompts) or None, num_images=num_samples, **sampling)


def score_samples(run: Any, real: str | Path, out: Path, **settings: Any) -> Report:
    """Score the samples in a folder, see :func:`.evaluate_images` and :func:`.evaluate_videos`."""
    if isinstance(run, VideoTrainingConfig):
        return evaluate_videos(real, out, frames=clip_size(run)[0], **settings)
    return evaluate_images(real, out, **settings)


def require_real(number: int, source: Any) -> None:
    """Check that a source has as many samples.

    Raises:
        ValueError: when it has fewer.
    """
    if number > len(source):
        raise ValueError(f"num_real must be at most the {len(source)} held-out samples, got {number}")


def write_statistics_of(
    source: Any, number: int, open_set: Callable[[Path], SampleSet], extractor: FeatureExtractor, path: Path
) -> None:
    """Write the statistics of samples evenly spaced in a source, which are PNG or MP4 files on the way."""
    folder = path.with_suffix("")

    def export() -> None:
        shutil.rmtree(folder, ignore_errors=True)  # of a call that was stopped
        folder.mkdir(parents=True)
        for count, pixels in enumerate(pixels_of(source, number)):
            _write(pixels, folder / f"{count:06d}")

    in_first_process(export)
    write_statistics(open_set(folder), extractor, path)
    in_first_process(lambda: shutil.rmtree(folder))


def write_statistics(samples: SampleSet, extractor: FeatureExtractor, path: Path) -> None:
    """Write the statistics of the features of samples as a file; processes share the work."""
    found = measure(samples, [extractor], PassSettings(num_workers=1), title="real")

    def save() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        found.measured[extractor.name].statistics.save(path)

    in_first_process(save)


def pixels_of(source: Any, number: int) -> Iterator[np.ndarray]:
    """Yield uint8 ``[(F,) H, W, C]`` of samples evenly spaced in a source."""
    for i in range(number):
        generator = torch.Generator().manual_seed(i)
        pixels = source.load(i * len(source) // number, generator)["samples"]
        yield to_pixels(pixels).movedim(0, -1).numpy()


def _write(pixels: np.ndarray, path: Path) -> None:
    if pixels.ndim == 4:
        write_video(np.broadcast_to(pixels, (*pixels.shape[:-1], 3)), path.with_suffix(".mp4"), fps=FPS)
    else:
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(path.with_suffix(".png"))

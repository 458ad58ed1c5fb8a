"""Page on which pipelines are tried beside their teachers, with the time that each takes."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from mhla_diffusion.pipelines import MHLAPipeline
from mhla_diffusion.pipelines.rows import class_rows, prompt_rows
from mhla_diffusion.pipelines.sampling import (
    call_arguments,
    call_parameters,
    frames_per_second,
    output_kind,
    sample,
)

from .arguments import require_seed
from .files.videos import write_video
from .optional import require
from .processes import process_state

_EXAMPLE = "Classes, or prompts: one on each line"


@dataclass
class Pair:
    """Pipeline and its teacher, opened when they are first asked for.

    Args:
        name: of the pair.
        paths: folder or hub id of the pipeline and, if there is one, of its teacher.
        opened: pipelines by their path.
    """

    name: str
    paths: tuple[str, ...]
    opened: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def parse(cls, text: str) -> Pair:
        """Read ``pipeline`` or ``pipeline=teacher``.

        Raises:
            ValueError: when one of them is empty.
        """
        paths = tuple(part.strip() for part in text.split("=", 1))
        if not all(paths):
            raise ValueError(f"{text!r} must be a pipeline, or a pipeline and its teacher: DIR=DIR")
        return cls(paths[0], paths)

    def open(self, path: str) -> Any:
        """Open a pipeline once, on the device of this process."""
        if path not in self.opened:
            pipeline = MHLAPipeline.from_pretrained(path).to(process_state().device)
            pipeline.set_progress_bar_config(disable=True)
            self.opened[path] = pipeline
        return self.opened[path]

    def show(self, texts: Sequence[str], *, steps: int, guidance: float, seed: int) -> list[Any]:
        """Return samples and a caption of the pipeline, and of its teacher or in place of one.

        Raises:
            ValueError, OSError: as :func:`make_samples`, and when a pipeline cannot be opened.
        """
        found: list[Any] = []
        for path in self.paths:
            first = path not in self.opened
            made = make_samples(
                self.open(path), texts, steps=steps, guidance=guidance, seed=seed,
                folder=Path(tempfile.mkdtemp(prefix="mhla-demo-")),
            )  # fmt: skip
            # Kernels are compiled and memory is taken in the first call.
            found += [made.samples, made.caption() + ", the first time, which takes longer" * first]
        return found + [[], "no teacher given"] * (2 - len(self.paths))


@dataclass(frozen=True)
class Made:
    """Samples of one pipeline.

    Args:
        samples: images, or paths of MP4 files.
        seconds: that they took, loading not counted.
        title: what made them.
    """

    samples: list[Any]
    seconds: float
    title: str

    def caption(self) -> str:
        return f"**{self.title}**: {self.seconds:.2f} s for {len(self.samples)}"


def make_samples(
    pipeline: Any, texts: Sequence[str], *, steps: int, guidance: float, seed: int, folder: Path
) -> Made:
    """Make a sample of each class or prompt, all from the same noise whichever pipeline it is.

    Args:
        pipeline: of images or videos, of classes or texts.
        texts: names or numbers of classes, or prompts.
        steps, guidance, seed: of the call.
        folder: for files of videos.

    Raises:
        ValueError: when there is no text, or one that the pipeline does not know, and for a seed that torch
            does not take.
    """
    require_seed(seed)
    if not texts:
        raise ValueError("nothing to show: write a class or a prompt on a line")
    kind = output_kind(pipeline)
    pictures: list[Path | None] = [None] * len(texts)
    if "class_labels" in call_parameters(pipeline):
        labels = [int(text) if text.isdecimal() else text for text in texts]
        rows = class_rows(pipeline, len(labels), labels, seed)
    else:
        rows, pictures = prompt_rows(texts, None, None, seed=seed, negative_prompt=None, kind=kind)
    given = {"num_inference_steps": steps, "guidance_scale": guidance}
    call = call_arguments(pipeline, rows, given, None)
    started = time.perf_counter()
    pixels = sample(pipeline, rows, call, pictures)
    seconds = time.perf_counter() - started
    samples: list[Any] = []
    for number, its in enumerate(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels):
        if kind == "images":
            samples.append(Image.fromarray(its))
            continue
        samples.append(str(folder / f"{number}.mp4"))
        write_video(its, samples[-1], fps=frames_per_second(pipeline, call, None))
    return Made(samples, seconds, type(pipeline.transformer).__name__)


def build_page(pairs: Sequence[Pair]) -> Any:
    """Build the page, of Gradio; ``launch()`` starts it.

    Raises:
        ImportError: without the package gradio.
        ValueError: when two pairs have one name.
    """
    gradio = require("gradio")
    by_name = {pair.name: pair for pair in pairs}
    if len(by_name) < len(pairs):
        raise ValueError(f"each pipeline is given once, got {', '.join(pair.name for pair in pairs)}")

    def show(name: str, lines: str, steps: int, guidance: float, seed: int) -> list[Any]:
        texts = [line.strip() for line in lines.splitlines() if line.strip()]
        try:
            return by_name[name].show(texts, steps=int(steps), guidance=guidance, seed=int(seed))
        except (ValueError, OSError) as error:
            raise gradio.Error(str(error)) from error

    with gradio.Blocks(title="MHLA beside its teacher") as page:
        gradio.Markdown("# MHLA beside its teacher\nThe same noise, the same settings, and the time of each.")
        names = list(by_name)
        name = gradio.Dropdown(names, value=names[0], label="Pipeline")
        lines = gradio.Textbox(label=_EXAMPLE, value="0", lines=3)
        with gradio.Row():
            steps = gradio.Slider(1, 100, value=20, step=1, label="Steps")
            guidance = gradio.Slider(1, 10, value=4, label="Guidance")
            seed = gradio.Number(value=0, precision=0, label="Seed")
        button = gradio.Button("Generate", variant="primary")
        outputs = []
        with gradio.Row():
            for title in ("MHLA", "Teacher"):
                with gradio.Column():
                    outputs += [gradio.Gallery(label=title, format="png"), gradio.Markdown()]
        button.click(show, [name, lines, steps, guidance, seed], outputs, api_name="show")
    return page

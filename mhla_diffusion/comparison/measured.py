"""One run of a task of generation, from its start to its results; stopped anywhere, it goes on."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shutil
import statistics
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import send_to_device, set_seed
from diffusers.utils import make_image_grid
from PIL import Image
from torch.utils.data import default_collate

from mhla_diffusion.pipelines import MHLAPipeline

from ..analysis import analyze
from ..backbones.teacher import predict
from ..conversion.calls import TIME_BUCKETS, DataCalls
from ..conversion.measures import by_time, losses
from ..files.manifest import read_manifest
from ..files.videos import open_video
from ..files.writing import write_file
from ..timing import peak_bytes
from ..training import train
from ..training.data.stream import FOR_LOSS, sample_generator
from ..training.objectives import build_objective

# Samples on a sheet, from the first seed on, and frames of each clip.
_ON_SHEET, _FRAMES = 10, 4


def common_start(config: Any) -> Any:
    """Return the model of a run, its weights those of its linear form where names and shapes agree.

    A convolution or gate more would otherwise change what is drawn for all layers behind it.
    """
    model_config = dataclasses.replace(config.model, attention="linear", mhla=None)
    set_seed(config.trainer.seed)
    objective = build_objective(config.objective)
    reference, _, _ = dataclasses.replace(config, model=model_config).build(objective)
    set_seed(config.trainer.seed)
    model, _, _ = config.build(objective)
    own = model.state_dict()
    shared = {
        name: weight
        for name, weight in reference.state_dict().items()
        if name in own and own[name].shape == weight.shape
    }
    model.load_state_dict(shared, strict=False)
    return model


class MeasuredRun:
    """Run in a folder of its own.

    Args:
        task: what is generated and measured.
        config: of the training run.
        folder: ``training/`` and ``samples/`` are below it, the sheet and a log in it.
        device: of torch.
    """

    def __init__(self, task: Any, config: Any, folder: Path, device: str) -> None:
        self.task, self.config, self.folder, self.device = task, config, folder, device

    def results(self) -> dict[str, Any]:
        """Train, generate and measure what is not done yet.

        Raises:
            FloatingPointError: when the loss is no longer finite.
        """
        with _logged(self.folder / "log.txt"):
            self._train()
            found = {
                "frechet": self._score(), **self.task.describe(self, self.folder / "samples"),
                **self._losses(), **self._progress(),
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "peak_bytes": self._step_bytes(), "attention": self._attention(),
            }  # fmt: skip
            self._draw_sheet()
            # What is left can be made again from the pipeline, but for the checkpoints, which have ended.
            for name in ("samples", "training/checkpoints"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        return found

    def _train(self) -> None:
        if self.pipeline_folder.is_dir():
            return
        stopped = train(self.config, resume="auto", model=common_start(self.config))
        # Runs follow each other in a process, and accelerate keeps its state for the life of one.
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        if stopped:
            raise KeyboardInterrupt(stopped)

    @property
    def pipeline_folder(self) -> Path:
        """Folder of the trained pipeline."""
        return Path(self.config.output_dir) / "pipeline"

    @cached_property
    def pipeline(self) -> Any:
        """Pipeline with the averaged weights."""
        return MHLAPipeline.from_pretrained(str(self.pipeline_folder))

    @cached_property
    def model(self) -> Any:
        """Transformer of the pipeline."""
        return self.pipeline.transformer.eval().to(self.device)

    @cached_property
    def calls(self) -> DataCalls:
        """Held-out samples with their noise, the same in all runs."""
        return DataCalls(self.model, self.task.held_out_config(self.config), seed=0)

    def _autocast(self) -> torch.autocast:
        """Compute in the precision of the training."""
        precision = self.config.trainer.mixed_precision
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=precision == "bf16")

    def _score(self) -> float:
        """Generate, and return the Frechet distance."""
        with self._autocast():
            self.task.generate(self, self.folder / "samples")
        real = self.folder.parents[1] / self.task.real_name
        return self.task.score(self, real, self.folder / "samples")

    def _losses(self) -> dict[str, Any]:
        numbers = range(TIME_BUCKETS * self.task.calls)
        values = losses(self.model, self.calls, numbers)
        return {"loss": statistics.mean(values), "loss_by_time": by_time(values, numbers)}

    def _progress(self) -> dict[str, Any]:
        """Curve of the training loss, each point the mean since the last, and the median time of a step."""
        lines = (Path(self.config.output_dir) / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(line) for line in lines]
        batch = self.config.trainer.batch_size
        return {
            "curve": [[line["step"], line["loss"]] for line in found if line["loss"] is not None],
            "seconds_per_step": statistics.median(batch / line["samples_per_second"] for line in found),
        }

    def _step_bytes(self) -> int:
        """Return the most that one step of training allocates beyond the weights, its gradients included."""
        calls, trainer = self.calls, self.config.trainer
        generators = [sample_generator(0, number, FOR_LOSS) for number in range(trainer.batch_size)]
        batch = default_collate([calls.source.load(0, generator) for generator in generators])
        conditions = calls.task.conditioning.arguments(batch, generators)
        samples, conditions = send_to_device((batch["samples"], conditions), self.device)

        def step() -> torch.Tensor:
            with self._autocast():
                loss = calls.objective.loss(self.model, samples, conditions, generators).mean()
            loss.backward()
            return loss.detach()

        self.model.train()
        try:
            return peak_bytes(step, self.device)
        finally:
            self.model.eval().zero_grad(set_to_none=True)

    def _attention(self) -> list[dict[str, Any]]:
        """Rank and entropy of each layer's attention, in the middle between data and noise."""
        if not self.task.analyzed:
            return []
        inputs = self.calls(TIME_BUCKETS // 2)
        analysis = analyze(self.model, lambda: predict(self.model, inputs), max_matrices=self.task.analyzed)
        return [
            {
                "layer": layer.name, "kind": layer.kind, "tokens": layer.num_tokens,
                **dataclasses.asdict(layer.matrices[layer.kind]),
                "mixing_change": None if layer.mixing is None else layer.mixing.change,
            }
            for layer in analysis.layers
        ]  # fmt: skip

    def _draw_sheet(self) -> None:
        """Draw the samples of the first seeds in a row."""
        folder = self.folder / "samples"
        manifest = read_manifest(folder)
        assert manifest is not None
        rows = manifest["images" if "images" in manifest else "videos"]
        pictures = [_picture(folder / row["file"]) for row in rows[:_ON_SHEET]]
        sheet = make_image_grid(pictures, rows=1, cols=len(pictures))
        write_file(self.folder / "sheet.png", sheet.save)


def _picture(path: Path) -> Image.Image:
    """Open a picture, or draw some frames of a clip below each other."""
    if path.suffix == ".png":
        return Image.open(path)
    reader = open_video(path)
    frames = reader.read([number * (reader.num_frames - 1) // (_FRAMES - 1) for number in range(_FRAMES)])
    return Image.fromarray(np.concatenate(list(frames)))


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Send what is told on the way, and progress bars, to a file: many runs write at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, contextlib.redirect_stderr(file):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root = logging.getLogger()
        before = root.handlers, root.level
        root.handlers, root.level = [handler], logging.INFO
        try:
            yield
        finally:
            root.handlers, root.level = before

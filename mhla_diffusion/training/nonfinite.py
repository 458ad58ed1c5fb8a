"""The batch of a step that was not finite: kept for whoever looks for the cause, and named."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import NoReturn

from safetensors.torch import save_file
from torch import Tensor

from ..files.writing import write_file
from .data.stream import BatchShare, SampleSource, SampleStream, StreamSampler

_FOLDER = "not-finite"


class NotFiniteError(FloatingPointError, ValueError):
    """Loss or gradient that is not finite; the message says which step, which samples and what to do."""


def refuse_step(
    output_dir: Path, source: SampleSource, share: BatchShare, step: int, *, seed: int
) -> NoReturn:
    """Keep the batch of a step that was not finite, and end; arguments as for :func:`keep_batch`.

    Raises:
        NotFiniteError: always.
    """
    path, names = keep_batch(output_dir, source, share, step, seed=seed)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    raise NotFiniteError(
        f"the loss or its gradient is not finite at step {step}, whose samples are {', '.join(names[:8])}"
        f"{more}; {path} keeps them. Go on from the last checkpoint with --resume latest and leave them out "
        f'by --trainer.skip_steps "[{step}]"; or start again with a lower trainer.optimizer.learning_rate, '
        "with trainer.max_grad_norm set, or in bf16 instead of fp16"
    )


def keep_batch(
    output_dir: Path, source: SampleSource, share: BatchShare, step: int, *, seed: int
) -> tuple[Path, list[str]]:
    """Write what this process was given in an optimizer step.

    Args:
        output_dir: of the run; the file goes to not-finite/ there, one of each process.
        source: of the samples.
        share: of the batch.
        step: counted from 1.
        seed: of the run.

    Returns:
        The file, safetensors with tensors ``<micro-batch>.<name>`` and the samples' numbers, names and texts
        as metadata; and their names.
    """
    steps = range(step - 1, step)
    indices = [index for batch in StreamSampler(source, share, steps, seed=seed) for _, index in batch]
    names = [source.name(index) for index in indices]
    tensors: dict[str, Tensor] = {}
    metadata = {"step": str(step), "samples": json.dumps(names)}
    for part, (numbers, batch) in enumerate(SampleStream(source, share, steps, seed=seed)):
        metadata[f"{part}.numbers"] = json.dumps(numbers)
        for name, value in batch.items():
            if isinstance(value, Tensor):
                tensors[f"{part}.{name}"] = value.contiguous()
            else:
                metadata[f"{part}.{name}"] = json.dumps(value)
    path = output_dir / _FOLDER / f"step-{step:08d}-process-{share.process_index}.safetensors"
    write_file(path, partial(save_file, tensors, metadata=metadata))
    return path, names

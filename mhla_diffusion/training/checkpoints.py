"""Checkpoints that are whole or not there at all.

They are written by :mod:`mhla_diffusion.files.writing`. Layout: ``<run>/checkpoints/step-00000100``.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import forbidden_changes

logger = logging.getLogger(__name__)

_FOLDER = "checkpoints"
_RECORD = "run.json"
_NAME = re.compile(r"step-(\d+)")


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` optimizer steps is kept."""
    return output_dir / _FOLDER / f"step-{step:08d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    folder = output_dir / _FOLDER
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return after how many optimizer steps a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def keep_latest(output_dir: Path, count: int) -> None:
    """Remove all checkpoints but the last ``count``."""
    for folder in list_checkpoints(output_dir)[:-count]:
        shutil.rmtree(folder)


def write_record(folder: Path, *, config: Mapping[str, Any], num_processes: int) -> None:
    """Write what a run must share with one that goes on from here."""
    record = {"config": config, "num_processes": num_processes}
    (folder / _RECORD).write_text(json.dumps(record, indent=2))


def find_checkpoint(output_dir: Path, resume: str | None, config: Any) -> Path | None:
    """Find where a run goes on from, None for a new one. Changes nothing.

    Args:
        output_dir: of the run that is about to start.
        resume: ``"latest"`` for the last checkpoint in ``output_dir``, the folder of a checkpoint, or None.
        config: dataclass of the run.

    Raises:
        ValueError: when a new run would write into another one's folder; when there is no checkpoint; when
            the run has checkpoints newer than the one asked for; or when the config differs from the saved
            one where it must not, with the keys that do.
    """
    holds_run = output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir()))
    if resume is None:
        if holds_run:
            raise ValueError(
                f"{output_dir} is not empty: go on with --resume latest, or choose another --output_dir"
            )
        return None
    checkpoint = _resolve(output_dir, resume)
    own = checkpoint.resolve().parent == (output_dir / _FOLDER).resolve()
    if holds_run and not own:
        raise ValueError(
            f"{output_dir} holds another run than {checkpoint}: choose an empty --output_dir to branch off"
        )
    if own and (newest := list_checkpoints(output_dir)[-1]).resolve() != checkpoint.resolve():
        raise ValueError(
            f"{output_dir} goes on to {newest.name}: to branch off at {checkpoint.name}, choose an empty "
            "--output_dir; to go on there, remove the newer checkpoints first"
        )
    saved = json.loads((checkpoint / _RECORD).read_text())
    if changes := forbidden_changes(saved["config"], config):
        raise ValueError(
            f"{checkpoint} was written with another config, and these keys cannot change on the way:\n  "
            + "\n  ".join(changes)
        )
    return checkpoint


def saved_num_processes(checkpoint: Path) -> int:
    """Return how many processes wrote a checkpoint."""
    return json.loads((checkpoint / _RECORD).read_text())["num_processes"]


def _resolve(output_dir: Path, resume: str) -> Path:
    if resume != "latest":
        checkpoint = Path(resume)
        if not _NAME.fullmatch(checkpoint.name) or not (checkpoint / _RECORD).is_file():
            raise ValueError(f"{resume} is no checkpoint: give 'latest' or a folder like .../step-00001000")
        return checkpoint
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise ValueError(f"{output_dir} has no checkpoint to resume from; start without --resume")
    return checkpoints[-1]

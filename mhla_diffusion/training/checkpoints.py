"""Checkpoints that are whole or not there at all, and gone on from only when they are what was written.

They are written by :mod:`mhla_diffusion.files.writing`. Layout: ``<run>/checkpoints/step-00000100``, in each
the SHA-256 of its files, see :mod:`mhla_diffusion.files.sums`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any

from accelerate.utils.other import load

from ..config import AUTO_WINDOW, MHLAConfig
from ..files.sums import SUMS, damaged_files, record_all
from ..files.text import changes, flat_dict
from ..files.writing import remove_partial, remove_unfinished
from .config import forbidden_changes
from .pickles import require_known_names

logger = logging.getLogger(__name__)

_FOLDER = "checkpoints"
_RECORD = "run.json"
# Since 2 models have the window "auto" where nothing else is said.
_FORMAT = 2
_NAME = re.compile(r"step-(\d+)")
# What a run writes before its first checkpoint.
_BEGINNING = {"config.yaml", "metrics.jsonl", "logs", "samples", "not-finite", _FOLDER}


def checkpoint_folder(output_dir: Path, step: int) -> Path:
    """Return where the checkpoint after ``step`` optimizer steps is kept."""
    return output_dir / _FOLDER / f"step-{step:08d}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """List the whole checkpoints of a run, oldest first."""
    folder = output_dir / _FOLDER
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=checkpoint_step)


def is_checkpoint(folder: Path) -> bool:
    """Tell the folder of a checkpoint by its name and its record."""
    return _NAME.fullmatch(folder.name) is not None and (folder / _RECORD).is_file()


def checkpoint_step(checkpoint: Path) -> int:
    """Return after how many optimizer steps a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    assert match is not None, checkpoint
    return int(match[1])


def keep_latest(output_dir: Path, count: int) -> None:
    """Remove all checkpoints but the last ``count``."""
    for folder in list_checkpoints(output_dir)[:-count]:
        shutil.rmtree(folder)


def remove_what_was_left(output_dir: Path) -> None:
    """Remove what a run that was killed had begun to write; this process is the only writer now."""
    for name in ("pipeline", "lora"):
        remove_unfinished(output_dir, name)
    remove_unfinished(output_dir / _FOLDER, "step-*")
    for name in ("samples", "not-finite"):
        remove_partial(output_dir / name)


def write_record(
    folder: Path, *, config: Mapping[str, Any], num_processes: int, data: str | None = None
) -> None:
    """Write what a run must share with one that goes on from here, and the hashes of all that is there.

    Args:
        folder: of the checkpoint.
        config: of the run.
        num_processes: of the run.
        data: fingerprint of its data; None when they have none.
    """
    record = {"config": config, "num_processes": num_processes, "data": data, "format": _FORMAT}
    (folder / _RECORD).write_text(json.dumps(record, indent=2))
    record_all(folder)


def set_newer_aside(output_dir: Path, step: int) -> None:
    """Rename the checkpoints after ``step``, which were damaged, so that none is taken for the latest."""
    for folder in list_checkpoints(output_dir):
        if checkpoint_step(folder) > step:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
            logger.warning("set aside %s", aside)


def find_checkpoint(output_dir: Path, resume: str | None, config: Any) -> Path | None:
    """Find where a run goes on from, None for a new one. Changes nothing.

    A folder in which a run was stopped before its first checkpoint counts as new.

    Args:
        output_dir: of the run that is about to start.
        resume: ``"latest"`` for the last whole checkpoint in ``output_dir``, ``"auto"`` for that where there
            is any, the name of one there, the folder of one, or None.
        config: dataclass of the run.

    Raises:
        ValueError: when a new run would write into another one's folder; when there is no checkpoint, or it
            is damaged, with the files that are; when the run has checkpoints newer than the one asked for;
            when the config differs from the saved one where it must not, with the keys that do; or when it
            ends before the checkpoint.
    """
    if resume == "auto":
        resume = "latest" if list_checkpoints(output_dir) else None
    if resume is None or (resume == "latest" and not list_checkpoints(output_dir)):
        _require_new_run(output_dir, resume)
        return None
    checkpoint = latest_whole(output_dir) if resume == "latest" else _named(output_dir, resume)
    saved = _read_record(checkpoint)
    if others := forbidden_changes(saved["config"], as_it_began(config, checkpoint)):
        raise ValueError(
            f"{checkpoint} was written with another config, and these keys cannot change on the way:\n  "
            + "\n  ".join(others)
            + "\nLeave them as they were, or begin another run from these weights: another --output_dir, and "
            "--model.init_from with the pipeline of this one, in place of the shape of a model (mhla "
            "export-checkpoint writes that of a checkpoint)"
        )
    if (step := checkpoint_step(checkpoint)) > config.trainer.max_steps:
        raise ValueError(
            f"{checkpoint} is beyond trainer.max_steps {config.trainer.max_steps}: give {step} or more"
        )
    return checkpoint


def as_it_began(config: Any, checkpoint: Path) -> Any:
    """Return the config of a run that goes on or is opened: "auto" is no window in those of before format 2.

    Args:
        config: dataclass of the run.
        checkpoint: to go on from.
    """
    record = _read_record(checkpoint)
    settings = (record["config"].get("model") or {}).get("mhla") or {}
    mhla = getattr(getattr(config, "model", None), "mhla", None) or MHLAConfig()
    without = record["format"] < 2 and settings.get("local", AUTO_WINDOW) is None
    if not without or mhla.local != AUTO_WINDOW:
        return config
    model = dataclasses.replace(config.model, mhla=dataclasses.replace(mhla, local=None))
    return dataclasses.replace(config, model=model)


def saved_config(checkpoint: Path) -> dict[str, Any]:
    """Return the config of the run that wrote a checkpoint, as :func:`.config.as_dict` gives it."""
    return _read_record(checkpoint)["config"]


def saved_num_processes(checkpoint: Path) -> int:
    """Return how many processes wrote a checkpoint."""
    return _read_record(checkpoint)["num_processes"]


def require_same_data(checkpoint: Path, config: Mapping[str, Any], data: str | None) -> None:
    """Check that a run goes on with the samples that it began with, wherever they lie.

    Args:
        checkpoint: to go on from.
        config: of the run that goes on.
        data: fingerprint of its data.

    Raises:
        ValueError: when the path of the data is another, and so are the data, or the checkpoint has not
            their fingerprint.
    """
    saved = _read_record(checkpoint)
    old, new = (
        {key: value for key, value in flat_dict(its).items() if key in ("data.path", "data.captions")}
        for its in (saved["config"], config)
    )
    moved = "; ".join(changes(old, new))
    if saved["data"] == data:
        return
    if moved:
        why = (
            "what is there is not the same"
            if saved["data"]
            else "the checkpoint has no fingerprint of its data"
        )
        raise ValueError(
            f"{checkpoint} was written with other data, {moved}, and {why}: give the path that it had, or "
            "one of the same samples"
        )
    if saved["data"]:
        logger.warning(
            "the data have changed since %s was written: the run goes on with other samples", checkpoint
        )


def require_loadable(checkpoint: Path, process_index: int) -> None:
    """Refuse pickles that hold more than numbers, and say when random states are missing.

    accelerate reads the other files without running code of theirs, but not those of registered objects, nor
    what DeepSpeed and FSDP keep in folders.

    Raises:
        ValueError: when such a file would run code, or cannot be read.
    """
    for path in sorted(checkpoint.glob("custom_checkpoint_*.pkl")):
        with read_errors(path):
            load(path, map_location="meta")
    for path in sorted([*checkpoint.glob("*/**/*.pt"), *checkpoint.glob("*/**/.metadata")]):
        require_known_names(path)
    states = checkpoint / f"random_states_{process_index}.pkl"
    try:
        load(states)["torch_manual_seed"]
    except Exception as error:  # accelerate would go on without a word
        if process_index < saved_num_processes(checkpoint):
            logger.warning(
                "%s cannot be read (%s): the run goes on, but not as the uninterrupted one to the bit",
                states,
                type(error).__name__,
            )


@contextmanager
def read_errors(path: Path) -> Iterator[None]:
    """Turn whatever the readers of a checkpoint raise into one sentence.

    Raises:
        ValueError: that names ``path``.
    """
    try:
        yield
    except Exception as error:  # torch, safetensors and pickle raise what they stumble over
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        # What ends with a colon announces the cause, which may be a list of thousands of weights.
        why = shorten(" ".join(lines[: 1 + lines[0].endswith(":")]), 300, placeholder=" ...")
        raise ValueError(f"{path} cannot be loaded: {why}; go on from another checkpoint") from error


def _read_record(checkpoint: Path) -> dict[str, Any]:
    try:
        record = json.loads((checkpoint / _RECORD).read_text())
        config, model = record["config"], record["config"].get("model")
        form = record.get("format", 1)
        if form < 2 and model is not None and model.get("init_from") is None:
            config = {**config, "model": {**model, "mhla": {"local": None, **(model.get("mhla") or {})}}}
        data = record.get("data")  # earlier versions wrote no fingerprint
        num_processes = record["num_processes"]
        return {"config": config, "num_processes": num_processes, "data": data, "format": form}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{checkpoint / _RECORD} is damaged ({type(error).__name__}): go on from another one"
        ) from error


def _require_new_run(output_dir: Path, resume: str | None) -> None:
    names = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    visible = {name for name in names if not name.startswith(".")}
    there = bool(list_checkpoints(output_dir))
    if "config.yaml" in names and visible <= _BEGINNING and not there:
        logger.warning("the run in %s was stopped before its first checkpoint: it begins anew", output_dir)
    elif there:
        raise ValueError(
            f"{output_dir} is not empty: go on with --resume latest, or choose another --output_dir"
        )
    elif visible or output_dir.is_file():
        found = ", ".join(sorted(visible)[:3]) or "a file"
        raise ValueError(
            f"{output_dir} is not empty, and holds no checkpoint of a run ({found}): choose another "
            "--output_dir"
        )
    elif resume is not None:
        raise ValueError(f"{output_dir} has no checkpoint to resume from; start with --resume auto")


def _named(output_dir: Path, resume: str) -> Path:
    checkpoint = output_dir / _FOLDER / resume if _NAME.fullmatch(resume) else Path(resume)
    if not is_checkpoint(checkpoint):
        names = ", ".join(path.name for path in list_checkpoints(output_dir)) or "none"
        raise ValueError(
            f"{resume} is no checkpoint: give 'latest', 'auto', one of {output_dir} ({names}), or the folder "
            "of one"
        )
    own = checkpoint.resolve().parent == (output_dir / _FOLDER).resolve()
    if not own and output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(
            f"{output_dir} holds another run than {checkpoint}: choose an empty --output_dir to branch off"
        )
    if own and (newest := list_checkpoints(output_dir)[-1]).resolve() != checkpoint.resolve():
        raise ValueError(
            f"{output_dir} goes on to {newest.name}: to branch off at {checkpoint.name}, choose an empty "
            "--output_dir; to go on there, remove the newer checkpoints first"
        )
    if damaged := _damage(checkpoint):
        raise ValueError(f"{damaged}; --resume latest goes on from the last one that is whole")
    return checkpoint


def latest_whole(output_dir: Path) -> Path:
    """Find the last whole checkpoint of a run; warns of those after it.

    Raises:
        ValueError: when none is.
    """
    for checkpoint in reversed(list_checkpoints(output_dir)):
        damaged = _damage(checkpoint)
        if damaged is None:
            return checkpoint
        logger.warning("%s; trying the one before", damaged)
    raise ValueError(
        f"no checkpoint in {output_dir / _FOLDER} is whole, so that nothing of it can be used: train again, "
        "into another folder"
    )


def require_whole(checkpoint: Path) -> None:
    """Check that a checkpoint is what was written.

    Raises:
        ValueError: naming the files that are not.
    """
    if damaged := _damage(checkpoint):
        raise ValueError(f"{damaged}; take another one")


def _damage(checkpoint: Path) -> str | None:
    """Return a sentence that names the damaged files of a checkpoint, None when it is whole."""
    damaged = damaged_files(checkpoint)
    if damaged is None:
        logger.warning(
            "%s has no %s, as earlier versions wrote none: its files cannot be checked", checkpoint, SUMS
        )
        return None if (checkpoint / _RECORD).is_file() else f"{checkpoint} lacks {_RECORD}"
    if _RECORD not in damaged and not (checkpoint / _RECORD).is_file():
        damaged.append(_RECORD)
    return f"{checkpoint} is damaged: {', '.join(damaged)}" if damaged else None

"""Where stored pipelines and their parts lie: in a folder, or on the hub."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin, DiffusionPipeline
from huggingface_hub import snapshot_download

_HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


def hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Pick what says where on the hub something is, among the arguments of a ``from_pretrained``."""
    return {name: arguments[name] for name in _HUB_ARGUMENTS if name in arguments}


def component_subfolder(path: str, component: str, **place: Any) -> str | None:
    """Return ``component`` where a folder or hub id holds a pipeline, None where it holds the component.

    Raises:
        ValueError: see :func:`require_stored`.
    """
    require_stored(path)
    try:
        DiffusionPipeline.load_config(path, **place)
    except OSError:
        return None
    return component


def has_component(path: str, component: str) -> bool:
    """Tell if a folder or hub id holds a pipeline with such a component, which may stand there as None.

    Raises:
        ValueError: see :func:`require_stored`.
    """
    require_stored(path)
    try:
        return _holds(DiffusionPipeline.load_config(path), component)
    except OSError:
        return False


def _holds(index: dict[str, Any], component: str) -> bool:
    return bool((index.get(component) or [None])[0])


def expert_times(path: str, component: str = "transformer") -> tuple[float, float] | None:
    """Return the part of the way from data, 0, to noise, 1, that one of a pipeline's two experts is for.

    Wan2.2-A14B's ``transformer`` goes from ``boundary_ratio`` on, its ``transformer_2`` below it.

    Args:
        path: folder or hub id of a pipeline, or folder of one of its transformers.
        component: of the pipeline.

    Returns:
        None where there is one transformer for all times, or nothing to be known.
    """
    folder = Path(path).resolve()
    own, outer = (place / DiffusionPipeline.config_name for place in (folder, folder.parent))
    if outer.is_file() and not own.is_file():
        path, component = str(folder.parent), folder.name
    try:
        index = DiffusionPipeline.load_config(path)
    except OSError:
        return None
    boundary = index.get("boundary_ratio")
    if boundary is None or not _holds(index, "transformer_2"):
        return None
    return {"transformer": (boundary, 1.0), "transformer_2": (0.0, boundary)}.get(component)


def require_stored(path: str) -> None:
    """Refuse a path to nothing, and the output folder of a training and its checkpoints.

    Raises:
        ValueError: saying what to give.
    """
    if not os.path.exists(path):
        if os.path.isabs(path) or path.startswith(("./", "../")) or path.count("/") > 1:
            raise ValueError(f"{path} does not exist; on the hub models are called OWNER/NAME")
        return
    folder = Path(path)
    above = [place for place in (folder, folder.parent) if place.name == "checkpoints"]
    run = above[0].parent if above else folder
    if (run / "config.yaml").is_file() and (run / "checkpoints").is_dir():
        left = run / "pipeline"
        what = f"its pipeline is {left}" if left.is_dir() else "mhla export-checkpoint writes its pipeline"
        raise ValueError(f"{path} is of the output folder of a training: {what}")


def holds_pixels(path: str, **place: Any) -> bool:
    """Tell a pipeline without an autoencoder, whose transformer works on pixels; False for a model alone."""
    try:
        index = DiffusionPipeline.load_config(path, **place)
    except OSError:
        return False
    parts = {name: part for name, part in index.items() if isinstance(part, (list, tuple))}
    return bool(parts) and not any(_holds(parts, name) for name in ("vae", "vqvae"))


@contextmanager
def load_errors(path: str) -> Iterator[None]:
    """Turn what diffusers and torch stumble over in what is stored into one sentence that names it.

    Raises:
        ValueError: instead of any error but those of the system and of memory.
    """
    try:
        yield
    except (OSError, ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{path} cannot be loaded: {kind}{error}") from error


class _StoredModel(ConfigMixin):
    """Any model, as its config is stored."""

    config_name = "config.json"


def load_config(path: str, **place: Any) -> dict[str, Any]:
    """Read the config of a model of any class, as it is stored.

    Args:
        path: folder, config.json or hub id.
        place: subfolder, revision, ... as for ``from_pretrained``.

    Raises:
        OSError: when there is none.
    """
    try:
        return _StoredModel.load_config(path, **place)
    except OSError as error:
        if os.path.exists(path):
            raise
        raise OSError(f"{path} is no folder here, and could not be read from the hub: {error}") from error


def load_component_config(path: str, component: str) -> dict[str, Any]:
    """Read the config of a model, or of the component of that name where ``path`` holds a pipeline.

    Raises:
        OSError: when there is none.
    """
    return load_config(path, subfolder=component_subfolder(path, component))


def locate_subfolder(path: str, subfolder: str, arguments: dict[str, Any]) -> str:
    """Return a local path to a subfolder, downloaded if need be.

    diffusers knows subfolders of models alone.

    Raises:
        ValueError: when there is no such subfolder.
    """
    if not os.path.isdir(path):
        known = {key: value for key, value in hub_arguments(arguments).items() if key != "proxies"}
        path = snapshot_download(path, allow_patterns=f"{subfolder}/*", **known)
    folder = os.path.join(path, subfolder)
    if not os.path.isdir(folder):
        raise ValueError(f"{path} has no subfolder {subfolder!r}")
    return folder

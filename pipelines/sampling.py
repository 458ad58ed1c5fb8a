"""Calling any pipeline of diffusers: what it takes is read off the signature of its call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mhla_diffusion.arguments import require_finite
from mhla_diffusion.backbones.quantised import dequantised
from mhla_diffusion.files.pictures import read_picture

from .identity import training_of

Kind = Literal["images", "videos"]

DEFAULT_FPS = 16.0

FRAMES = ("num_frames", "video_length", "frames")
"""Names by which pipelines of diffusers are told how many frames to make."""

# What comes from the rows, and how results come back.
_OURS = (
    "prompt", "negative_prompt", "class_labels", "image", "generator", "output_type", "return_dict",
    "num_images_per_prompt", "num_videos_per_prompt", "callback_on_step_end",
    "callback_on_step_end_tensor_inputs",
)  # fmt: skip
# Tensors, which would be the same for all samples and which no manifest can hold.
_TENSORS = ("latents", "_embeds", "_embeddings", "_attention_mask")
_OF_JSON: set[Any] = {bool, int, float, str, list, dict, NoneType}


class NotFiniteSampleError(ValueError):
    """Samples that hold NaN or infinity; the message says since when, and what may have made them."""


def call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    """Parameters of a pipeline's call, those included that it hands on to its base class."""
    parameters: dict[str, inspect.Parameter] = {}
    for owner in type(pipeline).__mro__:
        if "__call__" in vars(owner):
            found = inspect.signature(vars(owner)["__call__"]).parameters
            parameters = {**found, **parameters}
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in found.values()):
                break
    variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return {
        name: parameter
        for name, parameter in parameters.items()
        if name != "self" and parameter.kind not in variadic
    }


def output_kind(pipeline: Any) -> Kind:
    """Return what a pipeline makes: videos when its call takes a number of frames."""
    return "videos" if any(name in call_parameters(pipeline) for name in FRAMES) else "images"


def is_controlled(pipeline: Any) -> bool:
    """Return True for a pipeline that is given a control of its video, with a mask, as Wan VACE's is.

    It takes one text a call.
    """
    return {"video", "mask"} <= call_parameters(pipeline).keys()


def takes_one_text(pipeline: Any) -> bool:
    """Return True where what a text gives would depend on those beside it in a call, or there may be none.

    Models of Kandinsky 5 and Latte have no mask (``one_by_one`` of ours): texts are filled up to the longest,
    and that is read.
    """
    return is_controlled(pipeline) or type(pipeline).__name__.startswith(("Kandinsky5", "Latte"))


def guidance_name(pipeline: Any) -> str:
    """Return what a pipeline calls the strength of guidance away from the empty text, or from another one."""
    if "true_cfg_scale" not in call_parameters(pipeline):
        return "guidance_scale"
    # There guidance_scale is for models that are told it, and for others it is not read.
    return "guidance_scale" if pipeline.transformer.config.get("guidance_embeds") else "true_cfg_scale"


def with_negative_prompt(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call whose guidance has a text to lead away from, the empty one where none is given.

    Pipelines with a ``true_cfg_scale`` do not guide without it.
    """
    if "negative_prompt" in call or (call.get("true_cfg_scale") or 0) <= 1:
        return dict(call)
    prompt = call["prompt"]
    return {**call, "negative_prompt": [""] * len(prompt) if isinstance(prompt, list) else ""}


def call_arguments(
    pipeline: Any,
    rows: Sequence[dict[str, Any]],
    given: Mapping[str, Any],
    options: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Return the arguments that all calls share, by the names that this pipeline has for them.

    Args:
        rows: what there shall be, see :func:`sample`.
        given: num_inference_steps, guidance_scale, height, width, num_frames, frame_rate; None for those that
            the pipeline was trained with, as far as that is known, else its own default.
        options: more arguments of the pipeline's call.

    Raises:
        ValueError: for an argument that the pipeline does not take, of another type, NaN or infinite, or
            given twice, and when it needs one that is not given.
    """
    parameters, options, name = call_parameters(pipeline), dict(options or {}), type(pipeline).__name__
    allowed = {key for key in parameters if key not in _OURS and not key.endswith(_TENSORS)}
    if unknown := sorted(options.keys() - allowed):
        raise ValueError(
            f"options {', '.join(unknown)} cannot be given to {name}; those that can are "
            f"{', '.join(sorted(allowed))}"
        )
    _require_types(pipeline, options)
    names = {
        "num_frames": next((frames for frames in FRAMES if frames in parameters), "num_frames"),
        "guidance_scale": guidance_name(pipeline),
    }
    named = {names.get(key, key): value for key, value in given.items() if value is not None}
    if twice := sorted(options.keys() & named.keys()):
        raise ValueError(f"{twice[0]} is given twice, by itself and among the options: leave one of them out")
    call: dict[str, Any] = {
        key: parameters[key].default
        for key in ("num_inference_steps", "guidance_scale", "frame_rate")
        if key in parameters
    }
    trained = training_of(pipeline).get("call", {})
    call |= {key: value for key, value in trained.items() if key in parameters}
    call |= options | named
    require_finite(**call)
    asked = {*call, *(key for row in rows for key in (*conditions([row]), *own_size(row)))}
    if "image" in rows[0]:
        asked |= {"video", "mask"} if is_controlled(pipeline) else {"image"}
    if unknown := sorted(asked - parameters.keys()):
        raise ValueError(f"{name} takes no {', '.join(unknown)}")
    required = {key for key, parameter in parameters.items() if parameter.default is parameter.empty}
    if missing := sorted(required - asked):
        remedy = ": give a folder of images, or a file of prompts with a column image"
        raise ValueError(f"{name} needs {', '.join(missing)}{remedy if 'image' in missing else ''}")
    return call


def _require_types(pipeline: Any, options: Mapping[str, Any]) -> None:
    """Check values against the types that a pipeline's call states, where these are those of JSON."""
    try:
        hints = get_type_hints(type(pipeline).__call__)
    except (NameError, TypeError):  # of a pipeline that imports types for its checks alone
        return
    for name, value in options.items():
        hint = hints.get(name)
        union = get_origin(hint) in (Union, UnionType)
        kinds = {get_origin(kind) or kind for kind in (get_args(hint) if union else (hint,))}
        # Numbers are numbers: pipelines state int where they mean either.
        number = bool(kinds & {int, float}) and isinstance(value, (int, float))
        if value is None or number or not kinds <= _OF_JSON or isinstance(value, tuple(kinds)):
            continue
        stated = " or ".join(sorted(kind.__name__ for kind in kinds - {NoneType}))
        raise ValueError(f"{name} of a {type(pipeline).__name__} must be {stated}, got {value!r}")


def conditions(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return what rows of one of the :func:`batches` ask for, as arguments of a call; not the picture."""
    if "class_id" in rows[0]:
        return {"class_labels": [row["class_id"] for row in rows]}
    asked = {"prompt": [row["prompt"] for row in rows]}
    if "negative_prompt" in rows[0]:
        asked["negative_prompt"] = [row["negative_prompt"] for row in rows]
    return asked


def own_size(row: Mapping[str, Any]) -> dict[str, int]:
    """Return the height and width of a row that has its own."""
    return {key: row[key] for key in ("height", "width") if key in row}


def batches(rows: Sequence[Mapping[str, Any]], batch_size: int) -> list[slice]:
    """Divide rows into calls: those one after the other that can be in one, at most ``batch_size``.

    They have one size, and all a negative prompt or none: without one, pipelines have theirs.
    """

    def kind(row: Mapping[str, Any]) -> tuple[Any, ...]:
        return own_size(row), "negative_prompt" in row

    starts = [0]
    for i in range(1, len(rows)):
        if i - starts[-1] == batch_size or kind(rows[i]) != kind(rows[starts[-1]]):
            starts.append(i)
    return [slice(*ends) for ends in zip(starts, [*starts[1:], len(rows)], strict=True)]


def frames_per_second(pipeline: Any, call: Mapping[str, Any], fps: float | None) -> float:
    """Frames per second of the videos: as asked, else as the pipeline or its training states, else 16."""
    stated = pipeline.config.get("fps") or training_of(pipeline).get("fps")
    return float(fps or stated or call.get("frame_rate") or DEFAULT_FPS)


def sample(
    pipeline: Any, rows: Sequence[dict[str, Any]], call: Mapping[str, Any], images: Sequence[Path | None]
) -> NDArray[np.uint8]:
    """Make what the rows of a manifest say, in one call.

    Args:
        rows: each with a seed and a class_id, or a prompt and perhaps a negative_prompt; see :func:`batches`.
            One where :func:`is_controlled`.
        call: see :func:`call_arguments`.
        images: of each row the picture to begin with, or None. With pictures one row at a time, as diffusers'
            image-to-video pipelines take one image.

    Returns:
        Images ``[B, H, W, C]`` or videos ``[B, F, H, W, C]``.

    Raises:
        NotFiniteSampleError: when NaN or infinity came out; as early as after the first step that made it.
    """
    files = " to ".join(dict.fromkeys((rows[0]["file"], rows[-1]["file"])))
    watch, known = {}, getattr(pipeline, "_callback_tensor_inputs", ())
    if "callback_on_step_end" in call_parameters(pipeline) and "latents" in known:
        watch = {
            "callback_on_step_end": partial(_check_step, files),
            "callback_on_step_end_tensor_inputs": [n for n in ("latents", "prompt_embeds") if n in known],
        }
    generators = [torch.Generator().manual_seed(row["seed"]) for row in rows]
    asked: dict[str, Any] = {**conditions(rows), "generator": generators}
    shared = {**call, **own_size(rows[0])}
    controlled = is_controlled(pipeline)
    if controlled:
        assert len(rows) == 1
        asked = {name: value for name, (value,) in asked.items()}
    if images[0] is not None:
        assert len(images) == 1
        picture = read_picture(images[0]).convert("RGB")
        asked |= _first_frame(pipeline, picture, shared) if controlled else {"image": picture}
    with _remedies(pipeline):
        made = pipeline(
            **with_negative_prompt({**asked, **shared}), **watch, output_type="np", return_dict=False
        )[0]
    values = np.asarray(made)
    if not np.isfinite(values).all():
        when = "after decoding; the latents were finite after every step" if watch else "in the output"
        raise _not_finite(files, pipeline, when)
    return (values.clip(0, 1) * 255).round().astype(np.uint8)


def _first_frame(pipeline: Any, picture: Image.Image, call: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return a control of Wan VACE whose first frame is a picture: what is to be made is gray.

    Returns:
        ``video`` and ``mask`` ``[1, F, 3, H, W]`` in [0, 1].
    """
    parameters = call_parameters(pipeline)
    frames, height, width = (
        call.get(name) or parameters[name].default for name in ("num_frames", "height", "width")
    )
    first = pipeline.video_processor.preprocess(picture, height=height, width=width)[0]
    video, mask = torch.full((frames, 3, height, width), 0.5), torch.ones(frames, 3, height, width)
    video[0], mask[0] = (first + 1) / 2, 0
    return {"video": video[None], "mask": mask[None]}


@contextmanager
def _remedies(pipeline: Any) -> Iterator[None]:
    """Say what helps against two errors of diffusers that do not say it."""
    name = type(pipeline).__name__
    try:
        yield
    except NameError as error:  # image-to-video pipelines of Wan do not ask whether it is there
        if error.name != "ftfy":
            raise
        raise ImportError(f"{name} cleans prompts with ftfy: pip install ftfy") from error
    except ValueError as error:
        if str(error) != "Invalid sample size":
            raise
        size = pipeline.transformer.config.sample_size
        raise ValueError(
            f"{name} rounds sizes to those of published models, and knows none for sample_size {size}: give "
            'the size as it shall be, with options {"use_resolution_binning": false}'
        ) from error


def _check_step(
    files: str, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Tensor]
) -> dict[str, Tensor]:
    if not torch.isfinite(tensors["latents"]).all():
        when = f"in the latents after step {step + 1} of {len(pipeline.scheduler.timesteps)}"
        embeds = tensors.get("prompt_embeds")
        if embeds is not None and not torch.isfinite(embeds).all():
            when = f"in what text_encoder made of the prompts, seen {when}"
        raise _not_finite(files, pipeline, when)
    return tensors


def _not_finite(files: str, pipeline: Any, when: str) -> NotFiniteSampleError:
    weights = _not_finite_weights(pipeline)
    why = (
        f"{weights} has weights that are not finite: store the model again, or take an earlier checkpoint"
        if weights
        else "all weights are finite, so that a number grew too large: try dtype float32 or bfloat16"
    )
    return NotFiniteSampleError(f"{files}: NaN or infinity {when}. {why}. No file of this batch was written")


def _not_finite_weights(pipeline: Any) -> str | None:
    """Name of the first weight that is not finite, looking at components in the order in which they run."""
    order = (pipeline.model_cpu_offload_seq or "").split("->")
    names = sorted(pipeline.components, key=lambda name: order.index(name) if name in order else len(order))
    for name in names:
        part = pipeline.components[name]
        for key, value in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            if isinstance(value, Tensor) and not _is_finite(value):
                return f"{name} ({key})"
    return None


def _is_finite(weight: Tensor) -> bool:
    """False for NaN and infinity, as far as can be seen: not in what is not in memory."""
    weight = dequantised(weight)
    if hasattr(weight, "__tensor_flatten__") or weight.is_meta or not weight.is_floating_point():
        return True
    return bool(torch.isfinite(weight.float()).all())  # fp8 has no isfinite

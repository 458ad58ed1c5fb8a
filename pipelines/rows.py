"""Rows of a manifest: which samples there shall be, of what, with which seed and name."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mhla_diffusion.files.pictures import DECODING_ERRORS, open_picture
from mhla_diffusion.files.sums import file_sha256

from .prompts import Prompt, with_images
from .sampling import Kind

_EXTENSIONS: dict[Kind, str] = {"images": ".png", "videos": ".mp4"}


def class_rows(
    pipeline: Any, num: int | None, class_labels: Sequence[int | str] | None, seed: int
) -> list[dict[str, Any]]:
    if num is None:
        raise ValueError("of classes any number of images can be made: say how many, num_images (--num)")
    if class_labels is not None and not class_labels:
        raise ValueError("class_labels is empty; leave it out for all classes")
    labels = range(pipeline.transformer.config.num_embeds_ada_norm) if class_labels is None else class_labels
    classes = pipeline.get_label_ids(list(labels))
    names = {number: name for name, number in reversed(pipeline.labels.items())}
    return [
        {
            "file": f"{i:06d}.png",
            "class_id": classes[i % len(classes)],
            "class_name": names.get(classes[i % len(classes)]),
            "seed": seed + i,
        }
        for i in range(num)
    ]


def prompt_rows(
    prompts: Sequence[str | Prompt] | None,
    num: int | None,
    per_prompt: int | None,
    *,
    seed: int,
    negative_prompt: str | None,
    kind: Kind,
    folder: str | os.PathLike[str] | None = None,
) -> tuple[list[dict[str, Any]], list[Path | None]]:
    """Rows of the manifest, and the picture that each begins with."""
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts (--prompts) must be a list of one text or more, got {prompts!r}")
    if num is not None and per_prompt is not None:
        raise ValueError(f"give num_{kind} or per_prompt, not both: got {num} and {per_prompt}")
    texts = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    texts = texts if folder is None else with_images(texts, folder)
    if num is None:
        shown = [(prompt, number) for prompt in texts for number in range(per_prompt or 1)]
    else:
        shown = [(texts[i % len(texts)], i // len(texts)) for i in range(num)]
    rows = []
    for i, (prompt, number) in enumerate(shown):
        name = prompt.file_name(_EXTENSIONS[kind], number)
        row: dict[str, Any] = {
            "file": name or f"{i:06d}{_EXTENSIONS[kind]}",
            "prompt": prompt.prompt,
            "seed": seed + i if prompt.seed is None else prompt.seed + number,
        }
        negative = negative_prompt if prompt.negative_prompt is None else prompt.negative_prompt
        if negative is not None:
            row["negative_prompt"] = negative
        row |= {n: getattr(prompt, n) for n in ("height", "width") if getattr(prompt, n) is not None}
        rows.append(row)
    _check_names(rows, [prompt for prompt, _ in shown])
    return rows, _add_pictures(rows, [prompt for prompt, _ in shown])


def _check_names(rows: list[dict[str, Any]], prompts: list[Prompt]) -> None:
    """No two files of one name, on file systems either that do not tell spellings of it apart."""
    seen: dict[str, int] = {}
    folders = {_folded(str(parent)) for row in rows for parent in PurePosixPath(row["file"]).parents}
    for i, row in enumerate(rows):
        if _folded(row["file"]) in folders:
            raise prompts[i].error(f"file {row['file']!r} is a folder of others: give it another name")
        first = seen.setdefault(_folded(row["file"]), i)
        if first != i:
            other = prompts[first].origin or f"sample {first}"
            raise prompts[i].error(f"file {row['file']!r} is that of {other} too: give each its own")


def _folded(name: str) -> str:
    """A name without capitals, and of letters with accents as one character each."""
    return unicodedata.normalize("NFC", name.casefold())


def _add_pictures(rows: list[dict[str, Any]], prompts: list[Prompt]) -> list[Path | None]:
    """Say in the rows which pictures they are of, which all of them must be or none."""
    paths = [None if prompt.image is None else Path(prompt.image) for prompt in prompts]
    if all(path is None for path in paths):
        return list(paths)
    digests: dict[Path, str] = {}
    for row, path, prompt in zip(rows, paths, prompts, strict=True):
        if path is None:
            raise prompt.error("has no image, and others have one: give each an image, or none")
        if path not in digests:
            try:
                with open_picture(path) as image:
                    image.verify()
            except DECODING_ERRORS as error:
                raise prompt.error(f"the image {path} cannot be read ({error})") from error
            digests[path] = file_sha256(path)
        row |= {"image": path.name, "image_sha256": digests[path]}
    return list(paths)

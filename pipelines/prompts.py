"""Prompts for generation: texts, lists, and files of them with seeds, names and pictures."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from PIL import Image

from mhla_diffusion.arguments import MAX_SEED
from mhla_diffusion.files.names import is_hidden
from mhla_diffusion.files.text import read_text
from mhla_diffusion.files.videos import VIDEO_EXTENSIONS

# Room for "-12.mp4" below the 255 bytes that file systems allow.
_MAX_NAME = 240


@dataclass(frozen=True)
class Prompt:
    """Text to generate from, and what goes with it.

    Args:
        prompt: the text.
        seed: of its first sample; by default seeds are counted through the whole run.
        negative_prompt: what the samples should not show.
        file: name of the sample in the folder of the run, in a subfolder if wanted (``"cats/first"``); by
            default a number.
        height, width: of the sample in pixels; those of the whole run by default.
        image: the picture that a video begins with.
        origin: where it was read, for messages.

    Raises:
        ValueError: for a value that is not allowed; the message names it and where it was read.
    """

    prompt: str
    seed: int | None = None
    negative_prompt: str | None = None
    file: str | None = None
    height: int | None = None
    width: int | None = None
    image: str | os.PathLike[str] | None = None
    origin: str = ""

    def __post_init__(self) -> None:
        for name in ("prompt", "negative_prompt", "file"):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "prompt" or value is not None):
                raise self.error(f"{name} must be a text, got {value!r}")
            if value is not None and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise self.error(f"{name} {value[:40]!r} is no Unicode text: it holds half of a character")
        if not self.prompt.strip():
            raise self.error("the prompt is empty")
        if self.seed is not None and not (type(self.seed) is int and 0 <= self.seed <= MAX_SEED):
            raise self.error(f"seed must be a whole number from 0 to {MAX_SEED}, got {self.seed!r}")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None and not (type(value) is int and value > 0):
                raise self.error(f"{name} must be a whole number of pixels, got {value!r}")
        if self.file is not None:
            self._check_name(self.file)

    def error(self, problem: str) -> ValueError:
        """Return an error that says which prompt it is about."""
        return ValueError(f"{self.origin or f'prompt {str(self.prompt)[:40]!r}'}: {problem}")

    def file_name(self, extension: str, repetition: int = 0) -> str | None:
        """Name of a sample's file: as asked for, with its extension; after the first with their number.

        Raises:
            ValueError: when the name has the extension of another kind of file.
        """
        if self.file is None:
            return None
        path = PurePosixPath(self.file)
        found = path.suffix.lower()
        if found != extension and _is_of_media(found):
            raise self.error(f"file {self.file!r} must end in {extension} or have no such ending")
        stem = path.name[: -len(extension)] if found == extension else path.name
        number = f"-{repetition}" if repetition else ""
        return str(path.with_name(f"{stem}{number}{extension}"))

    def _check_name(self, name: str) -> None:
        parts = name.split("/")
        problem = None
        if PureWindowsPath(name).anchor or "\\" in name or any(part in ("", ".", "..") for part in parts):
            problem = "must be a path below the folder of the run, with / between its parts and no . or .."
        elif any(part.startswith(".") for part in parts):
            problem = "would be hidden: no part of it may begin with a dot"
        elif not name.isprintable():
            problem = "holds characters that cannot be printed"
        elif any(len(part.encode()) > _MAX_NAME for part in parts):
            problem = f"is too long: at most {_MAX_NAME} bytes in each part"
        if problem:
            raise self.error(f"file {name!r} {problem}")


def read_prompts(values: Sequence[str], *, images: str | os.PathLike[str] | None = None) -> list[Prompt]:
    """Read prompts as the command line takes them.

    Each value is one of these:

    - a file: ``.txt`` with one prompt a line, ``.csv`` with a header, or ``.jsonl`` with an object a line.
      The columns are prompt and, if need be, seed, negative_prompt, file, height, width and image, a path
      inside ``images`` or else inside the folder of the file. Captions of a data set are prompts too, whose
      samples are named as its files: path (or file_name) and caption (or text). Empty lines are skipped;
    - a list in brackets, of one text, ``[a red car]``, or of several in quotes, ``["a car", "wind, rain"]``;
    - any other text is a prompt, its commas included.

    Args:
        values: as above.
        images: folder of pictures; those that no column names are taken as :func:`with_images` does.

    Raises:
        ValueError: for brackets whose commas may be those of one text or of a list, and for files that
            cannot be read, naming the line.
    """
    prompts: list[Prompt] = []
    for value in values:
        suffix = Path(value).suffix.lower()
        is_file = (suffix or os.sep in value) and os.path.exists(value)
        if suffix not in _READERS and (is_file or (suffix in _OTHER_TABLES and not value.split()[1:])):
            what = "a file or a folder here" if is_file else "the name of a file"
            raise ValueError(
                f"{value!r} is {what}, and no file of prompts ({', '.join(_READERS)}); if it is a text, put "
                f"it in brackets: [{value!r}]"
            )
        if suffix in _READERS:
            prompts += _read_file(Path(value), None if images is None else Path(images))
        elif value.strip().startswith("[") and value.strip().endswith("]"):
            prompts += [Prompt(text) for text in _texts_in_brackets(value.strip())]
        else:
            prompts.append(Prompt(value))
    if not prompts:
        raise ValueError(f"there is no prompt in {', '.join(values) or 'an empty list'}")
    named = any(prompt.image is not None for prompt in prompts)
    return prompts if images is None or named else with_images(prompts, images)


def with_images(prompts: Sequence[Prompt], folder: str | os.PathLike[str]) -> list[Prompt]:
    """Give each prompt a picture of a folder, in the order of the pictures' names.

    A single prompt goes with all pictures, and a single picture with all prompts.

    Raises:
        ValueError: when there are otherwise not as many pictures as prompts.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder of images")
    files = sorted(
        path
        for path in Path(folder).iterdir()
        if path.suffix.lower() in Image.registered_extensions()
        and path.is_file()
        and not is_hidden(path.name)
    )
    count = max(len(files), len(prompts))
    if not files or {len(files), len(prompts)} - {1, count}:
        raise ValueError(
            f"{folder} holds {len(files)} images, and there are {len(prompts)} prompts: give as many of "
            "both, or one of either, or name the images in the column image of a file of prompts"
        )
    return [replace(prompts[i % len(prompts)], image=files[i % len(files)]) for i in range(count)]


def _texts_in_brackets(value: str) -> list[str]:
    """The texts of a YAML list, where no comma can be one of a text."""
    try:
        node = yaml.compose(value)
    except yaml.YAMLError:
        node = None
    items = node.value if isinstance(node, yaml.SequenceNode) else []
    texts = all(isinstance(item, yaml.ScalarNode) for item in items)
    quoted = texts and all(item.style in ("'", '"') for item in items)
    if node is None or not texts or not (quoted or len(items) == 1):
        raise ValueError(
            f"{value[:80]} may be one prompt or several. Give a prompt without brackets (its commas are "
            "part of it, and --prompts may be repeated), a list with each prompt in quotes, "
            '["...", "..."], or a file'
        )
    return [item.value for item in items]


def _read_file(path: Path, images: Path | None) -> list[Prompt]:
    if not path.is_file():
        raise ValueError(f"{path}: no such file of prompts ({', '.join(_READERS)})")
    prompts = []
    for line, row in _READERS[path.suffix.lower()](read_text(path), path):
        origin = f"{path} line {line}"
        row = _without_caption(row, origin)
        if unknown := sorted(row.keys() - set(_COLUMNS)):
            raise ValueError(
                f"{origin}: unknown {', '.join(map(repr, unknown))}; the columns are {', '.join(_COLUMNS)}"
            )
        values = {key: value for key, value in row.items() if value is not None}
        if "prompt" not in values:
            raise ValueError(f"{origin} has no prompt")
        if "image" in values:
            values["image"] = _image_inside(images or path.parent, values["image"], origin)
        prompts.append(Prompt(**values, origin=origin))
    return prompts


def _without_caption(row: dict[str, Any], origin: str) -> dict[str, Any]:
    """A line of a file of prompts, made of one that has a caption of a data set in place of a prompt."""
    texts = [name for name in _TEXTS if name in row]
    paths = [name for name in ("file", "path") if row.get(name) is not None]
    for names in (texts, paths):
        if len(names) > 1:
            raise ValueError(f"{origin} has {' and '.join(names)}: leave all but one out")
    if texts in ([], ["prompt"]):
        return row
    left_out = {*texts, "file", "path", "weight"}
    prompt: dict[str, Any] = {key: value for key, value in row.items() if key not in left_out}
    if paths:
        # What else a data set says of its files is not of prompts, and is not read in training either.
        prompt = {key: value for key, value in prompt.items() if key in _COLUMNS}
        path = row[paths[0]]
        if not isinstance(path, str):
            raise ValueError(f"{origin}: {paths[0]} must be a text, got {path!r}")
        stem, ending = path.removeprefix("./"), PurePosixPath(path).suffix
        # What is made may have another ending.
        prompt["file"] = stem.removesuffix(ending) if _is_of_media(ending.lower()) else stem
    return {**prompt, "prompt": row[texts[0]]}


def _image_inside(folder: Path, name: Any, origin: str) -> Path:
    """The picture of a column, which may come from a stranger: it stays inside the folder."""
    if not isinstance(name, str):
        raise ValueError(f"{origin}: image must be a path, got {name!r}")
    path = Path(os.path.abspath(folder / name))
    if not path.is_relative_to(os.path.abspath(folder)):
        raise ValueError(
            f"{origin}: image {name!r} lies outside of {folder}: say which folder holds the images"
        )
    if not path.is_file():
        raise ValueError(f"{origin}: there is no image {name!r} in {folder}")
    return path


Rows = Iterator[tuple[int, dict[str, Any]]]


def _read_lines(text: str, path: Path) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _read_csv(text: str, path: Path) -> Rows:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, skipinitialspace=True)
    try:
        header = [_column(name) for name in reader.fieldnames or ()]
        if not {*header}.intersection(_TEXTS) or len(set(header)) < len(header):
            raise ValueError(
                f"{path} line 1 must be a header with a column prompt, caption or text, and each column "
                f"once; got {', '.join(reader.fieldnames or ()) or 'nothing'}"
            )
        reader.fieldnames = header
        for row in reader:
            place = f"{path} line {reader.line_num}"
            if None in row:
                raise ValueError(
                    f'{place} has more fields than the header: put texts with commas in quotes, "..."'
                )
            values: dict[str, Any] = {key: value or None for key, value in row.items()}
            if not any(values.values()):
                continue
            for name in _NUMBERS:
                if values.get(name):
                    values[name] = _whole_number(name, values[name], place)
            yield reader.line_num, values
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.reader.line_num} is no CSV ({error})") from error


def _whole_number(name: str, text: str, place: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{place}: {name} must be a whole number, got {text!r}") from None


def _read_jsonl(text: str, path: Path) -> Rows:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_once_each)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} line {number} is not valid JSON ({error})") from error
        if not isinstance(row, dict):
            raise ValueError(f'{path} line {number} must be an object, {{"prompt": "..."}}, got {line[:40]}')
        if len({_column(key) for key in row}) < len(row):
            raise ValueError(f"{path} line {number} has one column twice: {', '.join(row)}")
        yield number, {_column(key): value for key, value in row.items()}


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"one name twice among {', '.join(name for name, _ in pairs)}")
    return row


def _is_of_media(ending: str) -> bool:
    return ending in Image.registered_extensions() or ending in VIDEO_EXTENSIONS


def _column(name: str) -> str:
    """A column's name, however its words are joined."""
    name = name.strip().lower().replace(" ", "_")
    return "file" if name in ("file_name", "filename") else name


_READERS: dict[str, Callable[[str, Path], Rows]] = {
    ".txt": _read_lines,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
}
# Endings of files that prompts are not read from, and that no text of one word has.
_OTHER_TABLES = (".json", ".yaml", ".yml", ".tsv", ".parquet", ".xlsx", ".md")
_NUMBERS = ("seed", "height", "width")
_TEXTS = ("prompt", "caption", "text")
_COLUMNS = ("prompt", "seed", "negative_prompt", "file", "height", "width", "image")

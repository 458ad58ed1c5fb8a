"""Sets of images in Hugging Face datasets: on the hub, in folders that ``datasets`` saved, and in parquet."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ...files.arrays import file_kind, require_regular
from ...files.names import is_hidden
from ...optional import require
from .samples import Pixels, SampleKind, SampleSet

LABELS = ("label", "labels", "class")
_ENCODED = ("image", "img", "picture", "jpg", "jpeg", "png", "webp")


@dataclass
class DatasetImages(SampleSet):
    """Images of a dataset: its one column of images, or the one called ``image``, and ``label`` when there.

    Args:
        path: as it was asked for, in reports.
        kind: images.
        dataset: one split.
        places: folders out of which files may be read, where rows name files and do not hold them.

    Raises:
        ValueError: when it has no column of images, or several and none is called image.
    """

    dataset: Any
    places: tuple[Path, ...]

    def __post_init__(self) -> None:
        self.column = self._choose_column()
        images = require("datasets").Image(decode=False)
        self.dataset = self.dataset.cast_column(self.column, images)
        self.names = [f"{self.column}[{index}]" for index in range(len(self.dataset))]
        if not self.names:
            raise ValueError(f"{self.path} has no rows")
        for column in LABELS:
            if self.labels is None and column in self.dataset.features:
                self._take_labels(column)

    def _choose_column(self) -> str:
        features = self.dataset.features
        columns = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
        # Parquet that others than datasets wrote does not say which bytes are images.
        columns = columns or [name for name in _ENCODED if name in features and _is_bytes(features[name])]
        if not columns:
            raise ValueError(f"{self.path} has no column of images, only {', '.join(features)}")
        if len(columns) > 1 and "image" not in columns:
            raise ValueError(
                f"{self.path} has the columns of images {', '.join(columns)}: rename the one that is meant "
                "to image (dataset.rename_column), or leave out the others (dataset.remove_columns)"
            )
        if len(columns) > 1:
            self.notes.append(f"Of the columns of images {', '.join(columns)} the one called image is read.")
        return "image" if "image" in columns else columns[0]

    def _take_labels(self, column: str) -> None:
        feature, values = self.dataset.features[column], list(self.dataset[column])
        names = list(getattr(feature, "names", None) or ())
        unknown = sum(value is None or (bool(names) and value == -1) for value in values)
        if unknown:
            self.notes.append(
                f"{unknown:,} of {len(values):,} rows have no {column}, so classes are not used."
            )
        elif all(isinstance(value, int) for value in values):
            self.labels, self.class_names = values, dict(enumerate(names))
        elif all(isinstance(value, str) for value in values):
            self.class_names, self.ids_by_position = dict(enumerate(sorted(set(values)))), True
            ids = {name: index for index, name in self.class_names.items()}
            self.labels = [ids[value] for value in values]
        else:
            self.notes.append(
                f"The column {column} holds neither numbers nor names, so classes are not used."
            )

    def readers(self) -> Iterator[Callable[[], Pixels]]:
        for index in range(len(self.dataset)):
            yield partial(self._read, index)

    def _read(self, index: int) -> Pixels:
        encoded = self.dataset[index][self.column]
        if encoded is None:
            raise ValueError("the row has no image")
        if encoded["bytes"] is not None:
            return self.kind.read(io.BytesIO(encoded["bytes"]))
        path = Path(encoded["path"] or "")
        if not any(path.resolve().is_relative_to(place.resolve()) for place in self.places):
            raise ValueError(f"the row does not hold its image but names {path}, outside of the dataset")
        return self.kind.read(require_regular(path))


def open_dataset(path: str | Path, kind: SampleKind) -> DatasetImages | None:
    """Open a dataset, None when ``path`` is none.

    Raises:
        ValueError: when it cannot be loaded, or has several splits and none is chosen.
    """
    if str(path).startswith("hf://"):
        name, _, split = str(path).removeprefix("hf://").partition(":")
        return DatasetImages(str(path), kind, _from_hub(name, split or "train"), _hub_folders())
    path = Path(path)
    if (path / "dataset_dict.json").is_file():
        return open_dataset(_only_split(path), kind)
    if (path / "dataset_info.json").is_file():
        return DatasetImages(path, kind, _load(path, require("datasets").load_from_disk, str(path)), (path,))
    files = sorted(map(str, path.glob("*.parquet"))) if _holds_only_parquet(path) else []
    files = files or ([str(path)] if file_kind(path) == "parquet" else [])
    if not files:
        return None
    place = path if path.is_dir() else path.parent
    return DatasetImages(path, kind, _load(path, require("datasets").Dataset.from_parquet, files), (place,))


def _is_bytes(feature: Any) -> bool:
    return (isinstance(feature, dict) and "bytes" in feature) or "binary" in str(
        getattr(feature, "dtype", "")
    )


def _holds_only_parquet(path: Path) -> bool:
    visible = [entry for entry in path.iterdir() if not is_hidden(entry.name)] if path.is_dir() else []
    return bool(visible) and all(entry.suffix == ".parquet" for entry in visible)


def _only_split(path: Path) -> Path:
    splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
    if len(splits) != 1:
        raise ValueError(f"{path} has the splits {', '.join(splits)}: give one, such as {path / 'train'}")
    return path / splits[0]


def _load(path: Path, load: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return load(*arguments)
    except Exception as error:  # pyarrow and datasets raise errors of their own
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as a dataset: {reason}") from error


def _from_hub(name: str, split: str) -> Any:
    try:
        return require("datasets").load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise ValueError(f"the split {split} of the dataset {name} cannot be loaded: {error}") from error


def _hub_folders() -> tuple[Path, ...]:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(require("datasets").config.HF_DATASETS_CACHE), Path(HF_HUB_CACHE)

"""Pairs of pictures, before and after an edit, as clips of two frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...files.pictures import DECODING_ERRORS, EXTENSIONS, WHITE, background_color, read_picture
from ...files.videos import Frames, UnreadableVideoError
from .captions import Caption, read_captions
from .fingerprint import file_content, fingerprint
from .images import shape_of
from .shapes import Shape, read_shapes
from .videos import ClipSource


class PicturePairs:
    """Clips of a picture and its edit.

    Args:
        folder: with the pictures of each pair, of one name, in ``before`` and ``after``.
        edits: files in ``after``, and what each edit does.
        background: see :class:`PairsVideos`.
    """

    def __init__(
        self, folder: Path, edits: Sequence[tuple[Path, Caption]], *, background: str = WHITE
    ) -> None:
        self.folder, self.background = folder, background
        self.names = [str(file.relative_to(folder / "after")) for file, _ in edits]
        self.captions = [caption for _, caption in edits]

    def name(self, index: int) -> str:
        return str(self.folder / "after" / self.names[index])

    def read(self, index: int, *, length: int, fps: float | None, start: float) -> Frames:
        try:
            before, after = (
                np.asarray(read_picture(file, self.background).convert("RGB")) for file in self._files(index)
            )
        except DECODING_ERRORS as error:
            raise UnreadableVideoError(f"{self.name(index)} or its picture before: {error}") from error
        if before.shape != after.shape:
            sizes = " and ".join(f"{height} x {width}" for height, width, _ in (before.shape, after.shape))
            raise UnreadableVideoError(
                f"{self.name(index)}: the pictures before and after are of {sizes} pixels: make them of one "
                "size"
            )
        return np.stack([before, after])

    def fingerprint(self) -> str:
        return fingerprint(
            [*zip(self.names, self.captions, strict=True)],
            lambda index: b"".join(map(file_content, self._files(index))),
        )

    @property
    def paths(self) -> list[Path]:
        return [file for index in range(len(self.names)) for file in self._files(index)]

    def shapes(self) -> list[Shape]:
        files = [self._files(index)[1] for index in range(len(self.names))]
        return read_shapes(files, self._shape, self.folder / "pairs.shapes.json")

    def _shape(self, index: int) -> Shape:
        return shape_of(self._files(index)[1])

    def _files(self, index: int) -> list[Path]:
        return [self.folder / side / self.names[index] for side in ("before", "after")]


@dataclass(frozen=True)
class PairsVideos(ClipSource):
    """Pictures of one name in the folders before and after, clips of 2 frames; captions are those of after.

    Args:
        path, captions, background: see :class:`FolderVideos`.

    Raises:
        ValueError: for a value out of its range.
    """

    path: str
    captions: str | None = None
    background: str = WHITE

    def __post_init__(self) -> None:
        super().__post_init__()
        background_color(self.background)
        if self.frames != 2:
            raise ValueError(
                f"data.source pairs has clips of 2 frames: set data.frames to 2, got {self.frames}"
            )

    def open(self) -> PicturePairs:
        folder = Path(self.path)
        edits = read_captions(folder / "after", self.captions, extensions=EXTENSIONS)
        return PicturePairs(folder, edits, background=self.background)

"""Reading clips for training beside a plain loop."""

from __future__ import annotations

import os
import statistics
from pathlib import Path

from ..files.clips import choose_clip
from ..files.text import markdown_table
from ..files.videos import open_video
from ..timing import interleaved, spread
from .shared import check_at_least, percent


def loading(
    path: Path,
    frames: int = 16,
    size: tuple[int, int] = (240, 416),
    clips: int = 200,
    num_workers: int | None = None,
    repeats: int = 3,
) -> str:
    """Clips per second of the training data, resized and in batches, against a plain loop.

    The loop opens each file, takes the same frames, and does nothing else.

    Args:
        path: folder of videos with captions, see ``data.source folder`` of the trainer.
        frames, size: of the clips.
        clips: read in each run.
        num_workers: processes that read for the trainer; one for each core by default.
        repeats: interleaved runs, of which the median counts.

    Returns:
        A table in Markdown.

    Raises:
        ValueError: when there are no videos, or they are not as they should be.
        ImportError: without the ``train`` extra.
    """
    from ..training.data import VideoDataConfig, VideoSamples, open_videos
    from ..training.data.captions import read_captions
    from ..training.data.stream import BatchShare, SampleStream

    check_at_least(1, frames=frames, repeats=repeats)
    check_at_least(4, clips=clips)
    workers = os.cpu_count() or 1 if num_workers is None else num_workers
    config = VideoDataConfig("folder", path=str(path), frames=frames, sizes=(size,))
    source = VideoSamples(open_videos(config), config, channels=3)
    files = [file for file, _ in read_captions(path)]

    def trainer() -> None:
        stream = SampleStream(source, BatchShare(4), range(clips // 4), seed=0, num_workers=workers)
        assert sum(len(numbers) for numbers, _ in stream) == clips // 4 * 4

    def loop() -> None:
        for i in range(clips // 4 * 4):
            reader = open_video(files[i % len(files)])
            reader.read(choose_clip(reader, length=frames, start=(i * 0.618) % 1))

    rates = [
        [clips // 4 * 4 / seconds for seconds in times]
        for times in interleaved([trainer, loop], "cpu", repeats)
    ]
    lines = [
        ["reader", "clips per second", "spread"],
        [f"trainer, {workers} workers", f"{statistics.median(rates[0]):.1f}", percent(spread(rates[0]))],
        ["plain loop", f"{statistics.median(rates[1]):.1f}", percent(spread(rates[1]))],
    ]  # fmt: skip
    return markdown_table(lines)

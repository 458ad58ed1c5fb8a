"""Configs of data: which source, and its settings."""

from __future__ import annotations

# Each module's sources are in a config because it is imported here.
from . import image_sources, latents, pairs, toys, videos  # noqa: F401
from .image_sources import ImageSource
from .images import Images
from .sources import SourceConfig
from .videos import CaptionedVideos, VideoSource


class DataConfig(SourceConfig, kind=ImageSource):
    """Source of images, and its settings."""


class VideoDataConfig(SourceConfig, kind=VideoSource):
    """Source of clips, and its settings."""


def open_images(config: DataConfig, *, captioned: bool = False) -> Images:
    """Open the images that a config names, not yet decoded, of classes or with captions.

    Raises:
        ValueError: when they are not there or not of the form their source has.
    """
    opened = config.open(captioned=captioned)
    if not isinstance(opened, Images):
        raise ValueError("latents are not images: give the data.source that they were made from")
    return opened


def open_videos(config: VideoDataConfig) -> CaptionedVideos:
    """Open the videos that a config names, none of them read yet.

    Raises:
        ValueError: when they are not there, or the captions are not as they should be.
    """
    opened = config.open()
    if not isinstance(opened, CaptionedVideos):
        raise ValueError("latents are not videos: give the data.source that they were made from")
    return opened

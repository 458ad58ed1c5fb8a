"""Data of training: images, videos, captions, caches of latents, and the stream of samples."""

from __future__ import annotations

from .config import DataConfig, VideoDataConfig, open_images, open_videos
from .image_sources import ImageSource
from .images import ImageSamples
from .latents import CachedLatents
from .sources import Source, SourceConfig
from .toys import MovingDigitsConfig
from .videos import VideoSamples, VideoSource

__all__ = [
    "CachedLatents",
    "DataConfig",
    "ImageSamples",
    "ImageSource",
    "MovingDigitsConfig",
    "Source",
    "SourceConfig",
    "VideoDataConfig",
    "VideoSamples",
    "VideoSource",
    "open_images",
    "open_videos",
]

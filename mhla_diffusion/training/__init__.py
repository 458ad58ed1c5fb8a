"""Training on accelerate: one trainer, its objectives, and the data of images and videos."""

from .adapters import LoraConfig
from .config import changeable, parse_config, run_script
from .data import DataConfig, MovingDigitsConfig, VideoDataConfig
from .data.encoding import (
    LatentCacheConfig,
    VideoLatentCacheConfig,
    cache_latents,
    cache_video_latents,
)
from .image import ImageTrainingConfig, SamplingConfig, train_image
from .image_models import ModelConfig
from .objectives import DDPM, DistillationConfig, FlowMatching, Objective, ObjectiveConfig, build_objective
from .run import train
from .settings import OptimizerConfig, RunConfig, TrainerConfig
from .task import TrainingTask
from .text import TextConfig
from .trainer import Trainer
from .video import VideoModelConfig, VideoSamplingConfig, VideoTrainingConfig, train_video

__all__ = [
    "DDPM",
    "DataConfig",
    "DistillationConfig",
    "FlowMatching",
    "ImageTrainingConfig",
    "LatentCacheConfig",
    "LoraConfig",
    "ModelConfig",
    "MovingDigitsConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RunConfig",
    "SamplingConfig",
    "TextConfig",
    "Trainer",
    "TrainerConfig",
    "TrainingTask",
    "VideoDataConfig",
    "VideoLatentCacheConfig",
    "VideoModelConfig",
    "VideoSamplingConfig",
    "VideoTrainingConfig",
    "build_objective",
    "cache_latents",
    "cache_video_latents",
    "changeable",
    "parse_config",
    "run_script",
    "train",
    "train_image",
    "train_video",
]

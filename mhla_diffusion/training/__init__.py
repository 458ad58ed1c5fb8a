"""Training on accelerate: one trainer, its objectives, and the data of images."""

from .config import changeable, parse_config
from .data import DataConfig
from .image import ImageTrainingConfig, ModelConfig, SamplingConfig, train_image
from .latents import LatentCacheConfig, cache_latents
from .objectives import DDPM, FlowMatching, Objective, ObjectiveConfig, build_objective
from .trainer import OptimizerConfig, Trainer, TrainerConfig, TrainingTask

__all__ = [
    "DDPM",
    "DataConfig",
    "FlowMatching",
    "ImageTrainingConfig",
    "LatentCacheConfig",
    "ModelConfig",
    "Objective",
    "ObjectiveConfig",
    "OptimizerConfig",
    "SamplingConfig",
    "Trainer",
    "TrainerConfig",
    "TrainingTask",
    "build_objective",
    "cache_latents",
    "changeable",
    "parse_config",
    "train_image",
]

"""Objectives: what a diffusion model is trained to predict."""

from __future__ import annotations

import torch

from ...backbones.teacher import load_teacher
from .ddpm import DDPM
from .distillation import Distillation
from .flow import FlowMatching
from .objective import DistillationConfig, Objective, ObjectiveConfig

__all__ = [
    "DDPM",
    "Distillation",
    "DistillationConfig",
    "FlowMatching",
    "Objective",
    "ObjectiveConfig",
    "build_objective",
]


def build_objective(config: ObjectiveConfig) -> Objective:
    """Build the objective that a config names, and load its teacher.

    Raises:
        ValueError: for a teacher that has MHLA already.
    """
    objective = DDPM(config) if config.name == "ddpm" else FlowMatching(config)
    if config.teacher is None:
        return objective
    teacher = load_teacher(config.teacher, dtype=getattr(torch, config.distillation.teacher_dtype))
    return Distillation(objective, teacher, config.distillation, name=config.teacher)

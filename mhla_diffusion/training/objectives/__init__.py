"""Objectives: what a diffusion model is trained to predict."""

from __future__ import annotations

from .ddpm import DDPM
from .flow import FlowMatching
from .objective import Objective, ObjectiveConfig

__all__ = ["DDPM", "FlowMatching", "Objective", "ObjectiveConfig", "build_objective"]


def build_objective(config: ObjectiveConfig) -> Objective:
    """Build the objective that a config names."""
    return DDPM(config) if config.name == "ddpm" else FlowMatching(config)

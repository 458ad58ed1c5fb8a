"""A teacher of three softmax layers on small gray images, whose attention is far from uniform."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState

from mhla_diffusion import MHLAConfig, MHLADiTPipeline, MHLADiTTransformer2DModel
from mhla_diffusion.conversion import AlignConfig, NoiseCalls
from mhla_diffusion.training import ObjectiveConfig, build_objective
from tests.backbones.cases import randomize
from tests.training.conftest import image_folder  # noqa: F401 (a fixture)

FORMS = {
    "linear": MHLAConfig(blocks=1, feature_map="hedgehog"),
    "mhla": MHLAConfig.paper(blocks=4, feature_map="hedgehog", center_keys=True),
}
FEW = AlignConfig(
    samples=6,
    held_out=4,
    steps=20,
    batch_size=2,
    evaluate_every=10,
    learning_rate=2e-2,
    old_learning_rate=1e-2,
)


@pytest.fixture(autouse=True)
def _fresh_accelerator() -> Iterator[None]:
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def make_teacher(num_layers: int = 3, **settings: Any) -> Any:
    torch.manual_seed(0)
    model = MHLADiTTransformer2DModel(
        **{
            "num_layers": num_layers, "num_attention_heads": 2, "attention_head_dim": 8, "sample_size": 8,
            "patch_size": 2, "in_channels": 1, "num_embeds_ada_norm": 2, "attention": "softmax", **settings,
        }
    )  # fmt: skip
    randomize(model)
    return model.requires_grad_(False).eval()


@pytest.fixture
def teacher() -> Any:
    return make_teacher()


@pytest.fixture
def calls(teacher: Any) -> NoiseCalls:
    return NoiseCalls(teacher)


@pytest.fixture
def stored_teacher(teacher: Any, tmp_path: Path) -> Path:
    """The teacher in a pipeline of two classes."""
    scheduler = build_objective(ObjectiveConfig()).scheduler()
    pipeline = MHLADiTPipeline(teacher, scheduler, id2label={0: "cat", 1: "dog"})
    pipeline.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def write_run(tmp_path: Path, image_folder: Path) -> Callable[..., Path]:  # noqa: F811
    """Writes the YAML of a training run on the images of two classes."""

    def write(**settings: Any) -> Path:
        run = {
            "output_dir": str(tmp_path / "run"),
            "model": {"init_from": "student"},
            "data": {"source": "folder", "path": str(image_folder)},
            "trainer": {"max_steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2},
            **settings,
        }
        path = tmp_path / "run.yaml"
        path.write_text(yaml.safe_dump(run))
        return path

    return write

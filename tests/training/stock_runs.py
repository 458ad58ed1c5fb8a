"""Tiny runs of models that are trained for their own pipelines of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)

from mhla_diffusion.training import (
    DataConfig,
    ImageTrainingConfig,
    LatentCacheConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TextConfig,
    TrainerConfig,
    VideoDataConfig,
    VideoLatentCacheConfig,
    VideoModelConfig,
    VideoTrainingConfig,
    train_image,
    train_video,
)
from mhla_diffusion.training.data.shards import write_shards
from mhla_diffusion.training.stock import IMAGES, VIDEOS
from tests.backbones.cases import CASES
from tests.pipelines.test_diffusers_pipelines import NothingUnsafe
from tests.text_encoders import make_qwen_parts

KL: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (4,) * 4, "latent_channels": 3, "norm_num_groups": 2,
}  # fmt: skip
ALLEGRO: dict[str, Any] = {"block_out_channels": (4,) * 4, "latent_channels": 3, "norm_num_groups": 2}
WAN: dict[str, Any] = {
    "base_dim": 3, "z_dim": 3, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1,
    "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 3, "latents_std": [1.0] * 3,
}  # fmt: skip
LTX: dict[str, Any] = {
    "latent_channels": 3, "patch_size": 1, "block_out_channels": (4,) * 4, "layers_per_block": (1,) * 5,
    "decoder_block_out_channels": (4,) * 4, "decoder_layers_per_block": (1,) * 5,
    "spatio_temporal_scaling": (True, True, False, False),
    "decoder_spatio_temporal_scaling": (True, True, False, False),
    "spatial_compression_ratio": 32, "temporal_compression_ratio": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Trained:
    """A backbone and what it is trained with.

    Args:
        case: of the backbone.
        settings: of its model, beside those of the case, for text of width 16.
        vae: class of the autoencoder, and its arguments.
        latents: size of the latents, frames first.
        objective: of the run.
        call: arguments of the pipeline, beside the prompt.
        guard: components that it is opened with.
    """

    case: str
    settings: dict[str, Any]
    vae: tuple[type[Any], dict[str, Any]]
    latents: tuple[int, ...]
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    call: dict[str, Any] = field(default_factory=dict)
    guard: dict[str, Any] = field(default_factory=dict)

    @property
    def pipeline(self) -> str:
        return {**IMAGES, **VIDEOS}[CASES[self.case].model].pipeline


TRAINED = [
    Trained("LuminaNextDiT", {"cross_attention_dim": 16}, (AutoencoderKL, KL), (8, 16)),
    Trained("QwenImage", {"joint_attention_dim": 16}, (AutoencoderKLQwenImage, WAN), (8, 16)),
    Trained(
        "Allegro", {"caption_channels": 16}, (AutoencoderKLAllegro, ALLEGRO), (3, 8, 8),
        ObjectiveConfig(name="ddpm", learn_variance=False), {"num_frames": 12, "height": 64, "width": 64},
    ),
    Trained(
        "Cosmos", {"text_embed_dim": 16, "out_channels": 3}, (AutoencoderKLWan, WAN), (1, 8, 8),
        call={"height": 64, "width": 64}, guard={"safety_checker": NothingUnsafe()},
    ),
    Trained(
        "SkyReelsV2", {"text_dim": 16, "out_channels": 3}, (AutoencoderKLWan, WAN), (3, 8, 8),
        call={"num_frames": 9, "height": 64, "width": 64},
    ),
    Trained(
        "LTXVideo", {"caption_channels": 16}, (AutoencoderKLLTXVideo, LTX), (3, 8, 16),
        call={"num_frames": 17, "height": 256, "width": 512},
    ),
    Trained(
        "SanaVideo", {"caption_channels": 16}, (AutoencoderKLWan, WAN), (3, 8, 8),
        call={"frames": 9, "height": 64, "width": 64, "use_resolution_binning": False},
    ),
]  # fmt: skip
LATTE = Trained(
    "Latte", {"caption_channels": 16}, (AutoencoderKL, KL), (3, 8, 8), ObjectiveConfig(name="ddpm"),
    {"video_length": 3, "height": 64, "width": 64},
)  # fmt: skip
# One that makes images and one that makes videos.
BOTH_KINDS = [trained for trained in TRAINED if trained.case in ("QwenImage", "SanaVideo")]


def write_latents(trained: Trained, text: TextConfig, folder: Path, *, fps: float | None = None) -> str:
    """A cache of eight samples."""
    vae_class, arguments = trained.vae
    vae_class(**arguments).save_pretrained(folder / "vae")
    places: dict[str, Any] = {"output_dir": str(folder / "cache"), "vae": str(folder / "vae"), "text": text}
    config = (
        LatentCacheConfig(**places, data=DataConfig("folder", "x"))
        if len(trained.latents) == 2
        else VideoLatentCacheConfig(**places, data=VideoDataConfig("folder", "x", fps=fps))
    )
    generator = torch.Generator().manual_seed(0)
    write_shards(
        config, keep=("vae", "data", "text"), num_samples=8,
        make_rows=lambda rows: [
            {
                "latents": torch.randn(3, *trained.latents, generator=generator).half(),
                "text": torch.randn(3, 16, generator=generator),
            }
            for _ in rows
        ],
    )  # fmt: skip
    return places["output_dir"]


def prepare(trained: Trained, encoder: str, folder: Path) -> TextConfig:
    """Save the model to begin with, and return how captions are embedded."""
    if trained.case == "QwenImage":
        for part in make_qwen_parts().values():
            part.save_pretrained(encoder)
    CASES[trained.case].make(**trained.settings).save_pretrained(folder / "model")
    # To a tokenizer of characters captions are long, and so is the template of Qwen-Image around them.
    length = {"QwenImage": 256, "SanaVideo": 32}.get(trained.case, 8)
    return TextConfig(encoder, max_length=length, pipeline=trained.pipeline)


def trainer_of(trained: Trained) -> Callable[..., int]:
    return train_image if len(trained.latents) == 2 else train_video


def run_of(trained: Trained, text: TextConfig, folder: Path, **changes: Any) -> Any:
    """Two steps of self-attention alone."""
    path = folder / "cache"
    common: dict[str, Any] = {
        "text": text, "objective": trained.objective, "output_dir": str(folder / "run"),
        "trainer": TrainerConfig(
            batch_size=4, max_steps=2, log_every=1, optimizer=OptimizerConfig(learning_rate=0.01)
        ),
        "trainable": "attention",
    }  # fmt: skip
    init_from = str(folder / "model")
    if len(trained.latents) == 2:
        image = {"model": ModelConfig(init_from=init_from), "data": DataConfig("latents", str(path))}
        return ImageTrainingConfig(**{**common, **image, **changes})
    video = {"model": VideoModelConfig(init_from=init_from), "data": VideoDataConfig("latents", str(path))}
    return VideoTrainingConfig(**{**common, **video, **changes})

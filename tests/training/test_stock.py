"""Models that are trained for their own pipelines of diffusers."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLAllegro,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
)
from PIL import Image

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.backbones import BACKBONES
from mhla_diffusion.backbones.denoising import denoise
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.pipelines.generation import generate_videos
from mhla_diffusion.training import (
    DataConfig,
    ImageTrainingConfig,
    LatentCacheConfig,
    LoraConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    SamplingConfig,
    TextConfig,
    TrainerConfig,
    VideoDataConfig,
    VideoLatentCacheConfig,
    VideoModelConfig,
    VideoSamplingConfig,
    VideoTrainingConfig,
    build_objective,
    cache_latents,
    cache_video_latents,
    train_image,
    train_video,
)
from mhla_diffusion.training.data import MovingDigitsConfig
from mhla_diffusion.training.data.shards import write_shards
from mhla_diffusion.training.data.toys import ScenesConfig
from mhla_diffusion.training.image_models import BACKBONES as NEW_IMAGES
from mhla_diffusion.training.stock import IMAGES, UNTRAINED, VIDEOS
from mhla_diffusion.training.text import STOCK_PIPELINES, load_caption_encoders, make_stock_pipeline
from tests.backbones.cases import CASES
from tests.pipelines.test_diffusers_pipelines import NothingUnsafe
from tests.text_encoders import make_qwen_parts
from tests.weights import weights

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
# One that makes images and one that makes videos.
BOTH_KINDS = [trained for trained in TRAINED if trained.case in ("QwenImage", "SanaVideo")]
# Cosmos makes nothing without its guard, and the autoencoder of Allegro takes long.
SHOWN = [trained for trained in TRAINED if trained.case not in ("Cosmos", "Allegro")]


@pytest.fixture
def encoder(tmp_path: Path, text_parts: dict[str, Any]) -> str:
    for part in text_parts.values():
        part.save_pretrained(tmp_path / "text")
    return str(tmp_path / "text")


def write_latents(trained: Trained, text: TextConfig, folder: Path) -> str:
    """A cache of eight samples."""
    vae_class, arguments = trained.vae
    vae_class(**arguments).save_pretrained(folder / "vae")
    places: dict[str, Any] = {"output_dir": str(folder / "cache"), "vae": str(folder / "vae"), "text": text}
    config = (
        LatentCacheConfig(**places, data=DataConfig("folder", "x"))
        if len(trained.latents) == 2
        else VideoLatentCacheConfig(**places, data=VideoDataConfig("folder", "x"))
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
    common |= changes
    init_from = str(folder / "model")
    if len(trained.latents) == 2:
        data = DataConfig("latents", str(path))
        return ImageTrainingConfig(model=ModelConfig(init_from=init_from), data=data, **common)
    video = VideoDataConfig("latents", str(path))
    return VideoTrainingConfig(model=VideoModelConfig(init_from=init_from), data=video, **common)


def check_run(run: Any, folder: Path, name: str, **guard: Any) -> Any:
    """Check losses and weights of a finished run of self-attention, and return its pipeline."""
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    assert all(torch.tensor(json.loads(line)["loss"]).isfinite() for line in lines)
    before, after = weights(folder / "model"), weights(folder / "run")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert before.keys() == after.keys()
    layer = "attn" if name == "QwenImagePipeline" else "attn1"
    assert all(f".{layer}." in key for key in changed)
    wanted = [key for key in before if key.endswith((f"{layer}.to_v.weight", f"{layer}.processor.mixing"))]
    assert len(wanted) >= 4
    assert changed >= set(wanted)
    card = (folder / "run" / "pipeline" / "README.md").read_text()
    assert "| caption dropout | 0.1 |" in card
    assert "self-attention alone" in card
    assert re.search(r"\| size \| (\d+ frames of )?\d+ x \d+ pixels, latents \|", card)
    pipeline = MHLAPipeline.from_pretrained(folder / "run" / "pipeline", **guard)
    assert type(pipeline).__name__ == name
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def unpacked(tokens: torch.Tensor, latents: tuple[int, ...]) -> torch.Tensor:
    """Latents of tokens ``[B, N, C]``: of LTX one each, of Qwen-Image 2 x 2."""
    if len(latents) > 2:
        return tokens.mT.unflatten(2, latents)
    height, width = latents
    return torch.nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (height // 2, width // 2)), 2)


@torch.no_grad()
def check_call(model: Any, call: dict[str, Any], latents: tuple[int, ...]) -> None:
    """Compare a call of the pipeline with the one that training makes of the same samples, time and text."""
    first, last = model.time_of(0), model.time_of(1000)
    time = 1000 * (call["timestep"] - first) / (last - first)
    names = ("encoder_attention_mask", "encoder_mask", "encoder_hidden_states_mask")
    text = call["encoder_hidden_states"]
    masks = [
        torch.ones(text.shape[:2]) if call[name] is None else call[name] for name in names if name in call
    ]
    conditions = {"encoder_hidden_states": call["encoder_hidden_states"]}
    conditions |= {"encoder_attention_mask": masks[0]} if masks else {}
    given = call["hidden_states"]
    samples = given if given.ndim > 3 else unpacked(given, latents)
    output = model(**{**call, "return_dict": False})[0]
    expected = model.prediction(output, samples)
    assert expected.shape == samples.shape
    torch.testing.assert_close(denoise(model, samples, time, conditions), expected)
    assert not torch.allclose(denoise(model, samples, (time + 500) % 1000, conditions), expected)


@pytest.mark.parametrize("trained", TRAINED, ids=lambda trained: trained.case)
def test_a_backbone_is_trained_and_opens_as_its_own_pipeline(
    trained: Trained, encoder: str, tmp_path: Path
) -> None:
    text = prepare(trained, encoder, tmp_path)
    write_latents(trained, text, tmp_path)
    run = run_of(trained, text, tmp_path)
    assert trainer_of(trained)(run) == 0
    pipeline = check_run(run, tmp_path, trained.pipeline, **trained.guard)
    calls: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append(kwargs | ({"hidden_states": args[0]} if args else {})),
        with_kwargs=True,
        prepend=True,
    )
    made = pipeline(
        prompt="aa", num_inference_steps=1, output_type="latent", return_dict=False,
        **{"height": 64, "width": 128, **trained.call},
    )[0]  # fmt: skip
    check_call(pipeline.transformer, calls[-1], trained.latents)
    assert made.numel() == 3 * math.prod(trained.latents), "LTX packs them, and Cosmos has no frames"
    assert made.isfinite().all()


def sheet_of(trained: Trained, **settings: Any) -> Any:
    """A sheet of a prompt in one step; of images two beside each other."""
    common: dict[str, Any] = {"prompts": ("aa",), "num_inference_steps": 1, **settings}
    if len(trained.latents) == 2:
        return SamplingConfig(images_per_class=2, **common)
    return VideoSamplingConfig(**common)


def check_sheet(trained: Trained, path: Path) -> None:
    if len(trained.latents) == 2:
        assert Image.open(path.with_suffix(".png")).size == (2 * 128, 64)
    else:
        assert (
            open_video(path.with_suffix(".mp4")).num_frames == 9
        )  # also of LTX's, which decodes half of them


@pytest.mark.parametrize("trained", SHOWN, ids=lambda trained: trained.case)
def test_adapters_are_trained_and_shown_on_sheets_and_read_back_and_a_run_goes_on_to_the_bit(
    trained: Trained, encoder: str, tmp_path: Path
) -> None:
    text = prepare(trained, encoder, tmp_path)
    write_latents(trained, text, tmp_path)
    run = run_of(
        trained, text, tmp_path, lora=LoraConfig(rank=2), sampling=sheet_of(trained, every=2),
        trainer=TrainerConfig(
            batch_size=4, max_steps=2, checkpoint_every=1, log_every=1,
            optimizer=OptimizerConfig(learning_rate=0.01),
        ),
    )  # fmt: skip
    train = trainer_of(trained)
    assert train(run) == 0
    check_sheet(trained, tmp_path / "run" / "samples" / "step-00000002")
    again = dataclasses.replace(run, output_dir=str(tmp_path / "again"))
    assert train(again, resume=str(tmp_path / "run" / "checkpoints" / "step-00000001")) == 0
    whole, resumed = (weights(tmp_path / name) for name in ("run", "again"))
    before = weights(tmp_path / "model")
    assert all(torch.equal(whole[key], resumed[key]) for key in before)
    changed = {key for key in before if not torch.equal(before[key], whole[key])}
    assert any(f".{CASES[trained.case].model.attention_name}." not in key for key in changed)
    beside = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    beside.transformer.load_state_dict(before)

    def made(pipeline: Any) -> torch.Tensor:
        call = {"height": 64, "width": 128, **trained.call, "output_type": "latent", "return_dict": False}
        generator = torch.Generator().manual_seed(0)
        return pipeline(prompt="aa", num_inference_steps=1, generator=generator, **call)[0]

    untrained = made(beside)
    getattr(beside, "load_lora_weights", beside.transformer.load_lora_adapter)(tmp_path / "run" / "lora")
    merged = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    expected = made(merged)
    assert (made(beside) - expected).norm() < 1e-3 * (untrained - expected).norm()


def cache(trained: Trained, text: TextConfig, folder: Path) -> None:
    """Encode drawn scenes or moving digits, of the size of the latents."""
    vae_class, arguments = trained.vae
    vae_class(**arguments).save_pretrained(folder / "vae")
    places: dict[str, Any] = {"output_dir": str(folder / "cache"), "vae": str(folder / "vae"), "text": text}
    size = (8 * trained.latents[-2], 8 * trained.latents[-1])
    if len(trained.latents) == 2:
        scenes = ScenesConfig(num_images=4, side=max(size))
        cache_latents(LatentCacheConfig(**places, data=DataConfig("scene", sizes=(size,), scenes=scenes)))
        return
    digits = MovingDigitsConfig(digits=1, digit_size=12, num_clips=4)
    data = VideoDataConfig("moving_mnist", frames=9, sizes=(size,), moving_digits=digits)
    cache_video_latents(VideoLatentCacheConfig(**places, data=data))


@pytest.mark.parametrize("trained", BOTH_KINDS, ids=lambda trained: trained.case)
def test_all_weights_are_trained_on_what_is_cached_with_a_sheet_of_guided_samples(
    trained: Trained, encoder: str, tmp_path: Path
) -> None:
    text = prepare(trained, encoder, tmp_path)
    cache(trained, text, tmp_path)
    sampling = sheet_of(trained, every=2, guidance_scale=3.0)
    run = run_of(trained, text, tmp_path, trainable="all", sampling=sampling, caption_dropout=0.0)
    model, source, task = run.build(build_objective(run.objective))
    assert (len(source), source.channels, source.sizes) == (4, 3, [trained.latents])
    texts = [source.load(number, torch.Generator())["text"] for number in range(4)]
    assert not all(torch.equal(text, texts[0]) for text in texts[1:])
    assert trainer_of(trained)(run) == 0
    sheet = tmp_path / "run" / "samples" / "step-00000002"
    check_sheet(trained, sheet)
    before, after = (weights(tmp_path / name) for name in ("model", "run"))
    unchanged = {key for key in before if torch.equal(before[key], after[key])}
    # The last block of Qwen-Image makes a text that nothing reads.
    last = r"transformer_blocks\.1\.(attn\.(to_add_out|norm_added_q|add_q_proj)|txt_)"
    assert {key for key in unchanged if not re.match(last, key)} == set()
    model.load_state_dict(after)
    task.sampling = dataclasses.replace(sampling, guidance_scale=1.0)
    unguided = task.sample(model, torch.device("cpu")).picture()
    assert unguided.tobytes() != Image.open(sheet.with_suffix(".png")).tobytes()


@torch.no_grad()
def test_captions_are_embedded_as_the_pipeline_embeds_prompts_and_the_empty_one_as_no_prompt(
    encoder: str,
) -> None:
    """That of SanaVideo has an instruction before prompts, and none before the negative one."""
    config = TextConfig(encoder, max_length=8, pipeline="SanaVideoPipeline")
    assert config.prefix.startswith("Given a user prompt")
    captions = load_caption_encoders(config)[0]
    pipeline = make_stock_pipeline(
        "SanaVideoPipeline", tokenizer=captions.tokenizer, text_encoder=captions.text_encoder
    )
    call = inspect.signature(pipeline.__call__).parameters
    text, mask, empty, empty_mask = pipeline.encode_prompt(
        "a dog motion score: 30.", max_sequence_length=8, device=torch.device("cpu"),
        complex_human_instruction=call["complex_human_instruction"].default,
    )  # fmt: skip
    found, shown = captions.fill_up([captions("a dog motion score: 30."), captions("")])
    assert torch.equal(shown, torch.cat([mask, empty_mask]))
    torch.testing.assert_close(found, torch.cat([text * mask[..., None], empty * empty_mask[..., None]]))
    dog = captions("a dog").values
    assert not torch.allclose(dog, pipeline.encode_prompt("a dog", False)[0][0, : len(dog)])


def test_clips_of_a_size_that_the_pipeline_does_not_make_are_refused(encoder: str, tmp_path: Path) -> None:
    sana = next(trained for trained in TRAINED if trained.case == "SanaVideo")
    sana = dataclasses.replace(sana, latents=(3, 8, 6))
    text = prepare(sana, encoder, tmp_path)
    write_latents(sana, text, tmp_path)
    run = run_of(sana, text, tmp_path)
    with pytest.raises(ValueError, match=r"heights and widths of multiples of 32, .* are of 64 x 48 pixels"):
        run.build(build_objective(run.objective))


def test_latte_is_trained_on_frames_that_the_autoencoder_of_images_encodes(
    encoder: str, tmp_path: Path
) -> None:
    latte = Trained(
        "Latte", {"caption_channels": 16}, (AutoencoderKL, KL), (3, 8, 8), ObjectiveConfig(name="ddpm")
    )
    text = prepare(latte, encoder, tmp_path)
    settings = {
        **KL, "block_out_channels": (4, 8), "in_channels": 1, "out_channels": 1, "scaling_factor": 0.5,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    }  # fmt: skip
    vae = AutoencoderKL(**settings).eval()
    vae.save_pretrained(tmp_path / "vae")
    digits = MovingDigitsConfig(digits=1, digit_size=12, num_clips=4)
    data = VideoDataConfig("moving_mnist", frames=3, sizes=((16, 16),), moving_digits=digits)
    cache_video_latents(
        VideoLatentCacheConfig(
            output_dir=str(tmp_path / "cache"), vae=str(tmp_path / "vae"), data=data, text=text
        )
    )
    sampling = VideoSamplingConfig(every=2, prompts=("aa",), num_inference_steps=1, guidance_scale=1.0)
    run = run_of(latte, text, tmp_path, sampling=sampling)
    _, source, _ = run.build(build_objective(run.objective))
    assert (source.channels, source.sizes) == (3, [(3, 8, 8)])
    assert train_video(run) == 0
    assert open_video(tmp_path / "run" / "samples" / "step-00000002.mp4").num_frames == 3
    pipeline = check_run(run, tmp_path, "LattePipeline")
    size = {"num_frames": 3, "height": 16, "width": 16}
    generate_videos(pipeline, tmp_path / "out", prompts=["aa"], num_inference_steps=1, **size)
    assert open_video(tmp_path / "out" / "000000.mp4").num_frames == 3


def test_every_backbone_is_trained_or_what_is_missing_is_said() -> None:
    trained = {*NEW_IMAGES.values(), *IMAGES, *VIDEOS, CASES["Wan"].model}
    assert trained | set(UNTRAINED) == set(BACKBONES.values())
    assert not trained & set(UNTRAINED)
    assert [training.pipeline for training in (*IMAGES.values(), *VIDEOS.values())] == [*STOCK_PIPELINES]
    page = " ".join((Path(__file__).parents[2] / "docs" / "backbones.md").read_text().split())
    for model, missing in UNTRAINED.items():
        assert f"`{model.__name__}`" in page.partition("## Training")[2], missing


@pytest.mark.parametrize("name", ["WanAnimate", "AnyFlow"])
def test_a_backbone_that_is_not_trained_is_refused_with_what_is_missing(name: str, tmp_path: Path) -> None:
    model = CASES[name].make()
    model.save_pretrained(tmp_path)
    missing = UNTRAINED[type(model)].split(",")[0]
    with pytest.raises(ValueError, match=rf"holds a {type(model).__name__} \({missing}.* but videos are"):
        _ = VideoModelConfig(init_from=str(tmp_path)).model_class
    with pytest.raises(ValueError, match=rf"\({missing}.* but images are trained with"):
        _ = ModelConfig(init_from=str(tmp_path)).model_class


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": ""}, "as AllegroPipeline embeds them: set text.pipeline to AllegroPipeline, here and"),
        ({"objective": ObjectiveConfig()}, "denoises by steps of ddpm: set objective.name to ddpm"),
        ({"objective": ObjectiveConfig(name="ddpm")}, "set objective.learn_variance to false"),
        ({"source": "moving_mnist"}, "trained on latents of texts: make them with mhla cache-latents"),
        ({"images": True}, "sampling.images: the model is given no such picture"),
    ],
)  # fmt: skip
def test_runs_that_do_not_fit_the_pipeline_are_refused(
    change: dict[str, Any], message: str, encoder: str, tmp_path: Path
) -> None:
    allegro = next(trained for trained in TRAINED if trained.case == "Allegro")
    CASES["Allegro"].make(**allegro.settings).save_pretrained(tmp_path / "model")
    text = TextConfig(encoder, max_length=8, pipeline=change.get("text", allegro.pipeline))
    write_latents(allegro, text, tmp_path)
    changes = {name: value for name, value in change.items() if name == "objective"}
    if change.get("images"):
        picture = tmp_path / "model" / "config.json"
        changes["sampling"] = VideoSamplingConfig(every=1, prompts=("aa",), images=(str(picture),))
    run = run_of(allegro, text, tmp_path, **changes)
    if "source" in change:
        object.__setattr__(run, "data", VideoDataConfig(change["source"], frames=3, sizes=((32, 32),)))
    with pytest.raises(ValueError, match=message):
        run.build(build_objective(run.objective))


def test_text_pipelines_are_those_that_models_are_trained_for() -> None:
    with pytest.raises(ValueError, match=r"text.pipeline must be one of .*, got 'FluxPipeline'"):
        TextConfig("x", pipeline="FluxPipeline")
    with pytest.raises(ValueError, match="LuminaPipeline has its own instruction before captions, or none"):
        TextConfig("x", pipeline="LuminaPipeline", instruction="sana")

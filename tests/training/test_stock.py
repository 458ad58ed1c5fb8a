"""Models that are trained for their own pipelines of diffusers."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLAllegro,
)
from PIL import Image

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.backbones import BACKBONES
from mhla_diffusion.backbones.denoising import denoise
from mhla_diffusion.files.manifest import read_manifest
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.pipelines.generation import generate_videos
from mhla_diffusion.pipelines.sampling import guidance_name
from mhla_diffusion.training import (
    DataConfig,
    LatentCacheConfig,
    LoraConfig,
    OptimizerConfig,
    SamplingConfig,
    TextConfig,
    TrainerConfig,
    VideoDataConfig,
    VideoLatentCacheConfig,
    VideoSamplingConfig,
    build_objective,
    cache_latents,
    cache_video_latents,
    train_video,
)
from mhla_diffusion.training.conditioning import Captions
from mhla_diffusion.training.data import MovingDigitsConfig
from mhla_diffusion.training.data.toys import ScenesConfig
from mhla_diffusion.training.image_models import NEW_IMAGES
from mhla_diffusion.training.stock import IMAGES, UNTRAINED, VIDEOS
from mhla_diffusion.training.text import STOCK_PIPELINES, load_caption_encoders, make_stock_pipeline
from tests.backbones.cases import CASES
from tests.training.stock_runs import (
    BOTH_KINDS,
    KL,
    LATTE,
    TRAINED,
    Trained,
    prepare,
    run_of,
    trainer_of,
    write_latents,
)
from tests.weights import weights


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
        return
    frames = {"Allegro": 12, "Latte": 3}.get(trained.case, 9)  # of LTX too, which decodes half of them
    assert open_video(path.with_suffix(".mp4")).num_frames == frames


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Autoencoders of Allegro with tiles of 12 frames of 64 x 64 pixels, as theirs take long."""
    init = AutoencoderKLAllegro.__init__

    @functools.wraps(init)
    def small(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.kernel, self.stride = (12, 64, 64), (8, 32, 32)

    monkeypatch.setattr(AutoencoderKLAllegro, "__init__", small)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("trained", [*TRAINED, LATTE], ids=lambda trained: trained.case)
def test_adapters_are_trained_and_shown_on_sheets_and_read_back_and_a_run_goes_on_to_the_bit(
    trained: Trained, encoder: str, tmp_path: Path
) -> None:
    text = prepare(trained, encoder, tmp_path)
    write_latents(trained, text, tmp_path)
    shown = not trained.guard  # without its guard it makes nothing
    run = run_of(
        trained, text, tmp_path, lora=LoraConfig(rank=2), sampling=sheet_of(trained, every=2 * shown),
        trainer=TrainerConfig(
            batch_size=4, max_steps=2, checkpoint_every=1, log_every=1,
            optimizer=OptimizerConfig(learning_rate=0.01),
        ),
    )  # fmt: skip
    train = trainer_of(trained)
    assert train(run) == 0
    if shown:
        check_sheet(trained, tmp_path / "run" / "samples" / "step-00000002")
    again = dataclasses.replace(run, output_dir=str(tmp_path / "again"))
    assert train(again, resume=str(tmp_path / "run" / "checkpoints" / "step-00000001")) == 0
    whole, resumed = (weights(tmp_path / name) for name in ("run", "again"))
    before = weights(tmp_path / "model")
    assert all(torch.equal(whole[key], resumed[key]) for key in before)
    changed = {key for key in before if not torch.equal(before[key], whole[key])}
    assert any(f".{CASES[trained.case].model.attention_name}." not in key for key in changed)
    check_adapters(trained, before, tmp_path / "run")


def check_adapters(trained: Trained, before: dict[str, torch.Tensor], run: Path) -> None:
    """Compare the pipeline of a run with the model before it beside the adapters."""
    beside, merged = (MHLAPipeline.from_pretrained(run / "pipeline", **trained.guard) for _ in range(2))
    beside.transformer.load_state_dict(before)

    def made(pipeline: Any) -> torch.Tensor:
        call = {"height": 64, "width": 128, **trained.call, "output_type": "latent", "return_dict": False}
        generator = torch.Generator().manual_seed(0)
        steps = 2 if trained.case == "Cosmos" else 1  # whose first step adds nothing
        return pipeline(prompt="aa", num_inference_steps=steps, generator=generator, **call)[0]

    untrained, expected = made(beside), made(merged)
    getattr(beside, "load_lora_weights", beside.transformer.load_lora_adapter)(run / "lora")
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


@torch.no_grad()
@pytest.mark.parametrize("caption", ["(b) #1", ""])
@pytest.mark.parametrize("trained", [*TRAINED, LATTE], ids=lambda trained: trained.case)
def test_the_model_is_given_texts_as_the_pipeline_gives_them_for_one_prompt(
    trained: Trained, caption: str, encoder: str, tmp_path: Path
) -> None:
    """Of a caption that some pipelines would clean, and of the text that guidance leads away from."""
    text = prepare(trained, encoder, tmp_path)
    write_latents(trained, text, tmp_path)
    run = run_of(trained, text, tmp_path)
    model, _, task = run.build(build_objective(run.objective))
    pipeline = task.pipeline(transformer=model, training=None)
    pipeline.register_modules(**trained.guard)
    calls: list[dict[str, Any]] = []
    model.register_forward_pre_hook(lambda model, args, kwargs: calls.append(kwargs), with_kwargs=True)
    pipeline(
        prompt=caption, negative_prompt="", num_inference_steps=1, output_type="latent",
        **{guidance_name(pipeline): 4.0}, **task.call,
    )  # fmt: skip
    shown = [row for call in calls for row in texts_of_call(call)]
    conditioning = task.conditioning
    (captions,) = conditioning.encoders
    embedded = captions(caption)
    batch = {"text": embedded.values[None], "tokens": torch.tensor([embedded.tokens])}
    samples = torch.zeros(1, 3, *trained.latents)
    told = conditioning.arguments({**batch, "samples": samples}, [torch.Generator().manual_seed(0)])
    dropped = Captions(conditioning.encoders, 0.999, embedded=True, masked=conditioning.masked)
    empty = dropped.arguments(batch, [torch.Generator().manual_seed(0)])
    without = conditioning.unconditional(told)
    for conditions in (told, empty, without):
        (given,) = texts_of_call(model.denoising_arguments(samples, torch.tensor([500.0]), conditions))
        assert any(row.shape == given.shape and torch.allclose(row, given, atol=1e-5) for row in shown)
    assert torch.equal(told["encoder_hidden_states"], empty["encoder_hidden_states"]) is not bool(caption)


def texts_of_call(call: dict[str, Any]) -> list[torch.Tensor]:
    """Embeddings that a call of a model lets it see, ``[n, D]`` of each row."""
    text = call["encoder_hidden_states"].flatten(0, -3)  # Allegro has an axis more
    names = ("encoder_attention_mask", "encoder_mask", "encoder_hidden_states_mask")
    mask = next((call[name] for name in names if call.get(name) is not None), None)
    if mask is None:
        return list(text)
    return [row[seen.bool()] for row, seen in zip(text, mask, strict=True)]


def test_the_rate_of_the_clips_is_that_of_training_of_sheets_and_of_what_is_generated(
    encoder: str, tmp_path: Path
) -> None:
    trained = next(its for its in TRAINED if its.case == "LTXVideo")
    text = prepare(trained, encoder, tmp_path)
    write_latents(trained, text, tmp_path, fps=8)
    run = run_of(trained, text, tmp_path)
    model, _, task = run.build(build_objective(run.objective))
    assert task.call["frame_rate"] == 8
    samples = torch.zeros(2, 3, *trained.latents)
    batch = {"samples": samples, "text": torch.zeros(2, 8, 16), "tokens": torch.tensor([8, 8])}
    told = task.conditioning.arguments(batch, [torch.Generator() for _ in samples])
    scale = model.denoising_arguments(samples, torch.tensor([500.0] * 2), told)["rope_interpolation_scale"]
    assert [float(number) for number in scale] == [8 / 8, 32, 32]
    assert train_video(run) == 0
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    scales: list[tuple[float, ...]] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: scales.append(kwargs["rope_interpolation_scale"]), with_kwargs=True
    )
    more: dict[str, Any] = {"prompts": ["aa"], "num_inference_steps": 1}
    for fps, rate in ((None, 8), (6.0, 6)):
        generate_videos(pipeline, tmp_path / str(fps), fps=fps, **more)
        assert read_manifest(tmp_path / str(fps))["fps"] == rate
    assert {tuple(map(float, its)) for its in scales} == {(1, 32, 32)}
    generate_videos(pipeline, tmp_path / "other", options={"frame_rate": 16}, **more)
    assert read_manifest(tmp_path / "other")["fps"] == 16
    assert float(scales[-1][0]) == 8 / 16


def test_latte_is_trained_on_frames_that_the_autoencoder_of_images_encodes(
    encoder: str, tmp_path: Path
) -> None:
    text = prepare(LATTE, encoder, tmp_path)
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
    run = run_of(LATTE, text, tmp_path, sampling=sampling)
    _, source, _ = run.build(build_objective(run.objective))
    assert (source.channels, source.sizes) == (3, [(3, 8, 8)])
    assert train_video(run) == 0
    assert open_video(tmp_path / "run" / "samples" / "step-00000002.mp4").num_frames == 3
    pipeline = check_run(run, tmp_path, "LattePipeline")
    size = {"num_frames": 3, "height": 16, "width": 16}
    rows: list[int] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: rows.append(len(kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    generate_videos(pipeline, tmp_path / "out", prompts=["aa", "aab"], num_inference_steps=1, **size)
    assert rows == [2, 2], "a text and the one that guidance leads away from, as texts have no mask"
    assert open_video(tmp_path / "out" / "000001.mp4").num_frames == 3


def test_every_backbone_is_trained_or_what_is_missing_is_said() -> None:
    trained = {*NEW_IMAGES.values(), *IMAGES, *VIDEOS, CASES["Wan"].model}
    assert trained | set(UNTRAINED) == set(BACKBONES.values())
    assert not trained & set(UNTRAINED)
    assert [training.pipeline for training in (*IMAGES.values(), *VIDEOS.values())] == [*STOCK_PIPELINES]
    page = " ".join((Path(__file__).parents[2] / "docs" / "backbones.md").read_text().split())
    for model, missing in UNTRAINED.items():
        assert f"`{model.__name__}`" in page.partition("## Training")[2], missing


def test_every_such_backbone_is_among_these_or_has_a_module_of_its_own() -> None:
    here = {CASES[trained.case].model for trained in (*TRAINED, LATTE)}
    # test_two_encoders, test_kandinsky5, data/test_clip_conditions and data/test_pairs
    elsewhere = {CASES[name].model for name in ("HunyuanDiT", "Kandinsky5", "WanVACE", "ChronoEdit")}
    assert here | elsewhere == {*IMAGES, *VIDEOS}
    assert not here & elsewhere


def test_lumina_is_told_the_size_that_its_softmax_is_scaled_by() -> None:
    model = CASES["LuminaNextDiT"].make(attention="softmax")
    text = {"encoder_hidden_states": torch.zeros(1, 4, 16), "encoder_attention_mask": torch.ones(1, 4)}
    given = model.denoising_arguments(torch.zeros(1, 3, 8, 16), torch.ones(1), text)
    # As its pipeline has it: a token is 16 pixels wide, a latent 8.
    side = model.config.sample_size * 8 // 16
    assert given["cross_attention_kwargs"]["base_sequence_length"] == side**2

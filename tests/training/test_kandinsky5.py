"""Kandinsky 5, which reads a text by its tokens and by one vector, and knows no mask of the tokens."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline
from torch.utils.data import default_collate

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.backbones.denoising import denoise
from mhla_diffusion.backbones.teacher import as_teacher
from mhla_diffusion.conversion import DataCalls
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.pipelines.generation import generate_videos
from mhla_diffusion.training import (
    LoraConfig,
    OptimizerConfig,
    TextConfig,
    TrainerConfig,
    VideoDataConfig,
    VideoLatentCacheConfig,
    VideoModelConfig,
    VideoSamplingConfig,
    VideoTrainingConfig,
    build_objective,
    cache_video_latents,
    train_video,
)
from mhla_diffusion.training.adapters import set_trainable
from mhla_diffusion.training.config import write_config
from mhla_diffusion.training.data import CachedLatents, MovingDigitsConfig
from mhla_diffusion.training.export import open_checkpoint
from mhla_diffusion.training.text import load_caption_encoders, make_stock_pipeline
from tests.backbones.cases import CASES, randomize
from tests.processes import run_script
from tests.text_encoders import make_kandinsky_parts
from tests.weights import weights

NAME = "Kandinsky5T2VPipeline"
# The template before prompts is of 600 letters more than the 128 tokens that the pipeline leaves out.
LENGTH = 700
VAE: dict[str, Any] = {
    "latent_channels": 3, "block_out_channels": (4,) * 4, "layers_per_block": 1, "norm_num_groups": 2,
    "mid_block_add_attention": False,
}  # fmt: skip


SHAPE: dict[str, Any] = {"in_text_dim": 16, "in_text_dim2": 16, "visual_cond": True}


def kandinsky_pipeline(transformer: Any) -> Kandinsky5T2VPipeline:
    """Kandinsky 5 of random parts around a transformer of :data:`SHAPE`."""
    return make_stock_pipeline(
        NAME, **make_kandinsky_parts(), vae=AutoencoderKLHunyuanVideo(**VAE).eval(), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline to begin with, and a cache of clips with captions."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("kandinsky")
    transformer = CASES["Kandinsky5"].make(**SHAPE)
    randomize(transformer)  # as a new one hardly looks at texts
    kandinsky_pipeline(transformer).save_pretrained(folder / "base")
    digits = MovingDigitsConfig(digits=1, digit_size=12, num_clips=4)
    data = VideoDataConfig("moving_mnist", frames=5, sizes=((32, 48),), moving_digits=digits)
    cache_video_latents(
        VideoLatentCacheConfig(
            output_dir=str(folder / "cache"), vae=str(folder / "base"), data=data, text=text_of(folder)
        )
    )
    return folder


def text_of(folder: Path) -> TextConfig:
    return TextConfig(str(folder / "base"), max_length=LENGTH, pipeline=NAME)


def run_of(folder: Path, output_dir: Path, **changes: Any) -> VideoTrainingConfig:
    settings: dict[str, Any] = {
        "model": VideoModelConfig(init_from=str(folder / "base")), "text": text_of(folder),
        "data": VideoDataConfig("latents", str(folder / "cache")), "output_dir": str(output_dir),
        "trainer": TrainerConfig(
            batch_size=2, max_steps=2, checkpoint_every=1, optimizer=OptimizerConfig(learning_rate=0.01)
        ),
        "sampling": VideoSamplingConfig(every=2, prompts=("it",), num_inference_steps=1),
    }  # fmt: skip
    return VideoTrainingConfig(**{**settings, **changes})


def test_forms_are_made_for_the_grid_of_its_clips(base: Path, tmp_path: Path) -> None:
    """Channels of what it is given are last, and there are more of them than of its clips."""
    calls = DataCalls(as_teacher(CASES["Kandinsky5"].stock(**SHAPE)), run_of(base, tmp_path / "run"))
    samples, *_ = calls.sample(0)
    assert samples.shape == (1, 3, 2, 4, 6)
    assert calls.grid == (2, 2, 3)


@pytest.mark.parametrize(
    "trained", [{"trainable": "all"}, {"trainable": "attention"}, {"lora": LoraConfig(rank=2)}], ids=str
)
def test_it_is_trained_and_goes_on_to_the_bit(trained: dict[str, Any], base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path / "run", **trained)
    assert train_video(run) == 0
    assert open_video(tmp_path / "run" / "samples" / "step-00000002.mp4").num_frames == 5
    again = dataclasses.replace(run, output_dir=str(tmp_path / "again"))
    assert train_video(again, resume=str(tmp_path / "run" / "checkpoints" / "step-00000001")) == 0
    before = weights(base / "base")
    whole, resumed = (weights(tmp_path / name) for name in ("run", "again"))
    assert all(torch.equal(whole[key], resumed[key]) for key in before)
    changed = {key for key in before if not torch.equal(before[key], whole[key])}
    layers = {key for key in before if ".self_attention." in key}
    assert {key for key in layers if key.endswith(("to_value.weight", "processor.mixing"))} <= changed
    if trained.get("trainable") == "attention":
        assert changed <= layers
    else:
        assert {"pooled_text_embeddings.in_layer.weight", "text_embeddings.in_layer.weight"} <= changed
    assert (tmp_path / "run" / "lora").is_dir() == ("lora" in trained)


def test_two_processes_that_call_it_for_each_sample_give_the_losses_of_one(
    base: Path, tmp_path: Path
) -> None:
    trainer = TrainerConfig(batch_size=4, max_steps=2, log_every=1)
    run = run_of(base, tmp_path / "one", trainer=trainer, sampling=VideoSamplingConfig(every=0))
    assert train_video(run) == 0
    write_config(run, tmp_path / "run.yaml")
    arguments = ("--config", tmp_path / "run.yaml", "--output_dir", str(tmp_path / "two"))
    result = run_script("train_video", *arguments, num_processes=2, stderr_to_stdout=True)
    assert result.returncode == 0, result.stdout
    assert "2 processes share the work" in result.stdout
    one, two = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert two == pytest.approx(one, rel=1e-4)
    assert len(one) == 2


def test_what_is_left_makes_videos_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path / "run", sampling=VideoSamplingConfig(every=0))
    assert train_video(run) == 0
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipeline) is Kandinsky5T2VPipeline
    pipeline.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []
    model = pipeline.transformer
    model.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append(dict(kwargs)), with_kwargs=True, prepend=True
    )
    made = pipeline(
        "it", height=32, width=48, num_frames=5, num_inference_steps=2, guidance_scale=1.0,
        max_sequence_length=LENGTH, output_type="np",
    ).frames  # fmt: skip
    assert made.shape == (1, 5, 32, 48, 3)
    call = calls[0]
    samples = call["hidden_states"][..., :3].movedim(-1, 1)
    text, pooled = call["encoder_hidden_states"], call["pooled_projections"]
    conditions = {
        "encoder_hidden_states": torch.nn.functional.pad(text, (0, 0, 0, 20)),
        "encoder_attention_mask": (torch.arange(text.shape[1] + 20) < text.shape[1]).long()[None],
        "encoder_hidden_states_2": pooled[:, None], "encoder_attention_mask_2": torch.ones(1, 1),
    }  # fmt: skip
    with torch.no_grad():
        expected = model(**{**call, "return_dict": False}).movedim(-1, 1)
        torch.testing.assert_close(denoise(model, samples, call["timestep"], conditions), expected)
        conditions["encoder_hidden_states_2"] = pooled[:, None] + 1
        assert not torch.allclose(denoise(model, samples, call["timestep"], conditions), expected)


def test_videos_of_a_checkpoint_are_those_of_the_pipeline_in_bfloat16_too(base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path / "run", sampling=VideoSamplingConfig(every=0))
    assert train_video(run) == 0
    finished = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline", dtype=torch.bfloat16)
    opened = open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002", dtype=torch.bfloat16)
    for name, part in finished.components.items():
        for key, weight in part.state_dict().items() if isinstance(part, torch.nn.Module) else ():
            same = getattr(opened, name).state_dict()[key]
            assert same.dtype == weight.dtype
            assert torch.equal(same, weight)
    assert {weight.dtype for weight in opened.transformer.parameters()} == {torch.float32, torch.bfloat16}
    videos = []
    for name, pipeline in (("finished", finished), ("opened", opened)):
        generate_videos(pipeline, tmp_path / name, prompts=["it"], num_inference_steps=1)
        reader = open_video(tmp_path / name / "000000.mp4")
        videos.append(reader.read(range(5)))
    assert videos[0].shape[:3] == (5, 32, 48)
    assert (videos[0] == videos[1]).all()


def test_a_length_that_the_template_takes_whole_is_refused(base: Path) -> None:
    with pytest.raises(ValueError, match=r"text.max_length 64 leaves no room for captions, as .* puts 5\d\d"):
        load_caption_encoders(dataclasses.replace(text_of(base), max_length=64))


@torch.no_grad()
def test_captions_are_embedded_as_the_pipeline_embeds_prompts(base: Path) -> None:
    pipeline = Kandinsky5T2VPipeline.from_pretrained(base / "base", transformer=None)
    tokens, vector = load_caption_encoders(text_of(base))
    for caption in ("a dog", ""):
        expected, pooled, _ = pipeline.encode_prompt(
            caption, device=torch.device("cpu"), max_sequence_length=LENGTH
        )
        torch.testing.assert_close(tokens(caption).values, expected[0])
        torch.testing.assert_close(vector(caption).values, pooled)
    assert tokens.max_length - tokens.room == tokens("").tokens > 500, "what stands around a caption"
    assert (vector.max_length, vector.room) == (1, 77)


def test_the_loss_depends_on_both_texts_and_on_no_other_sample(base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path, caption_dropout=0.0)
    objective = build_objective(run.objective)
    model, source, task = run.build(objective)
    batch = default_collate([source.load(number, torch.Generator()) for number in range(3)])
    batch["tokens"] -= torch.arange(3)  # of several lengths

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(3)]

    def loss(rows: slice = slice(None), **changes: torch.Tensor) -> torch.Tensor:
        its = {name: value[rows] for name, value in {**batch, **changes}.items()}
        arguments = task.conditioning.arguments(its, generators()[rows])
        return objective.loss(model, its["samples"], arguments, generators()[rows])

    expected = loss()
    for number in range(3):
        torch.testing.assert_close(loss(slice(number, number + 1))[0], expected[number])
    assert (loss(text=batch["text"].flip(-1)) - expected).abs().min() > 1e-4
    assert (loss(text_2=batch["text_2"].flip(-1)) - expected).abs().min() > 1e-4
    beyond = batch["text"].clone()
    for row, length in enumerate(batch["tokens"].tolist()):
        beyond[row, length:] += 1
    assert torch.equal(loss(text=beyond), expected)
    with pytest.raises(ValueError, match="of MHLAKandinsky5Transformer3DModel have one length, got"):
        model.denoising_arguments(
            batch["samples"], torch.ones(3), task.conditioning.arguments(batch, generators())
        )
    set_trainable(model, "all", LoraConfig(rank=2))
    loss().mean().backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {name for name, weight in model.named_parameters() if weight.grad is not None}


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_embeddings_of_another_encoder_or_length_are_refused(part: str, base: Path, tmp_path: Path) -> None:
    other = make_kandinsky_parts(seed=1)
    pipeline = Kandinsky5T2VPipeline.from_pretrained(base / "base", **{part: other[part]})
    pipeline.save_pretrained(tmp_path / "other")
    texts = (
        ({"encoder": str(tmp_path / "other")}, rf"by the {part} \(.*\) that lay in .*base, and .*other has"),
        ({"max_length": LENGTH + 1}, r"this run embeds them: with text\.max_length 700, not 701\. Set text"),
    )
    for change, message in texts:
        run = run_of(base, tmp_path / "run", text=dataclasses.replace(text_of(base), **change))
        with pytest.raises(ValueError, match=message):
            run.build(build_objective(run.objective))


def test_clips_are_cached_as_the_pipeline_decodes_them(base: Path) -> None:
    latents = CachedLatents(base / "cache")
    assert (latents.channels, latents.sizes) == (3, [(2, 4, 6)])
    row = latents.load(0, torch.Generator())
    assert row["text_2"].shape == (1, 16)
    assert row["samples"].isfinite().all()


def test_adapters_beside_the_model_that_was_trained_from_are_what_was_trained(
    base: Path, tmp_path: Path
) -> None:
    run = run_of(base, tmp_path / "run", lora=LoraConfig(rank=2), sampling=VideoSamplingConfig(every=0))
    assert train_video(run) == 0
    beside, merged = (
        MHLAPipeline.from_pretrained(path) for path in (base / "base", tmp_path / "run" / "pipeline")
    )
    call = {
        "prompt": "it", "height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 1,
        "guidance_scale": 1.0, "max_sequence_length": LENGTH, "output_type": "latent", "return_dict": False,
    }  # fmt: skip

    def made(pipeline: Any) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**call, generator=torch.Generator().manual_seed(0))[0]

    untrained, expected = made(beside), made(merged)
    beside.load_lora_weights(tmp_path / "run" / "lora")
    assert (made(beside) - expected).norm() < 1e-3 * (untrained - expected).norm()

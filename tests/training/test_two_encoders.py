"""HunyuanDiT: a model that reads a text by two encoders, trained on what both make of it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, HunyuanDiTPipeline
from PIL import Image

from mhla_diffusion import MHLAPipeline
from mhla_diffusion.backbones.denoising import denoise
from mhla_diffusion.commands import generate
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
    build_objective,
    cache_latents,
    train_image,
)
from mhla_diffusion.training.adapters import set_trainable
from mhla_diffusion.training.data import CachedLatents
from mhla_diffusion.training.objectives import DDPM
from mhla_diffusion.training.stock import _require_schedule
from mhla_diffusion.training.text import load_caption_encoders, make_stock_pipeline
from tests.backbones.cases import CASES, randomize
from tests.text_encoders import make_hunyuan_parts
from tests.training.stock_runs import KL
from tests.weights import weights

NAME = "HunyuanDiTPipeline"
SHAPE = {"cross_attention_dim": 16, "cross_attention_dim_t5": 24, "text_len": 77, "text_len_t5": 256}
OBJECTIVE = ObjectiveConfig(
    name="ddpm", prediction_type="v_prediction", beta_schedule="scaled_linear", beta_start=0.00085,
    beta_end=0.018,
)  # fmt: skip


def hunyuan_pipeline(transformer: Any) -> HunyuanDiTPipeline:
    """HunyuanDiT of random parts around a transformer of :data:`SHAPE`."""
    schedule = {name: getattr(OBJECTIVE, name) for name in ("beta_schedule", "beta_start", "beta_end")}
    scheduler = DDPMScheduler(**schedule, prediction_type="v_prediction")
    return make_stock_pipeline(
        NAME, **make_hunyuan_parts(), vae=AutoencoderKL(**KL).eval(), transformer=transformer,
        scheduler=scheduler,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipeline to begin with, pictures with captions, and a cache of them."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hunyuan")
    transformer = CASES["HunyuanDiT"].make(**SHAPE)
    randomize(transformer)  # as a new one hardly looks at texts
    hunyuan_pipeline(transformer).save_pretrained(folder / "base")
    (folder / "pictures").mkdir()
    for name in "abcdef":
        pixels = torch.randint(256, (80, 96, 3), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "pictures" / f"{name}.png")
        lines = [f"a picture called {name}", "it"][: 1 + (name == "f")]
        (folder / "pictures" / f"{name}.txt").write_text("\n".join(lines))
    cache_latents(cache_config(folder))
    return folder


def text_of(folder: Path) -> TextConfig:
    return TextConfig(str(folder / "base"), max_length=77, pipeline=NAME)


def cache_config(folder: Path) -> LatentCacheConfig:
    data = DataConfig("folder", str(folder / "pictures"), sizes=((64, 96),))
    return LatentCacheConfig(
        output_dir=str(folder / "cache"), vae=str(folder / "base"), data=data, text=text_of(folder)
    )


def run_of(folder: Path, output_dir: Path, **changes: Any) -> ImageTrainingConfig:
    settings: dict[str, Any] = {
        "model": ModelConfig(init_from=str(folder / "base")), "text": text_of(folder),
        "data": DataConfig("latents", str(folder / "cache")), "objective": OBJECTIVE,
        "trainer": TrainerConfig(
            batch_size=4, max_steps=2, checkpoint_every=1, optimizer=OptimizerConfig(learning_rate=0.01)
        ),
        "sampling": SamplingConfig(every=2, prompts=("it",), images_per_class=2, num_inference_steps=1),
        "output_dir": str(output_dir),
    }  # fmt: skip
    return ImageTrainingConfig(**{**settings, **changes})


@torch.no_grad()
def check_call(model: Any, call: dict[str, Any]) -> None:
    """Compare a call of the pipeline with the one that training makes of the same samples, time and texts."""
    samples, time = call["hidden_states"], call["timestep"].long()
    conditions = {
        "encoder_hidden_states": call["encoder_hidden_states"],
        "encoder_attention_mask": call["text_embedding_mask"],
        "encoder_hidden_states_2": call["encoder_hidden_states_t5"],
        "encoder_attention_mask_2": call["text_embedding_mask_t5"],
    }
    expected = model(**{**call, "return_dict": False})[0]
    assert expected.shape[1] == 2 * samples.shape[1], "with a variance"
    torch.testing.assert_close(denoise(model, samples, time, conditions), expected)


@pytest.mark.parametrize(
    "trained", [{"trainable": "all"}, {"trainable": "attention"}, {"lora": LoraConfig(rank=2)}], ids=str
)
def test_it_is_trained_goes_on_to_the_bit_and_leaves_its_pipeline(
    trained: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    run = run_of(base, tmp_path / "run", **trained)
    assert train_image(run) == 0
    assert Image.open(tmp_path / "run" / "samples" / "step-00000002.png").size == (192, 64)
    again = dataclasses.replace(run, output_dir=str(tmp_path / "again"))
    assert train_image(again, resume=str(tmp_path / "run" / "checkpoints" / "step-00000001")) == 0
    assert (tmp_path / "run" / "lora").is_dir() == ("lora" in trained)
    before = weights(base / "base")
    whole, resumed = (weights(tmp_path / name) for name in ("run", "again"))
    assert before.keys() == whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in before)
    changed = {key for key in before if not torch.equal(before[key], whole[key])}
    if trained.get("trainable") == "attention":
        assert all(".attn1." in key for key in changed)
    elif trained.get("trainable") == "all":
        assert before.keys() - changed == set()
    else:
        assert {"proj_out.weight", "text_embedder.linear_1.weight"} <= changed
    assert {key for key in before if key.endswith(("attn1.to_v.weight", "processor.mixing"))} <= changed


def test_what_is_left_makes_pictures_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path / "run", sampling=SamplingConfig(every=0))
    assert train_image(run) == 0
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    assert type(pipeline) is HunyuanDiTPipeline
    assert type(pipeline.text_encoder_2).__name__ == "T5EncoderModel"
    assert pipeline.scheduler.config.beta_schedule == "scaled_linear"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    pipeline.set_progress_bar_config(disable=True)
    calls: list[dict[str, Any]] = []
    names = ("hidden_states", "timestep")
    pipeline.transformer.register_forward_pre_hook(
        lambda model, args, kwargs: calls.append({**dict(zip(names, args, strict=False)), **kwargs}),
        with_kwargs=True,
        prepend=True,
    )
    made = pipeline(
        "it", height=64, width=96, num_inference_steps=2, use_resolution_binning=False, output_type="np"
    ).images
    assert made.shape == (1, 64, 96, 3)
    check_call(pipeline.transformer, calls[0])


def test_pictures_are_generated_in_the_size_of_the_training_and_as_the_card_says(
    base: Path, tmp_path: Path
) -> None:
    run = run_of(base, tmp_path / "run", sampling=SamplingConfig(every=0, num_inference_steps=1))
    assert train_image(run) == 0
    card = (tmp_path / "run" / "pipeline" / "README.md").read_text()
    example = re.search(r"images = (pipe\(.*\))\.images", card)
    assert example is not None
    pipe = MHLAPipeline.from_pretrained(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    made = [eval(example[1], {"pipe": pipe}).images[0]]
    for name in ("run/pipeline", "run"):  # the finished pipeline, and a checkpoint
        if name == "run":
            shutil.rmtree(tmp_path / "run" / "pipeline")
        out = tmp_path / f"made-{len(made)}"
        generate.image(str(tmp_path / name), str(out), prompts=["it"], steps=1)
        made.append(Image.open(out / "000000.png"))
        manifest = json.loads((out / "manifest.json").read_text())
        assert manifest["training"]["steps"] == "2 of batch size 4"
    assert [picture.size for picture in made] == [(96, 64)] * 3
    assert made[1].tobytes() == made[2].tobytes()
    generate.image(
        str(tmp_path / "run"), str(tmp_path / "tall"), prompts=["it"], steps=1, height=96, width=64
    )
    assert Image.open(tmp_path / "tall" / "000000.png").size == (64, 96)


@torch.no_grad()
def test_captions_are_embedded_as_the_pipeline_embeds_prompts(base: Path) -> None:
    pipeline = HunyuanDiTPipeline.from_pretrained(base / "base", transformer=None)
    latents = CachedLatents(base / "cache")
    row = latents.load(0, torch.Generator())
    for number, suffix in enumerate(("", "_2")):
        length = (77, 256)[number]
        expected, _, mask, _ = pipeline.encode_prompt(
            "a picture called a", torch.device("cpu"), do_classifier_free_guidance=False,
            max_sequence_length=length, text_encoder_index=number,
        )  # fmt: skip
        assert row[f"tokens{suffix}"] == int(mask.sum()) < length
        shown = mask.bool()[0] if number == 0 else slice(None)  # of the second the model pools all
        torch.testing.assert_close(row[f"text{suffix}"][shown], expected[0][shown])
    assert not row["text"][row["tokens"] :].any()
    encoders = load_caption_encoders(text_of(base))
    found: set[tuple[bool, bool]] = set()
    for seed in range(20):
        row = latents.load(5, torch.Generator().manual_seed(seed))
        found.add(
            tuple(
                torch.equal(row[f"text{encoder.suffix}"], encoder.fill_up([encoder("it")])[0][0])
                for encoder in encoders
            )  # type: ignore[arg-type]
        )
    assert found == {(True, True), (False, False)}, "one caption for both encoders"


def test_the_loss_depends_on_both_texts_and_on_what_fills_up_the_second(base: Path, tmp_path: Path) -> None:
    run = run_of(base, tmp_path)
    objective = build_objective(run.objective)
    model, source, task = run.build(objective)
    rows = [source.load(number, torch.Generator()) for number in range(2)]
    batch = {
        name: torch.stack([torch.as_tensor(row[name]) for row in rows])
        for name in ("samples", "text", "tokens", "text_2", "tokens_2")
    }

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in (1, 2)]

    def loss(**changes: torch.Tensor) -> torch.Tensor:
        arguments = task.conditioning.arguments({**batch, **changes}, generators())
        return objective.loss(model, batch["samples"], arguments, generators())

    def changed(name: str, tokens: slice) -> torch.Tensor:
        text = batch[name].clone()
        text[:, tokens] = text[:, tokens].flip(-1)
        return text

    expected, shown, beyond = loss(), slice(0, 8), slice(-8, None)
    assert torch.equal(loss(), expected)
    assert (loss(text=changed("text", shown)) - expected).abs().min() > 1e-3
    assert (loss(text_2=changed("text_2", shown)) - expected).abs().min() > 1e-3
    assert (loss(text_2=changed("text_2", beyond)) - expected).abs().min() > 1e-3, "which the model pools"
    beside = batch["text"].clone()
    beside[:, beyond] += 1
    assert torch.equal(loss(text=beside), expected), "the model has its own filling there"
    empty = task.conditioning.unconditional(task.conditioning.arguments(batch, generators()))
    for encoder in load_caption_encoders(text_of(base)):
        text, mask = encoder.fill_up([encoder("")] * 2)
        assert torch.equal(empty[f"encoder_hidden_states{encoder.suffix}"], text)
        assert torch.equal(empty[f"encoder_attention_mask{encoder.suffix}"], mask)
    set_trainable(model, "all", LoraConfig(rank=2))
    loss().mean().backward()
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == reached, "as several processes need it"


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "tokenizer_2"])
def test_embeddings_of_another_encoder_are_refused(part: str, base: Path, tmp_path: Path) -> None:
    other = make_hunyuan_parts(seed=1)
    if part == "tokenizer_2":
        other[part].add_tokens("picture")
    pipeline = HunyuanDiTPipeline.from_pretrained(base / "base", **{part: other[part]})
    pipeline.save_pretrained(tmp_path / "other")
    text = dataclasses.replace(text_of(base), encoder=str(tmp_path / "other"))
    run = run_of(base, tmp_path / "run", text=text)
    said = rf"by the {part} \({type(other[part]).__name__}\) that lay in .*base, and .*other has another"
    with pytest.raises(ValueError, match=said) as error:
        run.build(build_objective(run.objective))
    assert not re.search("TextConfig|[0-9a-f]{20}", str(error.value))


def test_the_same_encoders_elsewhere_are_taken(base: Path, tmp_path: Path) -> None:
    HunyuanDiTPipeline.from_pretrained(base / "base").save_pretrained(tmp_path / "other")
    text = dataclasses.replace(text_of(base), encoder=str(tmp_path / "other"))
    run = run_of(base, tmp_path / "run", text=text)
    run.build(build_objective(run.objective))


def test_what_does_not_fit_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"HunyuanDiTPipeline embeds 77 tokens .*: set text.max_length to 77"
    ):
        TextConfig(str(base / "base"), pipeline=NAME)
    for part in ("tokenizer", "text_encoder"):
        make_hunyuan_parts()[part].save_pretrained(tmp_path / "alone")
    alone = dataclasses.replace(text_of(base), encoder=str(tmp_path / "alone"))
    with pytest.raises(ValueError, match=r"reads texts by 2 encoders, but .*alone has no text_encoder_2"):
        load_caption_encoders(alone)
    for change, message in (
        ({"text_len_t5": 128}, r"takes text of length 128, but text.encoder's text_encoder_2 gives 256"),
        (
            {"cross_attention_dim_t5": 16},
            r"takes text of width 16, but text.encoder's text_encoder_2 gives 24",
        ),
        ({"cross_attention_dim": 24}, r"takes text of width 24, but text.encoder gives 16"),
        ({"learn_sigma": False}, r"returns 3 channels, but this objective needs 6"),
    ):
        CASES["HunyuanDiT"].make(**{**SHAPE, **change}).save_pretrained(tmp_path / "model")
        run = run_of(base, tmp_path / "run", model=ModelConfig(init_from=str(tmp_path / "model")))
        with pytest.raises(ValueError, match=message):
            run.build(build_objective(run.objective))


@pytest.mark.parametrize(
    ("name", "value", "stored"),
    [
        ("beta_end", 0.03, "0.018"),
        ("beta_schedule", "linear", "'scaled_linear'"),
        ("prediction_type", "epsilon", "'v_prediction'"),
    ],
)
def test_noise_of_another_schedule_than_the_pipelines_is_refused(
    name: str, value: Any, stored: str, base: Path, tmp_path: Path
) -> None:
    objective = dataclasses.replace(OBJECTIVE, **{name: value})
    run = run_of(base, tmp_path / "run", objective=objective)
    with pytest.raises(ValueError, match=rf"was trained with the {name} {stored}.*: set objective.{name} to"):
        run.build(build_objective(objective))


def test_a_stored_schedule_that_leaves_keys_to_defaults_is_gone_on_with(tmp_path: Path) -> None:
    objective = ObjectiveConfig(name="ddpm")
    schedule = {"_class_name": "DDIMScheduler", "beta_schedule": DDPM(objective).schedule["beta_schedule"]}
    (tmp_path / "scheduler").mkdir()
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
    index = {"_class_name": "LattePipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    _require_schedule(objective, str(tmp_path))
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(
        json.dumps({**schedule, "beta_schedule": "scaled_linear"})
    )
    with pytest.raises(ValueError, match="scaled_linear"):
        _require_schedule(objective, str(tmp_path))

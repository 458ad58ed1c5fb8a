"""Every backbone is aligned and put together; videos go through all stages; processes share the layers."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import yaml
from torch.utils._pytree import tree_leaves

from mhla_diffusion import MHLAConfig, MHLAWanTransformer3DModel, convert_to_mhla
from mhla_diffusion.backbones.teacher import as_teacher, attention_layers, layer_calls, predict
from mhla_diffusion.conversion import (
    DataCalls,
    LinearizeConfig,
    NoiseCalls,
    ReportConfig,
    SampledCalls,
    align,
    default_candidates,
    linearize,
    open_calls,
)
from mhla_diffusion.conversion.cache import Activations, CacheConfig, write_activations
from mhla_diffusion.conversion.choose import assemble
from mhla_diffusion.conversion.trial import prediction_error
from mhla_diffusion.planning import plan
from mhla_diffusion.training import (
    DistillationConfig,
    ImageTrainingConfig,
    ObjectiveConfig,
    build_objective,
    parse_config,
)
from mhla_diffusion.training.data.shards import Shards
from mhla_diffusion.training.objectives import Distillation
from tests.backbones.cases import CASES, Case, randomize
from tests.faults.test_processes import join
from tests.training.conftest import encoder  # noqa: F401 (a fixture)
from tests.training.stock_runs import LATTE, TRAINED, Trained, prepare, run_of, write_latents
from tests.training.test_video import MODEL
from tests.training.test_video import settings as video_settings  # noqa: F401 (a fixture)

from .conftest import FEW, FORMS, make_teacher

ONE_STEP = dataclasses.replace(FEW, samples=2, held_out=1, steps=2, batch_size=1, evaluate_every=1)


class Texts(NoiseCalls):
    """Texts of several lengths, filled up to one, as data has them."""

    def inputs(self, number: int) -> dict[str, Any]:
        found = super().inputs(number)
        tokens = found["encoder_hidden_states"].shape[1]
        mask = torch.arange(tokens)[None] < (4, tokens, tokens // 2)[number % 3]
        found["encoder_hidden_states_mask"] = mask
        return found


def test_a_layer_is_replayed_with_the_text_of_each_sample() -> None:
    teacher = as_teacher(CASES["QwenImage"].stock())
    calls, names = Texts(teacher, grid=CASES["QwenImage"].grids[0]), list(attention_layers(teacher))
    first, *others = (layer_calls(teacher, calls(number), names) for number in range(3))
    for its in (first, *others):
        for name in names:
            found = first[name].replay(teacher.get_submodule(name), its[name].inputs)
            torch.testing.assert_close(found, its[name].outputs)
    shown = [int(its[names[0]].outputs.any(-1).sum()) for its in (first, *others)]
    assert shown[0] < shown[2] < shown[1], "what fills a text up counts nowhere"


def test_frames_that_attend_apart_are_kept_in_turn(tmp_path: Path) -> None:
    teacher = as_teacher(CASES["Latte"].stock())
    calls, names = NoiseCalls(teacher, grid=CASES["Latte"].grids[0]), list(attention_layers(teacher))
    write_activations(teacher, calls, CacheConfig(str(tmp_path / "kept"), "t", calls.facts, tuple(names), 4))
    kept = Activations(Shards(tmp_path / "kept"), names[0])
    for number in range(4):
        its = layer_calls(teacher, calls(number), names)[names[0]].inputs
        assert len(its) > 1
        torch.testing.assert_close(kept.read([number])[0][0], its[number % len(its)], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_backbone_is_aligned_and_assembled(case: Case, tmp_path: Path) -> None:
    teacher = as_teacher(case.stock())
    calls = NoiseCalls(teacher, grid=case.grids[0])
    forms = {"mhla": MHLAConfig(blocks=case.blocks, feature_map="hedgehog", local="gate")}
    record = align(teacher, calls, tmp_path, candidates=forms, config=ONE_STEP)
    assert set(record["jobs"]["mhla"]) == set(attention_layers(teacher))
    student = assemble(teacher, ["mhla", "stock"], record, tmp_path)
    assert student.layer_attention == ["mhla", case.stock_kind]
    assert prediction_error(teacher, student, calls, [0]) > 0
    unchanged = assemble(teacher, ["stock", "stock"], record, tmp_path)
    assert prediction_error(teacher, unchanged, calls, [0]) < 1e-6


@pytest.mark.parametrize(
    ("name", "objective_name"),
    [
        ("Latte", "ddpm"), ("LuminaNextDiT", "flow"), ("HunyuanDiT", "ddpm"), ("Cosmos", "flow"),
        ("Kandinsky5", "flow"),
    ],
)  # fmt: skip
def test_newer_backbones_are_aligned_and_then_distilled(
    name: str, objective_name: Literal["flow", "ddpm"], tmp_path: Path
) -> None:
    case = CASES[name]
    # Cosmos is given a mask of conditions as one channel more.
    teacher = as_teacher(case.stock(**({"out_channels": 3} if name == "Cosmos" else {})))
    calls = NoiseCalls(teacher, grid=case.grids[0])
    forms = {"mhla": MHLAConfig(blocks=case.blocks, feature_map="hedgehog", center_keys=True)}
    record = align(teacher, calls, tmp_path, candidates=forms, config=ONE_STEP)
    student = (
        copy.deepcopy(assemble(teacher, ["mhla", "mhla"], record, tmp_path)).requires_grad_(True).train()
    )
    conditions = case.inputs(teacher)
    samples, _ = conditions.pop("hidden_states"), conditions.pop("timestep")
    if name == "LuminaNextDiT":
        conditions["encoder_attention_mask"] = conditions.pop("encoder_mask")
    if name == "Kandinsky5":  # whose channels are last, and samples' first
        samples = samples.movedim(-1, 1)
    objective = build_objective(ObjectiveConfig(name=objective_name))
    config = DistillationConfig(data=0.0, prediction=1.0, every=1, fade_steps=100)
    distillation = Distillation(objective, teacher, config)
    distillation.check(student)
    times, noise = objective.time_at(torch.tensor([0.3, 0.7])), torch.randn_like(samples)
    ask = functools.partial(distillation.loss_at, times=times, noise=noise)
    assert ask(teacher, samples, conditions).abs().max() < 1e-9, "of the teacher itself"
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-5)
    losses = []
    for _ in range(4):
        loss = ask(student, samples, conditions).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], losses


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_backbone_is_asked_with_samples_of_its_own(case: Case) -> None:
    teacher = as_teacher(case.stock())
    noise = NoiseCalls(teacher, grid=case.grids[0])(7)
    given, predicted = noise["hidden_states"], predict(teacher, noise)
    of_variance = predicted.numel() == 2 * given.numel()
    objective = ObjectiveConfig(name="ddpm" if of_variance else "flow")
    make = functools.partial(SampledCalls, teacher, grid=case.grids[0], steps=2, objective=objective)
    if case.name == "LuminaNextDiT":
        with pytest.raises(ValueError, match="LuminaNextDiT2DModel counts its time from noise to data"):
            make()
        return
    if not of_variance and predicted.shape != given.shape:
        with pytest.raises(ValueError, match="for models that are given pictures, give data"):
            make()(7)
        return
    own = make()(7)
    assert own.keys() == noise.keys()
    assert teacher.time_of(700) <= float(own["timestep"].flatten()[0]) < teacher.time_of(800)
    assert predict(teacher, own).isfinite().all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_calls_go_where_the_model_is_and_in_its_dtype(case: Case) -> None:
    teacher = as_teacher(case.stock()).to("meta", torch.bfloat16)
    call = NoiseCalls(teacher, grid=case.grids[0])(0)
    assert call["hidden_states"].dtype == torch.bfloat16
    assert {part.device.type for part in tree_leaves(call) if isinstance(part, torch.Tensor)} == {"meta"}
    times = [] if case.model.time_in_dtype else [call["timestep"]]
    kept = tree_leaves([times, call.get("image_rotary_emb", ())])
    assert torch.bfloat16 not in {part.dtype for part in kept}


def test_steps_end_no_later_than_they_begin_and_lumina_counts_from_noise() -> None:
    any_flow = NoiseCalls(as_teacher(CASES["AnyFlow"].stock()), grid=(3, 4, 4))
    for number in range(10):
        call = any_flow(number)
        assert (call["r_timestep"] <= call["timestep"]).all()
    lumina = NoiseCalls(as_teacher(CASES["LuminaNextDiT"].stock()), grid=(4, 4))
    assert 0.2 < float(lumina(7)["timestep"]) <= 0.3


def test_a_prediction_has_all_of_its_batch() -> None:
    case = CASES["Kandinsky5"]
    teacher = as_teacher(case.stock())
    inputs = case.inputs(teacher)
    assert predict(teacher, inputs).shape == inputs["hidden_states"].shape


def test_a_video_model_goes_through_all_stages(
    video_settings: dict[str, Any],  # noqa: F811
    text_parts: dict[str, Any],
    tmp_path: Path,
) -> None:
    model = {key: value for key, value in MODEL.items() if key != "mhla"}
    text_dim = text_parts["text_encoder"].config.hidden_size
    teacher = MHLAWanTransformer3DModel(
        **{**model, "patch_size": (2, 4, 4)}, out_channels=1, text_dim=text_dim, sample_grid=(2, 6, 6),
        attention="softmax",
    )  # fmt: skip
    randomize(teacher)
    teacher.save_pretrained(tmp_path / "teacher")
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({**video_settings, "output_dir": "unused"}))
    config = LinearizeConfig(budget=0.9, align=ONE_STEP, steps=1, batch_size=2, report=ReportConfig(calls=1))
    size = plan(str(tmp_path / "teacher"), 24, 24, frames=5, vae_stride=1)
    forms = {"mhla": MHLAConfig.paper(blocks=(1, 2, 2))}
    out = tmp_path / "out"
    assert linearize(str(tmp_path / "teacher"), str(run), out, size, config=config, candidates=forms) == 0
    content = json.loads((out / "report" / "report.json").read_text())
    assert [model["stage"] for model in content["models"]] == ["teacher", "plain", "aligned", "distilled"]
    assert (out / "report" / "report.html").read_text().count("data:image/webp;base64,") == 4, "clips play"


@pytest.mark.parametrize("trained", [*TRAINED, LATTE], ids=lambda trained: trained.case)
def test_forms_are_made_for_the_grid_of_the_data(
    trained: Trained,
    encoder: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    """Whatever the model is given of its samples: packed, frames first, or a picture each."""
    text = prepare(trained, encoder, tmp_path)
    write_latents(trained, text, tmp_path)
    teacher = as_teacher(CASES[trained.case].stock(**trained.settings))
    calls = DataCalls(teacher, run_of(trained, text, tmp_path))
    layers = list(attention_layers(teacher))
    tokens = {call.hidden_states.shape[1] for call in layer_calls(teacher, calls(0), layers).values()}
    assert tokens == {math.prod(calls.grid)}
    patch = teacher.latents_per_token
    assert [n * size for n, size in zip(calls.grid, patch, strict=True)] == [*trained.latents[-len(patch) :]]
    record = align(teacher, calls, tmp_path / "aligned", config=ONE_STEP)
    assert record["candidates"].keys() == default_candidates(calls.grid).keys()


def align_shared(rank: int, out: str) -> None:
    join(rank)
    teacher = make_teacher()
    align(teacher, NoiseCalls(teacher), out, candidates=FORMS, config=ONE_STEP)


def test_processes_share_the_layers(
    teacher: Any, calls: NoiseCalls, run_processes: Callable[..., None], tmp_path: Path
) -> None:
    run_processes(align_shared, 2, str(tmp_path / "two"))
    one = align(teacher, calls, tmp_path / "one", candidates=FORMS, config=ONE_STEP)
    two = align(teacher, calls, tmp_path / "two", candidates=FORMS, config=ONE_STEP)
    for form in FORMS:
        for layer, job in one["jobs"][form].items():
            assert two["jobs"][form][layer]["error"] == pytest.approx(job["error"], rel=1e-5)


def test_text_to_image_runs_give_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parents[2]
    monkeypatch.chdir(root)
    path = "configs/image_pixart_scenes.yaml"
    config, _ = parse_config(ImageTrainingConfig, ["--config", path])
    model, _, _ = config.build(build_objective(config.objective))
    kinds = convert_to_mhla(model, MHLAConfig(layers=()))
    calls = open_calls(as_teacher(kinds), path)
    assert isinstance(calls, DataCalls)
    first, again = calls(4), calls(4)
    assert torch.equal(first["encoder_hidden_states"], again["encoder_hidden_states"])
    assert predict(calls.model, first).shape[2:] == first["hidden_states"].shape[2:]
    assert calls.loss(calls.model, 4) == pytest.approx(calls.loss(calls.model, 4))

    ten = mock.MagicMock(wraps=calls.source, __len__=mock.Mock(return_value=10))
    monkeypatch.setattr(calls, "source", ten)
    for number in range(20):
        calls.sample(number)
    drawn = [call.args[0] for call in ten.load.call_args_list]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]

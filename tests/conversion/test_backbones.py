"""Every backbone is aligned and put together; videos go through all stages; processes share the layers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_diffusion import MHLAConfig, MHLAWanTransformer3DModel
from mhla_diffusion.backbones.teacher import as_teacher, attention_layers, predict
from mhla_diffusion.conversion import (
    LinearizeConfig,
    NoiseCalls,
    ReportConfig,
    SampledCalls,
    align,
    linearize,
)
from mhla_diffusion.conversion.choose import assemble
from mhla_diffusion.conversion.trial import prediction_error
from mhla_diffusion.planning import plan
from mhla_diffusion.training import ObjectiveConfig
from tests.backbones.cases import CASES, Case, randomize
from tests.faults.test_processes import join
from tests.training.test_video import MODEL
from tests.training.test_video import settings as video_settings  # noqa: F401 (a fixture)

from .conftest import FEW, FORMS, make_teacher

ONE_STEP = dataclasses.replace(FEW, samples=2, held_out=1, steps=2, batch_size=1, evaluate_every=1)


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
    channels = case.settings["in_channels"]
    ddpm = case.settings["out_channels"] == 2 * channels
    sampled = SampledCalls(
        teacher, grid=case.grids[0], steps=2, objective=ObjectiveConfig(name="ddpm" if ddpm else "flow")
    )
    if not ddpm and case.settings["out_channels"] == 4:  # as models that are given pictures
        with pytest.raises(ValueError, match="for models that are given pictures, give data"):
            sampled(7)
        return
    own = sampled(7)
    assert own.keys() == calls(7).keys()
    assert 0.7 <= float(own["timestep"]) / teacher.time_scale < 0.8
    assert predict(teacher, own).isfinite().all()


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
    forms = {"mhla": MHLAConfig(blocks=(1, 2, 2))}
    out = tmp_path / "out"
    assert linearize(str(tmp_path / "teacher"), str(run), out, size, config=config, candidates=forms) == 0
    content = json.loads((out / "report" / "report.json").read_text())
    assert [model["stage"] for model in content["models"]] == ["teacher", "plain", "aligned", "distilled"]
    assert (out / "report" / "report.html").read_text().count("data:image/webp;base64,") == 4, "clips play"


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

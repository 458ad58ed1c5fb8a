"""All four stages in one, their report, and what they take, planned."""

from __future__ import annotations

import faulthandler
import functools
import json
import math
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mhla_diffusion import MHLA, MHLAConfig, MHLADiTPipeline, MHLAPipeline
from mhla_diffusion.commands import choose
from mhla_diffusion.commands import report as report_command
from mhla_diffusion.commands.card import card
from mhla_diffusion.commands.end import CommandError
from mhla_diffusion.conversion import LinearizeConfig, NoiseCalls, ReportConfig, linearize, report
from mhla_diffusion.conversion.budget import conversion_budget
from mhla_diffusion.conversion.choose import save_student
from mhla_diffusion.conversion.job import AlignConfig
from mhla_diffusion.conversion.measures import BRANCHES, branch_errors, by_time, ratio, without
from mhla_diffusion.evaluation.networks import images as networks
from mhla_diffusion.files.locking import only_writer
from mhla_diffusion.ops import BlockLayout
from mhla_diffusion.planning import plan
from mhla_diffusion.training import DistillationConfig
from tests.extractors import quarters
from tests.faults.test_processes import join

from .conftest import FEW, FORMS, make_teacher

TOY = LinearizeConfig(budget=0.9, keep=(0,), align=FEW, steps=3, report=ReportConfig(calls=1))
PARTS: dict[str, Any] = {"cpe": "zero", "qk_conv": True, "gate": True}
LOCAL = {"mhla": MHLAConfig(blocks=4, local="gate", feature_map="hedgehog", **PARTS)}


def run(stored_teacher: Path, data: str, out: Path, config: LinearizeConfig = TOY) -> int:
    size = plan(str(stored_teacher), 64, 64, vae_stride=1)
    return linearize(str(stored_teacher), data, out, size, config=config, candidates=LOCAL)


def run_shared(rank: int, stored_teacher: Path, data: str, images: Path, out: Path) -> None:
    faulthandler.dump_traceback_later(300, exit=True)  # where one waits for the other for ever
    join(rank)
    networks._efficientnet_lite0 = quarters
    networks._choose = lambda weights: ("efficientnet_lite0", "it takes no time")
    scored = ReportConfig(calls=1, real=str(images), num_samples=4)
    assert run(stored_teacher, data, out, replace(TOY, steps=1, report=scored)) == 0
    arguments = ["--aligned", out / "aligned", "--data", data, "--budget", 0.9, "--out", out / "chosen"]
    size = ["--height", 64, "--width", 64, "--vae_stride", 1]
    choose.main([str(x) for x in (*arguments, *size)], "mhla choose")
    models = ["--teacher", stored_teacher, "--students", f"[{out / 'student'}]", "--settings.calls", 1]
    arguments = [*models, "--data", "noise", "--out", out / "apart"]
    report_command.main([str(x) for x in arguments], "mhla report conversion", "conversion")
    faulthandler.cancel_dump_traceback_later()


def test_two_processes_come_to_one_report_and_one_choice(
    stored_teacher: Path,
    write_run: Callable[..., Path],
    image_folder: Path,
    run_processes: Callable[..., None],
    tmp_path: Path,
) -> None:
    run_processes(run_shared, 2, stored_teacher, str(write_run()), image_folder, tmp_path / "out")
    content, other = (
        json.loads((tmp_path / "out" / name / "report.json").read_text()) for name in ("report", "apart")
    )
    stages = ["teacher", "plain", "aligned", "distilled"]
    assert [model["stage"] for model in content["models"]] == stages
    assert [model["scores"][0]["name"] for model in content["models"]] == ["fd_quarters"] * 4
    assert [model["stage"] for model in other["models"]] == stages[:3]
    steps = (tmp_path / "out" / "distilled" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(steps[-1])["step"] == 1
    in_one, apart = (
        json.loads((tmp_path / "out" / name / "choice.json").read_text()) for name in ("student", "chosen")
    )
    assert in_one == apart


def test_all_stages_and_a_page_of_them_and_once_more_nothing_is_done(
    stored_teacher: Path, write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = {
        "class_labels": [0, 1],
        "images_per_class": 2,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
    }
    data, out = str(write_run(sampling=sampling)), tmp_path / "out"
    assert run(stored_teacher, data, out) == 0
    content = json.loads((out / "report" / "report.json").read_text())
    assert [model["stage"] for model in content["models"]] == ["teacher", "plain", "aligned", "distilled"]
    teacher, *students = content["models"]
    assert teacher["loss_ratio"]["value"] == 1
    assert teacher["prediction_error"] == 0
    for student in students:
        assert "mhla" in student["attention"]
        assert student["prediction_error"] > 0
        assert len(student["loss_by_time"]) == 10
        assert set(student["branches"]) == set(BRANCHES)
        assert student["speed"]["seconds"] > 0
    assert content["models"][3]["hours"] > 0
    page = (out / "report" / "report.html").read_text()
    for name in ("student, plain", "distilled", "Samples of the same seeds", "Branches switched off"):
        assert name in page
    assert page.count("data:image/png;base64,") == 4 * 2
    assert "http" not in page.replace("http-equiv", "")
    distilled = yaml.safe_load((out / "distilled" / "config.yaml").read_text())
    assert distilled["trainer"]["ema_decay"] == 0.5, "no average that is longer than three steps"
    assert distilled["objective"]["distillation"]["fade_steps"] == 1
    pipeline = MHLAPipeline.from_pretrained(out / "distilled" / "pipeline")
    assert "mhla" in pipeline.transformer.layer_attention

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("it was done already")

    for module, done in (
        ("align", "train_layer"), ("linearize", "train"), ("linearize", "choose"), ("report", "_measure"),
    ):  # fmt: skip
        monkeypatch.setattr(sys.modules[f"mhla_diffusion.conversion.{module}"], done, fail)
    assert run(stored_teacher, data, out) == 0
    for other, difference in (
        (replace(TOY, budget=0.8), r"student was made with other settings.*\n  budget: 0.9 -> 0.8$"),
        (replace(TOY, keep=(1,)), r"student was .*\n  keep: \[0\] -> \[1\]$"),
        (replace(TOY, steps=4), r"(?s)distilled was .*\n  trainer.max_steps: 3 -> 4"),
        (replace(TOY, learning_rate=1e-3), r"(?s)distilled was .*\n  .*learning_rate: 0.0001 -> 0.001"),
    ):
        with pytest.raises(ValueError, match=difference):
            run(stored_teacher, data, out, other)
    for stride, forms, difference in (
        (2, LOCAL, r"student was .*\n  grid: \[32, 32\] -> \[16, 16\]$"),
        (1, {**LOCAL, "linear": MHLAConfig(blocks=1)}, r"(?s)student was .*\n  candidates\.linear\.blocks: "),
    ):
        size = plan(str(stored_teacher), 64, 64, vae_stride=stride)
        with pytest.raises(ValueError, match=difference):
            linearize(str(stored_teacher), data, out, size, config=TOY, candidates=forms)


def test_a_distillation_of_another_student_is_refused(
    stored_teacher: Path, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    data, out, config = str(write_run()), tmp_path / "out", replace(TOY, steps=1)
    run(stored_teacher, data, out, config)
    distilled, pages = out / "distilled", (out / "report" / "report.json").read_bytes()
    shutil.rmtree(out / "student")
    assert run(stored_teacher, data, out, config) == 0, "chosen as before, it is the same student"
    shutil.rmtree(out / "student")
    other = replace(config, keep=(2,))
    refused = r"distilled was .*choose another --out, or remove it and what .*:\n  student: \w{12} -> \w{12}$"
    with pytest.raises(ValueError, match=refused):
        run(stored_teacher, data, out, other)
    (distilled / "pipeline").rename(tmp_path / "pipeline")
    with pytest.raises(ValueError, match=refused):
        run(stored_teacher, data, out, other)  # nor does it go on from the checkpoint
    (tmp_path / "pipeline").rename(distilled / "pipeline")
    assert (out / "report" / "report.json").read_bytes() == pages
    (distilled / ".student.json").unlink()  # as earlier versions wrote none
    with pytest.raises(ValueError, match=r"distilled was .*:\n  attention: \[.*'mhla'\] -> \[.*'softmax'\]$"):
        run(stored_teacher, data, out, other)
    shutil.rmtree(out / "student")
    assert run(stored_teacher, data, out, config) == 0
    shutil.rmtree(out / "student")
    shutil.rmtree(distilled)
    assert run(stored_teacher, data, out, other) == 0
    models = json.loads((out / "report" / "report.json").read_text())["models"]
    assert [model["stage"] for model in models[2:]] == ["aligned", "distilled"]
    assert models[2]["attention"] == models[3]["attention"]
    assert models[3]["attention"][2] == "softmax"


def test_a_distillation_goes_on_from_a_student_of_the_same_weights_alone(
    stored_teacher: Path, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    data, out, config = str(write_run()), tmp_path / "out", replace(TOY, steps=1)
    run(stored_teacher, data, out, config)
    student = MHLAPipeline.from_pretrained(out / "student")
    with torch.no_grad():
        next(student.transformer.parameters()).add_(1)
    student.transformer.save_pretrained(out / "student" / "transformer")
    with pytest.raises(ValueError, match=r"distilled was .*\n  student: \w{12} -> \w{12}$"):
        run(stored_teacher, data, out, config)
    shutil.rmtree(out / "distilled" / "pipeline")
    shutil.rmtree(out / "distilled" / "checkpoints")  # as if stopped before the first: it begins anew
    assert run(stored_teacher, data, out, config) == 0


def test_a_budget_that_nothing_meets_is_refused_before_any_work(stored_teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget is a share .* above 0 and at most 1, got 70"):
        replace(TOY, budget=70)
    with pytest.raises(ValueError, match=r"no choice costs 0.01 or less"):
        run(stored_teacher, "noise", tmp_path / "out", replace(TOY, budget=0.01, steps=0))
    with pytest.raises(ValueError, match=r"keep names layer 3, but the layers are 0 to 2"):
        run(stored_teacher, "noise", tmp_path / "out", replace(TOY, keep=(3,), steps=0))
    assert not (tmp_path / "out").exists()


def test_without_data_there_is_no_distillation(
    stored_teacher: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(stored_teacher, "samples", tmp_path / "out") == 0
    assert "no distillation: it needs data" in caplog.text
    models = json.loads((tmp_path / "out" / "report" / "report.json").read_text())["models"]
    assert [model["stage"] for model in models] == ["teacher", "plain", "aligned"]


def test_students_of_another_teacher_are_refused(
    stored_teacher: Path, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    run(stored_teacher, "noise", tmp_path / "out")
    student = str(tmp_path / "out" / "student")
    other = make_teacher()
    torch.nn.init.normal_(other.proj_out_2.weight)
    shutil.rmtree(stored_teacher / "transformer")
    other.save_pretrained(stored_teacher / "transformer")
    with pytest.raises(ValueError, match="was made of another teacher than this"):
        report(str(stored_teacher), [student], "noise", tmp_path / "report")
    with pytest.raises(ValueError, match="scores need real and num_samples"):
        ReportConfig(real="x")


def test_students_of_one_folder_name_are_told_apart(stored_teacher: Path, tmp_path: Path) -> None:
    half, whole = replace(TOY, steps=0), replace(TOY, steps=0, keep=(), budget=0.7)
    students = []
    for place, config in (("a", half), ("b", whole)):
        run(stored_teacher, "noise", tmp_path / place, config)
        students.append(tmp_path / place / "student")
    shutil.copytree(students[1], tmp_path / "c" / "teacher")
    settings = ReportConfig(calls=1)

    def models(*given: Path) -> dict[str, Any]:
        found = report(str(stored_teacher), [*map(str, given)], "noise", tmp_path / "report", config=settings)
        assert set(found["choices"]) <= {model["name"] for model in found["models"]}
        return {model["name"]: model for model in found["models"]}

    alone = [models(student)["student"] for student in students]
    assert alone[0]["prediction_error"] != alone[1]["prediction_error"]
    together = models(*students)
    assert list(together) == ["teacher", *(f"{s}/student{p}" for s in "ab" for p in (", plain", ""))]
    for place, found in zip("ab", alone, strict=True):
        assert {**together[f"{place}/student"], "name": "student"} == found
    named = models(tmp_path / "c" / "teacher")
    assert named["teacher"]["prediction_error"] == 0
    assert named["c/teacher"]["prediction_error"] == alone[1]["prediction_error"]
    with pytest.raises(ValueError, match="students must be different folders"):
        models(students[0], students[0])
    with pytest.raises(ValueError, match=r"and .*studnet is no folder"):
        models(tmp_path / "studnet")


def test_samples_on_the_page_are_of_the_settings_of_now(
    stored_teacher: Path, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    sampling = {"class_labels": [0], "images_per_class": 1, "num_inference_steps": 2}
    pages, student = [], copied(stored_teacher, tmp_path / "copy")
    for guidance in (1.0, 4.0, 4.0):
        data = str(write_run(sampling={**sampling, "guidance_scale": guidance}))
        report(str(stored_teacher), [student], data, tmp_path / "report", config=ReportConfig(calls=1))
        pages.append((tmp_path / "report" / "report.html").read_text())
    assert pages[0] != pages[1] == pages[2]
    assert len(list((tmp_path / "report" / "measures").iterdir())) == 2 * 2


def copied(pipeline: Path, folder: Path) -> str:
    return str(shutil.copytree(pipeline, folder))


def trained(pipeline: Path, folder: Path, **objective: str) -> Path:
    """The output folder of a training that left a copy of the pipeline."""
    folder.mkdir()
    copied(pipeline, folder / "pipeline")
    settings = {"model": {"init_from": None}, "objective": objective, "trainer": {"batch_size": 1}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_a_report_calls_distilled_what_learned_from_this_teacher_alone(
    stored_teacher: Path, tmp_path: Path
) -> None:
    teacher, out = str(stored_teacher), tmp_path / "report"
    alone, taught = (
        trained(stored_teacher, tmp_path / name, **its)
        for name, its in (("alone", {}), ("taught", {"teacher": teacher}))
    )
    # A run by its pipeline is that run.
    found = report(
        teacher, [str(alone), str(taught / "pipeline")], "noise", out, config=ReportConfig(calls=1)
    )
    stages = {model["name"]: model["stage"] for model in found["models"]}
    assert stages == {"teacher": "teacher", "alone": "trained", "taught": "distilled"}
    other = trained(stored_teacher, tmp_path / "other", teacher=str(another(stored_teacher, tmp_path)))
    with pytest.raises(ValueError, match=r"other was distilled from .*elsewhere, which is another teacher"):
        report(teacher, [str(other)], "noise", out, config=ReportConfig(calls=1))


def another(pipeline: Path, folder: Path) -> Path:
    """The same pipeline with other weights."""
    other = MHLAPipeline.from_pretrained(pipeline)
    with torch.no_grad():
        next(other.transformer.parameters()).add_(1)
    other.save_pretrained(folder / "elsewhere")
    return folder / "elsewhere"


def test_a_student_says_that_what_was_trained_was_its_teacher(stored_teacher: Path, tmp_path: Path) -> None:
    whole = MHLAPipeline.from_pretrained(stored_teacher)
    whole.register_to_config(training={"trained": "all weights", "steps": 7})
    whole.save_pretrained(tmp_path / "teacher")
    save_student(whole.transformer, {}, str(tmp_path / "teacher"), tmp_path / "student")
    training = MHLAPipeline.from_pretrained(tmp_path / "student").config.training
    assert training == {"steps": 7, "converted from": str(tmp_path / "teacher")}
    text = (tmp_path / "student" / "README.md").read_text("utf-8")
    assert "Converted from teacher, and not trained as a whole since" in text
    card(str(tmp_path / "student"), converted=True)
    assert "**Converted, not fine-tuned yet.**" in (tmp_path / "student" / "README.md").read_text("utf-8")


def test_students_that_are_none_are_refused_and_nothing_is_touched(
    stored_teacher: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "student").mkdir(parents=True)
    for given, message in (
        ([], "at least one, got none"),
        ([tmp_path / "nowhere"], "nowhere is no folder"),
        (
            [tmp_path / "out"],
            r"out holds no model, and is no training run: students of it are \[.*student\]$",
        ),
        ([tmp_path / "out" / "student"], "student holds no model, and is no training run$"),
    ):
        with pytest.raises(ValueError, match=message):
            report(str(stored_teacher), [*map(str, given)], "noise", tmp_path / "report")
    assert not (tmp_path / "report").exists()
    with pytest.raises(ValueError, match="num_samples must be 2 or more"):
        ReportConfig(real="somewhere", num_samples=1)


def test_a_list_that_is_none_is_told_how_lists_are_written() -> None:
    words = ["--teacher", "a", "--students", "b", "--data", "noise", "--out", "c"]
    with pytest.raises(CommandError, match=r"a list is written \[A, B\], in quotes"):
        report_command.main(words, "mhla report conversion", "conversion")


def test_two_reports_at_once_do_not_write_into_one_folder(stored_teacher: Path, tmp_path: Path) -> None:
    student = copied(stored_teacher, tmp_path / "copy")
    with only_writer(tmp_path / "report"), pytest.raises(ValueError, match="another process is writing to"):
        report(str(stored_teacher), [student], "noise", tmp_path / "report")


def test_what_is_scored_against_has_to_be_there_before_any_work(
    stored_teacher: Path, write_run: Callable[..., Path], tmp_path: Path
) -> None:
    scored = replace(TOY, report=ReportConfig(calls=1, real=str(tmp_path / "nowhere"), num_samples=2))
    for data, message in (
        (str(write_run()), "nowhere is neither a folder of images"),
        ("noise", "scores need the settings of a training run"),
    ):
        with pytest.raises(ValueError, match=message):
            run(stored_teacher, data, tmp_path / "out", scored)
    assert not (tmp_path / "out").exists()


def test_a_student_with_guidance_in_it_is_sampled_without(
    stored_teacher: Path, write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[bool, float]] = []
    call = MHLADiTPipeline.__call__

    @functools.wraps(call)
    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        distilled = "mhla" in self.transformer.layer_attention
        asked.append((distilled, kwargs["guidance_scale"]))
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MHLADiTPipeline, "__call__", noted)
    sampling = {
        "class_labels": [0, 1],
        "images_per_class": 1,
        "num_inference_steps": 1,
        "guidance_scale": 4.0,
    }
    config = replace(TOY, steps=1, distillation=DistillationConfig(guidance_scale=4.0))
    data = str(write_run(sampling={**sampling, "guidance_scale": 4.0}))
    run(stored_teacher, data, tmp_path / "out", config)
    assert (False, 4.0) in asked
    assert (True, 4.0) in asked, "of the student that was aligned alone"
    assert (True, 1.0) in asked
    card = (tmp_path / "out" / "distilled" / "pipeline" / "README.md").read_text()
    assert "guidance_scale=1.0" in card
    assert "guidance_scale=4.0" not in card


def test_a_report_is_of_the_grid_that_layers_were_aligned_on(stored_teacher: Path, tmp_path: Path) -> None:
    size = plan(str(stored_teacher), 64, 64, vae_stride=1)
    linearize(str(stored_teacher), "noise", tmp_path, size, config=TOY, candidates=LOCAL, grid=(8, 8))
    records = (tmp_path / "aligned" / "align.json", tmp_path / "report" / "report.json")
    grids = [json.loads(path.read_text())["calls"]["grid"] for path in records]
    assert grids == [[8, 8], [8, 8]]


def test_a_report_is_in_the_dtype_of_the_alignment(stored_teacher: Path, tmp_path: Path) -> None:
    size, config = plan(str(stored_teacher), 64, 64, vae_stride=1), replace(TOY, steps=0)
    given: dict[str, Any] = {"size": size, "config": config, "candidates": LOCAL, "dtype": torch.bfloat16}
    assert linearize(str(stored_teacher), "noise", tmp_path, **given) == 0
    content = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [model["stage"] for model in content["models"]] == ["teacher", "plain", "aligned"]
    with pytest.raises(ValueError, match=r"or of this in another dtype than torch\.float32"):
        report(str(stored_teacher), [str(tmp_path / "student")], "noise", tmp_path / "other")


def test_a_branch_is_off_inside_and_on_again_behind() -> None:
    teacher = make_teacher()
    model = make_teacher(attention="mhla", mhla_config=LOCAL["mhla"].to_dict())
    calls = NoiseCalls(model)
    before = model(**calls(0)).sample
    for branch in BRANCHES:
        with without(model, branch) as layers:
            assert layers == 3
            assert not torch.allclose(model(**calls(0)).sample, before)
        assert torch.equal(model(**calls(0)).sample, before)
    with without(model, "linear"):
        near = model(**calls(0)).sample
    windows = make_teacher(attention="mhla", mhla_config={**LOCAL["mhla"].to_dict(), "local": "shared"})
    windows.load_state_dict(model.state_dict())
    with without(windows, "linear"):
        torch.testing.assert_close(windows(**calls(0)).sample, near)
    with without(model, "window"):
        alone = model(**calls(0)).sample
    shared = {**LOCAL["mhla"].to_dict(), "local_margin": 1, "routed_blocks": 1}
    routed = make_teacher(attention="mhla", mhla_config=shared)
    routed.load_state_dict(model.state_dict())
    assert not torch.allclose(routed(**calls(0)).sample, before)
    with without(routed, "window"):
        torch.testing.assert_close(routed(**calls(0)).sample, alone)
    assert set(branch_errors(teacher, teacher, calls, [0])) == set()
    content = make_teacher(attention="mhla", mhla_config={"blocks": [2, 2], "mixing_content": True})
    layer = next(part for part in content.modules() if isinstance(part, MHLA))
    torch.nn.init.constant_(layer.strength, 5.0)
    q, k = torch.randn(2, 1, layer.heads, 16, layer.head_dim)
    layout = BlockLayout((4, 4), (2, 2))
    with without(content, "mixing") as layers:
        assert layers == 3
        weights = layer.weighed(layer.mixing_matrix(), q, k, layout)
        assert (weights == weights.flatten()[0]).all(), "blocks weigh alike, whatever they hold"
    weights = layer.weighed(layer.mixing_matrix(), q, k, layout)
    assert not (weights == weights.flatten()[0]).all()


def test_a_ratio_has_the_interval_of_its_pairs() -> None:
    found = ratio([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert found == {"value": 1.0, "interval": [1.0, 1.0]}
    found = ratio([2.0, 2.0, 6.0], [1.0, 2.0, 3.0])
    assert found["value"] == pytest.approx(10 / 6)
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_the_budget_by_hand() -> None:
    size = plan("DiT-XL/2", 256, 256)
    align = AlignConfig(samples=100, held_out=20, steps=100, batch_size=2, evaluate_every=50, disk=1.0)
    forms = {"linear": FORMS["linear"]}
    found = conversion_budget(size, forms, align, steps=10, batch_size=8, gpus=2, tflops=1e-12 / 3600)
    layer = 120 * 2 * 256 * 1152 * 2
    assert found.layer_bytes == layer
    assert found.groups == -(-28 // int(1e9 // layer))
    softmax = size.model_flops("softmax")
    assert found.hours["cache"] == pytest.approx(found.groups * 120 * softmax)
    attention = size.projections + size.with_config(forms["linear"]).operator_flops("mhla")
    assert found.hours["align"] == pytest.approx(28 * attention * (3 * 100 * 2 + 20 * 2))
    linear = size.with_config(forms["linear"]).model_flops("mhla")
    assert found.hours["distil"] == pytest.approx(80 * (4 * linear + softmax))
    assert found.memory == found.parameters * 24 / 2
    guided = DistillationConfig(guidance_scale=4.0, teacher_dtype="bfloat16")
    twice = conversion_budget(
        size, forms, align, steps=10, batch_size=8, distillation=guided, gpus=2, tflops=1e-12 / 3600
    )
    assert twice.hours["distil"] == pytest.approx(80 * (4 * linear + 2 * softmax))
    assert twice.memory == found.parameters * 22 / 2
    wider = replace(align, dtype="float32")
    again = conversion_budget(size, forms, wider, steps=10, batch_size=8, gpus=2, tflops=1e-12 / 3600)
    assert again.layer_bytes == 2 * layer
    for wrong in ({"gpus": 0}, {"gpus": -1}, {"tflops": 0.0}, {"tflops": math.inf}):
        with pytest.raises(ValueError, match="gpus must be at least 1 and tflops above 0, got"):
            conversion_budget(size, forms, align, steps=10, batch_size=8, **wrong)


def test_a_mean_for_each_tenth_of_the_way_is_of_the_calls_that_lie_there() -> None:
    assert by_time([1.0, 2.0, 3.0], [0, 10, 3]) == [1.5, 0, 0, 3.0, *[0] * 6]

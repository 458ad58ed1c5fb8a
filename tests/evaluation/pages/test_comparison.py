"""Several reports in one table."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mhla_diffusion.evaluation import FeatureExtractor, SideBySide, compare_reports, evaluate_images
from mhla_diffusion.evaluation.pages.runs import short_names
from tests.processes import run_script

MakeReport = Callable[..., Path]


@pytest.fixture
def make_report(
    extractor: FeatureExtractor,
    make_pixels: Callable[..., np.ndarray],
    write_folder: Callable[..., Path],
    tmp_path: Path,
) -> MakeReport:
    real = write_folder("real", make_pixels(30))

    def make(
        name: str, brightness: int, count: int = 25, resize: str = "16 x 16", **settings: object
    ) -> Path:
        generated = write_folder(f"{name}-images", make_pixels(count, seed=len(name), brightness=brightness))
        report = evaluate_images(
            real, generated, extractor=dataclasses.replace(extractor, resize=resize), **settings
        )
        report.save(tmp_path / name)
        return tmp_path / name

    return make


def test_runs_of_one_protocol_are_ranked_and_those_of_one_label_averaged(make_report: MakeReport) -> None:
    folders = [make_report("good", 0), make_report("better?", 1, bootstrap=30), make_report("bad", 40)]
    table = compare_reports(folders, labels=["mhla", "mhla", "softmax"])
    assert table.differences == {}
    assert [(group.label, group.indices) for group in table.groups] == [("mhla", [0, 1]), ("softmax", [2])]
    row = table.rows[0]
    assert row.name == "fd_mean_colours"
    values = [json.loads((folder / "report.json").read_text())["scores"][0]["value"] for folder in folders]
    assert [score.value for score in row.scores if score] == values
    assert row.best == [0, 1]
    assert row.means == [
        (pytest.approx(np.mean(values[:2])), pytest.approx(np.std(values[:2], ddof=1))),
        None,
    ]
    text = table.to_markdown()
    assert "| score | mhla | mhla | softmax | mhla: mean ± std |" in text
    assert "mhla: mean and standard deviation are over 2 runs that have this label." in text
    assert row.summary(0) in text
    assert row.summary(0) in table.to_html()
    assert "<iframe srcdoc=" in table._repr_html_()
    assert "do not compare" not in text
    assert f"**{row.scores[0].text()}**" in text  # type: ignore[union-attr]


def test_runs_of_different_protocols_are_not_compared_silently(make_report: MakeReport) -> None:
    folders = [make_report("a", 0), make_report("bb", 1, count=20), make_report("ccc", 2, resize="8 x 8")]
    table = compare_reports(folders)
    assert table.differences["generated.count"] == ["25", "20", "25"]
    assert table.differences["extractors.mean_colours.resize"] == ["16 x 16", "16 x 16", "8 x 8"]
    assert all(row.best == [] and row.means == [None] * 3 for row in table.rows)
    assert "were not scored in the same way" in table.to_markdown()
    page = table.to_html()
    assert 'class="card alarm" role="alert"' in page
    assert "their scores do not compare" in page


def test_cautions_stand_once_below_the_scores(make_report: MakeReport) -> None:
    folders = [make_report("a", 0), make_report("bb", 1), make_report("ccc", 2, count=20)]
    table = compare_reports(folders)
    first, second, third = table.cautions()
    assert first.startswith("Only 30 real images")
    assert second.startswith("a, bb: Only 25 generated images")
    assert third.startswith("ccc: Only 20 generated images")
    for text in (table.to_markdown(), table.to_html()):
        last = max(text.index(row.name) for row in table.rows)
        for caution in (first, second, third):
            assert text.count(caution) == 1
            assert text.index(caution) > last
    assert table.to_markdown().endswith(f"\n- {first}\n- {second}\n- {third}\n")


def test_samples_of_runs_stand_side_by_side(make_report: MakeReport) -> None:
    folders = [make_report("a", 0), make_report("bb", 1)]
    samples = [json.loads((folder / "samples.json").read_text()) for folder in folders]
    assert [len(its) for its in samples] == [12, 12]
    page = compare_reports(folders).to_html()
    for its in samples:
        assert all(sample["data_uri"] in page for sample in its)
    (folders[1] / "samples.json").unlink()
    page = compare_reports(folders).to_html()
    assert samples[0][0]["data_uri"] in page
    assert "No samples.json beside this report." in page


SETTINGS = {"trainer.optimizer.betas": [0.9, 0.999], "trainer.optimizer.warmup_steps": 0}
MANIFEST = {
    "model": "runs/a/pipeline", "weights_sha256": "a", "guidance_scale": 4.0, "scheduler": {"class": "DDIM"},
    "training": {"steps": "100", "seed": 0, "settings": SETTINGS}, "requests_sha256": "c",
    "seeds": [[0, 24]],
}  # fmt: skip


def trained(**changes: Any) -> dict[str, Any]:
    """What a manifest says of another training."""
    return {"weights_sha256": "b", "model": "b", "training": {**MANIFEST["training"], **changes}}  # type: ignore[dict-item]


@pytest.fixture
def compare(make_report: MakeReport) -> Callable[..., SideBySide]:
    def compare(*manifests: dict[str, Any], labels: list[str] | None = None) -> SideBySide:
        folders = [make_report("x" * (i + 1), i) for i in range(len(manifests))]
        for folder, manifest in zip(folders, manifests, strict=True):
            report = json.loads((folder / "report.json").read_text())
            report["generated"]["manifest"] = {**MANIFEST, **manifest}
            (folder / "report.json").write_text(json.dumps(report))
        return compare_reports(folders, labels=labels)

    return compare


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"seeds": [[25, 49]]}, "are over 2 runs of one model, whose samples have other seeds"),
        (trained(seed=1), r"are over 2 runs that differ in the seed of the training \(0, 1\)"),
    ],
)
def test_means_are_over_runs_that_differ_in_seeds_alone(
    compare: Callable[..., SideBySide], change: dict[str, object], reason: str
) -> None:
    table = compare({}, change)
    assert len(table.groups) == 1
    assert table.rows[0].means[0] is not None
    assert re.search(reason, table.group_notes()[0])


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"guidance_scale": 2.0, "seeds": [[25, 49]]}, "guidance_scale"),
        ({"requests_sha256": "d", "seeds": [[25, 49]]}, "requests_sha256"),
        (trained(steps="200", seed=1), "training.steps"),
        (
            trained(settings={**SETTINGS, "trainer.optimizer.betas": [0.5, 0.9]}, seed=1),
            "training.settings.trainer.optimizer.betas",
        ),
        ({"training": None, "weights_sha256": "b"}, "weights_sha256"),
        # Reports of earlier versions do not say how a model was trained beyond a few words.
        ({"training": {"steps": "100", "seed": 1}, "weights_sha256": "b"}, "weights_sha256"),
        # The same seed and settings, and other weights: of other data, or on another machine.
        ({"weights_sha256": "b"}, "weights_sha256"),
    ],
)
def test_runs_that_differ_in_more_are_not_averaged(
    compare: Callable[..., SideBySide], change: dict[str, object], difference: str
) -> None:
    table = compare({}, change)
    assert len(table.groups) == 2
    assert table.rows[0].means == [None, None]
    assert difference in table.made_differently
    text = table.to_markdown()
    assert "There is no mean" in text
    assert f"- {difference}: " in text


@pytest.mark.parametrize(
    ("manifests", "why"),
    [
        (({}, {"seeds": [[10, 34]]}), r"are of one model and have 15 seeds in common, .*--seed"),
        (({}, {"seeds": []}), "do not say which seeds their samples have"),
        (({}, {"seeds": [[25, 49]]}, trained(seed=1)), "of some seed of the training there are several"),
    ],
)
def test_runs_that_share_samples_are_not_averaged(
    compare: Callable[..., SideBySide], manifests: tuple[dict[str, Any], ...], why: str
) -> None:
    table = compare(*manifests)
    assert len(table.groups) == 1
    assert table.rows[0].means == [None]
    assert table.repeated == []
    assert re.search(f"there is no mean over these runs, as .*{why}", table.group_notes()[0])
    assert table.group_notes()[0] in table.to_markdown()


def test_no_mean_is_spoken_of_where_there_is_none(
    make_report: MakeReport, compare: Callable[..., SideBySide]
) -> None:
    text = compare({}, {"seeds": [[25, 49]]}, labels=["a", "b"]).to_markdown()
    assert "no two of them have equal labels" in text
    first, second = make_report("a", 0), make_report("bb", 1, resize="8 x 8")
    table = compare_reports([first, second], labels=["mhla", "mhla"])
    said = "mhla: there is no mean over these runs, as runs were not scored in the same way."
    assert table.group_notes() == [said]
    assert "mean ± std" not in table.to_markdown()


def test_a_score_that_one_run_has_is_not_the_best_of_several(make_report: MakeReport) -> None:
    folders = [make_report("a", 0, metrics=["frechet", "kid"]), make_report("bb", 40, metrics=["frechet"])]
    table = compare_reports(folders)
    assert {row.name.split("_")[0]: row.best for row in table.rows} == {"fd": [0], "kid": []}


def test_a_report_given_twice_is_one_run(make_report: MakeReport) -> None:
    folder = make_report("a", 0)
    table = compare_reports([folder, folder], labels=["mhla", "mhla"])
    assert table.rows[0].means == [None]
    assert "have the same samples" in table.to_markdown()


def test_a_changed_report_is_refused(compare: Callable[..., SideBySide]) -> None:
    with pytest.raises(ValueError, match="it has been changed"):
        compare({}, {"seeds": [["0", "24"]]})


def test_labels_are_one_each(make_report: MakeReport) -> None:
    folders = [make_report("a", 0), make_report("bb", 1)]
    with pytest.raises(ValueError, match="1 labels for 2 reports: give one each, or none"):
        compare_reports(folders, labels=["a"])


def test_runs_are_called_by_what_differs_in_their_paths() -> None:
    assert short_names([Path("runs/a/report"), Path("runs/b/c/report")]) == ["a", "b/c"]
    assert short_names([Path("a"), Path("a")]) == ["a", "a"]


def test_what_is_no_report_is_refused(make_report: MakeReport, tmp_path: Path) -> None:
    folder = make_report("a", 0)
    with pytest.raises(ValueError, match="two reports or more are compared, got 1"):
        compare_reports([folder])
    with pytest.raises(ValueError, match="nowhere is not a report"):
        compare_reports([folder, tmp_path / "nowhere"])
    old = tmp_path / "old"
    old.mkdir()
    (old / "report.json").write_text(json.dumps({"schema_version": 1, "scores": []}))
    with pytest.raises(ValueError, match="schema_version 1, not 2: score the samples again"):
        compare_reports([folder, old])


def test_the_command_takes_folders_one_after_the_other(make_report: MakeReport, tmp_path: Path) -> None:
    folders = [make_report("a", 0), make_report("bb", 30)]
    command = ["evaluate", "compare", *folders, "--out", tmp_path]
    result = run_script(*command)
    assert result.returncode == 0, result.stderr
    assert "| fd_mean_colours |" in result.stderr
    assert result.stderr.count("Only 30 real images") == 1
    assert (tmp_path / "comparison.html").is_file()
    again = run_script(*command)
    assert again.returncode == 1
    assert "already there" in again.stderr

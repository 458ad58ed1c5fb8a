"""report.json and report.html, and the script that writes them."""

from __future__ import annotations

import dataclasses
import html
import json
import os
import re
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mhla_diffusion.evaluation import FeatureExtractor, Report, compare_reports, evaluate_images
from mhla_diffusion.evaluation.pages.report import FILE_NAMES, require_no_report
from mhla_diffusion.evaluation.scores.frechet import require_new_npz
from mhla_diffusion.evaluation.scores.score import cautions
from mhla_diffusion.files import writing
from mhla_diffusion.files.writing import write_file
from tests.processes import run_script


@pytest.fixture
def report(
    extractor: FeatureExtractor,
    make_pixels: Callable[..., np.ndarray],
    write_folder: Callable[..., Path],
    write_manifest: Callable[..., None],
) -> Report:
    real = write_folder("real", make_pixels(12), classes=["cat", "<dog>"])
    generated = write_folder("generated", make_pixels(9, seed=1))
    write_manifest(generated, [0, 1] * 4)
    (generated / "0002.png").write_text("no image")
    return evaluate_images(real, generated, extractor=extractor, max_skipped=0.2)


def test_json_holds_scores_counts_and_protocol(report: Report, tmp_path: Path) -> None:
    report.save(tmp_path / "out")
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["schema_version"] == 2
    assert content["scores"][0]["name"] == "fd_mean_colours"
    assert content["scores"][0]["value"] == report.scores[0].value
    flags = content["scores"][0]["flags"]
    assert len(flags) == 5
    assert "in the order of their names" in flags[0]
    assert flags[3:] == [
        "1 generated images are not in their manifest and are left out.",
        "1 generated images could not be read and are left out.",
    ]
    assert content["real"]["count"] == 12
    assert content["generated"]["count"] == 7
    assert content["generated"]["skipped"][0]["file"] == "0002.png"
    assert content["generated"]["unlisted"] == 1
    assert content["generated"]["manifest"]["num_inference_steps"] == 20
    protocol = content["protocol"]
    own = protocol["extractors"]["mean_colours"]
    assert own["weights_sha256"] == "0" * 64
    assert {"resize", "normalization", "weights", "statistics"} <= set(own)
    assert {"conversion", "intervals", "scores", "device", "date", "versions"} <= set(protocol)
    names = ["report.html", "report.json", "report.md", "samples.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names


def test_html_is_one_file_with_the_score_and_both_grids(report: Report) -> None:
    html = report.to_html()
    assert f"{report.scores[0].value:.2f}" in html
    assert all(flag in html for flag in report.scores[0].flags)
    sources: list[str] = []

    class Links(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            sources.extend(str(value) for key, value in attrs if key in ("src", "href"))

    Links().feed(html)
    # Beside the grids 7 pairs of nearest neighbours, and all as the most and the least realistic.
    assert len(sources) == 12 + 7 + 2 * 7 + 2 * 7
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?:|url\(|@import", html)
    assert "&lt;dog&gt;" in html
    assert "<dog>" not in html
    assert "runs/&lt;digits&gt;" in html


def test_nested_settings_of_a_training_are_written_out(report: Report) -> None:
    report.generated.manifest["training"] = {"steps": "9", "settings": {"data.flip": True, "betas": [0.9, 1]}}
    page = report.to_html()
    assert "steps: 9; settings: data.flip: True; betas: [0.9, 1]" in page


def test_cautions_stand_once_below_the_scores(report: Report) -> None:
    flags = cautions(report.scores)
    assert len(report.scores) > 5
    assert len(flags) == 6
    for score in report.scores:
        assert len(score.flags) == 5 + (score.metric == "frechet_per_class")
    for text in (str(report), report.to_markdown(), report.to_html()):
        last = max(text.index(score.name) for score in report.scores)
        for flag in flags:
            assert text.count(flag) == 1
            assert text.index(flag) > last
    assert str(report).splitlines()[-len(flags) :] == [f"Caution: {flag}" for flag in flags]


def test_a_report_is_not_overwritten_unasked(report: Report, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report.save(out)
    (out / "report.json").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.md, .*report\.html, .*samples\.json already there"):
        report.save(out)
    assert (out / "report.json").read_text() == "mine"
    report.save(out, overwrite=True)
    assert json.loads((out / "report.json").read_text())["schema_version"] == 2


def _run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run_script("evaluate", "image", *arguments)


def test_script_scores_and_saves_statistics(
    make_pixels: Callable[..., np.ndarray], write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    real, generated = write_folder("real", make_pixels(4)), write_folder("generated", make_pixels(3, seed=1))
    result = _run(
        *("--real", real, "--generated", generated, "--out", tmp_path / "out"),
        *("--extractor", "efficientnet_lite0", "--save_stats", tmp_path / "real.npz"),
    )
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["scores"][0]["name"] == "fd_efficientnet_lite0"
    assert content["scores"][0]["value"] > 0
    flags = content["scores"][0]["flags"]
    assert "does not compare with published FID" in flags[-1]
    assert result.stderr.count(" = ") == len(content["scores"])
    last = result.stderr.rindex(" = ")
    for flag in flags:
        assert result.stderr.count(flag) == 1
        assert result.stderr.index(flag) > last
    assert "evaluate.py image --real" in content["protocol"]["command"]
    with np.load(tmp_path / "real.npz") as statistics:
        assert (statistics["mu"].shape, int(statistics["n"])) == ((1280,), 4)
        assert statistics["extractor"] == "efficientnet_lite0"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--batchsize", "3"], "unrecognized arguments: --batchsize"),
        (["--real", "nowhere"], "nowhere is neither a folder of images nor an .npz file"),
        (["--save_stats", "real.txt"], "does not end in .npz"),
        (
            ["--save_stats", "real.npz", "--extractor", "[efficientnet_lite0, dinov2]"],
            "statistics of one extractor, and 2 are given (efficientnet_lite0, dinov2)",
        ),
    ],
)
def test_script_explains_bad_input_in_one_line(extra: list[str], message: str, tmp_path: Path) -> None:
    result = _run("--real", tmp_path, "--generated", tmp_path, "--out", tmp_path / "out", *extra)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_report_that_was_half_written_may_be_written_again(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def killed(path: Path, content: bytes | str) -> None:
        if len(written) == 3:
            raise KeyboardInterrupt
        written.append(path)
        write_file(path, content)

    monkeypatch.setattr(writing, "write_file", killed)
    with pytest.raises(KeyboardInterrupt):
        report.save(tmp_path / "out")
    monkeypatch.undo()
    assert (tmp_path / "out" / "report.json").is_file()
    assert not (tmp_path / "out" / "report.html").exists()
    require_no_report(tmp_path / "out")
    report.save(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILE_NAMES)
    with pytest.raises(ValueError, match="already there"):
        report.save(tmp_path / "out")


@pytest.mark.parametrize("place", ["file/out", "/proc/out"])
def test_a_place_that_cannot_be_written_is_found_out_before_the_work(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="nothing can be written to"):
        require_no_report(tmp_path / place)
    with pytest.raises(ValueError, match="nothing can be written to"):
        require_new_npz(tmp_path / place / "real.npz")


def test_names_that_are_no_text_do_not_cost_the_report(
    make_pixels: Callable[..., np.ndarray],
    write_folder: Callable[..., Path],
    extractor: FeatureExtractor,
    tmp_path: Path,
) -> None:
    folder = write_folder("images", make_pixels(6))
    os.rename(os.fsencode(folder / "0000.png"), os.fsencode(folder) + b"/caf\xe9.png")
    (folder / "0001.png").rename(os.fsdecode(os.fsencode(folder) + b"/b\xff.png"))
    report = evaluate_images(folder, folder, extractor=extractor, cache=tmp_path / "cache")
    report.save(tmp_path / "a")
    report.save(tmp_path / "b")
    assert r"caf\udce9.png" in (tmp_path / "a" / "report.html").read_text("utf-8")
    compare_reports([tmp_path / "a", tmp_path / "b"]).save(tmp_path / "both")


def test_a_choice_of_auto_stands_above_the_scores(
    extractor: FeatureExtractor,
    make_pixels: Callable[..., np.ndarray],
    write_folder: Callable[..., Path],
) -> None:
    folder = write_folder("real", make_pixels(12))
    chosen = dataclasses.replace(extractor, chosen="there is no other")
    report = evaluate_images(folder, folder, extractor=chosen)
    said = "Extractor mean_colours, chosen by auto, because there is no other."
    for text in (str(report), report.to_markdown(), report.to_html().partition("<table")[0]):
        assert text.count(said) == 1
    assert str(report).startswith(said)
    assert report.to_markdown().startswith(said)


def test_the_protocol_is_a_sentence_to_paste(report: Report) -> None:
    sentence = report.sentence()
    for part in (
        str(report.scores[0]), "of 7 generated against 12 real images",
        "Pixels: " + report.protocol["conversion"], "mean_colours", "sha256 000000000000",
        "resized", "bootstrap replicates", "of Frechet distances they are wider than fresh sets would spread",
        "made by a pipeline with 20 steps", "Scored with mhla-diffusion",
    ):  # fmt: skip
        assert part in sentence, (part, sentence)
    assert report.to_markdown().endswith(f"Protocol: {sentence}\n")
    assert sentence in html.unescape(report.to_html())
    bare = dataclasses.replace(report, generated=dataclasses.replace(report.generated, manifest={}))
    assert "How the images were made is not recorded." in bare.sentence()


def test_a_number_is_written_the_same_way_on_every_page(report: Report) -> None:
    score = report.scores[0]
    for text in (str(report), report.to_markdown()):
        assert score.text() in text
    assert f"<strong>{score.format(score.value)}</strong>" in report.to_html()


def test_a_notebook_shows_the_page_in_a_frame_of_its_own(report: Report) -> None:
    shown = report._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert "<html" not in shown

"""The page on which pipelines are tried beside their teachers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import DDIMScheduler

from mhla_diffusion import (
    MHLADiTPipeline,
    MHLADiTTransformer2DModel,
    MHLAWanPipeline,
    MHLAWanTransformer3DModel,
)
from mhla_diffusion.commands.demo import demo
from mhla_diffusion.demo import Pair, build_page, make_samples
from mhla_diffusion.files.videos import open_video
from mhla_diffusion.training import ObjectiveConfig, build_objective
from tests.backbones.cases import randomize

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def image_pipeline(attention: str) -> MHLADiTPipeline:
    model = MHLADiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=2, attention=attention, mhla_config={"blocks": 4},
    )  # fmt: skip
    randomize(model)
    pipeline = MHLADiTPipeline(model, DDIMScheduler(), id2label={0: "cat", 1: "dog"})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    for attention in ("mhla", "softmax"):
        image_pipeline(attention).save_pretrained(tmp_path / attention)
    return Pair.parse(f"{tmp_path / 'mhla'}={tmp_path / 'softmax'}")


SETTINGS: dict[str, Any] = {"steps": 2, "guidance": 1.0, "seed": 0}


def test_images_of_classes_by_name_and_number_with_their_time(tmp_path: Path) -> None:
    made = make_samples(image_pipeline("mhla"), ["dog", "0"], folder=tmp_path, **SETTINGS)
    assert [image.size for image in made.samples] == [(8, 8), (8, 8)]
    assert made.seconds > 0
    assert made.caption().startswith("**MHLADiTTransformer2DModel**: ")
    with pytest.raises(ValueError, match="unknown class 'bird'; the names are cat, dog"):
        make_samples(image_pipeline("mhla"), ["bird"], folder=tmp_path, **SETTINGS)
    with pytest.raises(ValueError, match="write a class or a prompt"):
        make_samples(image_pipeline("mhla"), [], folder=tmp_path, **SETTINGS)


def test_videos_of_prompts_whose_commas_are_theirs(text_parts: dict[str, Any], tmp_path: Path) -> None:
    model = MHLAWanTransformer3DModel(
        patch_size=(2, 4, 4), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3,
        text_dim=16, freq_dim=16, ffn_dim=32, num_layers=1, sample_grid=(2, 4, 4), mhla_config={"blocks": 4},
    )  # fmt: skip
    scheduler = build_objective(ObjectiveConfig()).scheduler()
    pipeline = MHLAWanPipeline(**text_parts, scheduler=scheduler, transformer=model, max_sequence_length=8)
    made = make_samples(pipeline, ["a beach, in spring"], folder=tmp_path, **SETTINGS)
    (file,) = made.samples
    assert open_video(file).num_frames == 4


def test_a_pair_is_a_pipeline_and_perhaps_its_teacher() -> None:
    assert Pair.parse("a/b").paths == ("a/b",)
    assert Pair.parse("a = b").paths == ("a", "b")
    with pytest.raises(ValueError, match="must be a pipeline, or a pipeline and its teacher"):
        Pair.parse("a=")


def test_a_pair_is_shown_side_by_side_and_says_which_times_are_first_ones(pair: Pair) -> None:
    shown = [pair.show(["cat", "1"], **SETTINGS) for _ in range(2)]
    for images, caption, others, other in shown:
        assert (len(images), len(others)) == (2, 2)
        assert [("first time" in text) for text in (caption, other)] == [shown[0][1] == caption] * 2
        assert images[0].tobytes() != others[0].tobytes()
    alone, _, nothing, why = Pair.parse(pair.paths[0]).show(["cat"], **SETTINGS)
    assert [image.tobytes() for image in alone] == [shown[0][0][0].tobytes()]
    assert (nothing, why) == ([], "no teacher given")


def test_what_cannot_be_shown_is_refused_before_a_page_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", SimpleNamespace())
    with pytest.raises(ValueError, match="each pipeline is given once, got a, a"):
        build_page([Pair.parse("a=b"), Pair.parse("a=c")])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty is no pipeline, here or on the hub"):
        demo([str(tmp_path / "empty")])
    with pytest.raises(ValueError, match="nowhere does not exist"):
        demo([str(tmp_path / "nowhere")])
    with pytest.raises(ValueError, match="seed must be a whole number from 0 to"):
        make_samples(None, ["a"], folder=tmp_path, **{**SETTINGS, "seed": 2**70})


def test_the_page_answers_and_shows_in_a_browser(pair: Pair) -> None:
    pytest.importorskip("gradio")
    client = pytest.importorskip("gradio_client")
    page = build_page([pair])
    try:
        _, address, _ = page.launch(prevent_thread_lock=True, quiet=True)
        answer = client.Client(address, verbose=False).predict(
            pair.name, "cat\ndog", 2, 1, 0, api_name="/show"
        )
        assert [len(answer[0]), len(answer[2])] == [2, 2]
        assert all("DiTTransformer2DModel**: " in caption for caption in (answer[1], answer[3]))
        if BROWSER is not None:
            command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000"]
            seen = subprocess.run(
                [*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
            ).stdout
            assert all(word in seen for word in ("MHLA beside its teacher", "Generate", "Guidance"))
    finally:
        page.close()

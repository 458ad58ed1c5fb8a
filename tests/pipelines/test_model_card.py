from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.utils.hub_utils
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from huggingface_hub import ModelCard
from PIL import Image

import mhla_diffusion.pipelines.image
from mhla_diffusion import MHLAConfig, MHLADiTPipeline, MHLAPipeline, MHLAWanPipeline, convert_to_mhla
from mhla_diffusion.commands.card import card as write_card
from mhla_diffusion.pipelines.identity import describe
from mhla_diffusion.pipelines.model_card import write_model_card
from mhla_diffusion.training.stock import IMAGES, VIDEOS
from mhla_diffusion.training.text import make_stock_pipeline
from tests.backbones.cases import CASES
from tests.processes import run_script

MakePipeline = Callable[..., MHLADiTPipeline]

TRAINING = {"data": "30 photographs of pets", "steps": 1234}


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def facts(text: str) -> dict[str, str]:
    """The rows of the table."""
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", text, flags=re.MULTILINE)
    return dict(rows)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            {
                "attention": "mhla in 2 of 2 layers",
                "blocks": "2 x 2",
                "settings that are not the default": "blocks = 4, local = None",
            },
        ),
        (
            {"mhla_config": {"blocks": (1, 2), "cpe": "zero", "gate": True}},
            {
                "blocks": "1 x 2",
                "settings that are not the default": "blocks = [1, 2], cpe = zero, gate = True, local = None",
            },
        ),
        (
            {"attention": ["softmax", "mhla"]},
            {"attention": "softmax in 1 of 2 layers, mhla in 1 of 2 layers", "blocks": "2 x 2"},
        ),
        ({"attention": "linear"}, {"attention": "linear in 2 of 2 layers", "blocks": "none"}),
    ],
    ids=["mhla", "parts", "hybrid", "linear"],
)
def test_the_card_states_the_attention(
    make_pipeline: MakePipeline, tmp_path: Path, settings: dict[str, Any], expected: dict[str, str]
) -> None:
    make_pipeline(**settings).save_pretrained(tmp_path)
    assert facts(card(tmp_path)).items() >= expected.items()


def test_the_card_names_every_setting_that_is_not_the_default(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    chosen: dict[str, Any] = {
        "blocks": [1, 2], "feature_map": "elu", "normalizer": "none", "mixing_init": "uniform",
        "constraint": "softmax", "mixing_per_head": True, "cpe": "identity", "qk_norm": True, "gate": True,
        "output_norm": True, "eps": 1e-5, "layers": [1], "center_keys": True,
    }  # fmt: skip
    pipeline = make_pipeline(mhla_config=chosen)
    stored = MHLAConfig.from_dict(dict(pipeline.transformer.config.mhla_config)).to_dict()
    stored["key_blocks"] = 3  # of cross-attention, and so not a DiT's
    pipeline.transformer.register_to_config(mhla_config=stored)
    pipeline.save_pretrained(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="would be loaded in place of weights with safe_serialization=False"):
        make_pipeline().save_pretrained(tmp_path, safe_serialization=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    named = facts(card(tmp_path))["settings that are not the default"].split(", ")
    default = MHLAConfig()
    differ = [
        f.name
        for f in dataclasses.fields(MHLAConfig)
        if stored.get(f.name, None if f.name == "local" else getattr(default, f.name))
        != getattr(default, f.name)
    ]
    assert {*differ} == {*chosen, "key_blocks", "local"}
    assert {setting.split(" = ")[0] for setting in named if " = " in setting} == set(differ)
    assert facts(card(tmp_path))["softmax window"] == "none"
    assert "qk_norm = True" in named


@pytest.mark.parametrize("parts", [["transformer", "transformer_2"], ["transformer_2"]])
def test_the_card_states_each_of_two_transformers(
    parts: list[str], make_stock_video_pipeline: Callable[[str], Any], tmp_path: Path
) -> None:
    stock = make_stock_video_pipeline("wan2.2")
    components = {name: part for name, part in stock.components.items() if "transformer" not in name}
    for name, blocks in zip(["transformer", "transformer_2"], ([1, 1, 2], [1, 2, 2]), strict=True):
        if name in parts:
            components[name] = convert_to_mhla(getattr(stock, name), {"blocks": blocks})
    MHLAWanPipeline(**components, boundary_ratio=0.9).save_pretrained(tmp_path)
    table = facts(card(tmp_path))
    if parts == ["transformer_2"]:
        assert table["blocks"] == "1 x 2 x 2"
        assert "blocks (transformer_2)" not in table
    else:
        assert (table["blocks"], table["blocks (transformer_2)"]) == ("1 x 1 x 2", "1 x 2 x 2")
        assert table["parameters (transformer_2)"]
    assert table["size"].startswith("81 frames of 480 x 832 pixels")


def test_the_card_states_the_training_and_the_rest(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline(training=TRAINING, scheduler=FlowMatchEulerDiscreteScheduler())
    pipeline.save_pretrained(tmp_path)
    expected = {
        "data": "30 photographs of pets",
        "steps": "1234",
        "size": "16 x 16 pixels, latents",
        "classes": "3",
        "prediction": "flow_prediction",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "parameters": f"{pipeline.transformer.num_parameters():,}",
    }
    assert facts(card(tmp_path)).items() >= expected.items()


def test_the_card_says_what_was_trained_from_what_and_how_to_sample(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    training = {
        "data": "/home/somebody/data/pets, 30 samples", "trained": "all weights",
        "settings": {"trainer.ema_decay": 0.9},
        "base model": "someone/base",
        "sampled with": {"num_inference_steps": 20, "guidance_scale": 2.5},
    }  # fmt: skip
    (tmp_path / "samples.png").write_bytes(b"")
    make_pipeline(training=training).save_pretrained(tmp_path)
    text = card(tmp_path)
    assert "\n# MHLA-DiT of pets\n" in text
    assert "/home/" not in text
    assert "Trained: all weights, starting from someone/base." in text
    assert "pipe(['cat'], num_inference_steps=20, guidance_scale=2.5).images" in text
    assert "![Samples](samples.png)" in text
    assert "ema" not in text  # settings are for comparing runs
    header = ModelCard(text).data
    assert (header.base_model, header.license) == ("someone/base", None)
    assert "# Before publishing say here" in text
    assert "pip install ." in text


# Pipelines of diffusers that a run leaves, and the case of their transformer.
_KNOWN = {"SanaPipeline": "Sana", "PixArtSigmaPipeline": "PixArt", "WanImageToVideoPipeline": "Wan"}
LEFT = _KNOWN | {
    stock.pipeline: next(name for name, case in CASES.items() if case.model is model)
    for model, stock in (*IMAGES.items(), *VIDEOS.items())
}


@pytest.mark.parametrize("name", LEFT)
def test_the_call_of_a_card_is_one_that_the_pipeline_takes_and_guides(name: str, tmp_path: Path) -> None:
    """Where diffusers has a true_cfg_scale it reads no other, and guides away from a given text alone."""
    pipeline = make_stock_pipeline(
        name, transformer=CASES[LEFT[name]].make(), scheduler=FlowMatchEulerDiscreteScheduler()
    )
    training = {"steps": 7, "sampled with": {"num_inference_steps": 20, "guidance_scale": 2.5}}
    (tmp_path / "training.json").write_text(json.dumps(training))
    write_model_card(pipeline, tmp_path, repo_id="x")
    shows = "video" if "3D" in type(pipeline.transformer).__name__ and "ToImage" not in name else "images"
    found = re.search(r"^(images|video) = pipe\((.*)\)\.(images|frames\[0\])$", card(tmp_path), re.MULTILINE)
    assert found is not None
    assert found[1] == shows
    signature = inspect.signature(type(pipeline).__call__)
    given = eval(f"bind(pipe, {found[2]})", {"bind": signature.bind, "pipe": pipeline, "image": None})
    given = given.arguments
    assert (given["prompt"], given["num_inference_steps"]) == ("...", 20)
    own = "true_cfg_scale" in signature.parameters
    assert given["true_cfg_scale" if own else "guidance_scale"] == 2.5
    assert given.get("negative_prompt") == ("" if own else None)
    assert ("sampled with.true cfg scale" in facts(card(tmp_path))) == own


def test_a_card_takes_the_scores_the_picture_and_the_licence_that_its_author_gives(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    folder, report = tmp_path / "pipeline", Path(__file__).parents[1] / "saved" / "report-image" / "report"
    make_pipeline().save_pretrained(folder)
    Image.new("RGB", (8, 8)).save(tmp_path / "grid.png")
    result = run_script(
        "card", "--model", folder, "--report", report, "--picture", tmp_path / "grid.png", "--name",
        "someone/pets", "--license", "apache-2.0", "--datasets", "[someone/photos]", "--base_model", "a/b",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    text, header = card(folder), ModelCard(card(folder)).data
    assert (header.license, header.datasets, header.base_model) == ("apache-2.0", ["someone/photos"], "a/b")
    assert "\n# pets\n" in text
    scores = json.loads((report / "report.json").read_text())["scores"]
    assert all(f"| {score['name']} |" in text for score in scores)
    listed = {result.metric_name: result for result in header.eval_results}
    assert {name: result.metric_value for name, result in listed.items()} == {
        score["name"]: score["value"] for score in scores
    }
    first = listed[scores[0]["name"]]
    assert (first.task_type, first.metric_type) == ("unconditional-image-generation", scores[0]["metric"])
    assert first.metric_args["interval of 95 %"] == scores[0]["interval"]
    assert (folder / "samples.png").read_bytes() == (tmp_path / "grid.png").read_bytes()
    assert run_script("card", "--model", tmp_path).returncode == 1
    write_card(str(folder), license="mit")
    header = ModelCard(card(folder)).data
    assert (header.license, header.datasets, header.base_model) == ("mit", ["someone/photos"], "a/b")


def reported(pipeline: Path, folder: Path, dtype: torch.dtype) -> str:
    """A report of samples that the pipeline has made in a dtype."""
    shutil.copytree(Path(__file__).parents[1] / "saved" / "report-image" / "report", folder)
    content = json.loads((folder / "report.json").read_text())
    content["generated"]["manifest"] = describe(MHLAPipeline.from_pretrained(pipeline, dtype=dtype))
    (folder / "report.json").write_text(json.dumps(content))
    return str(folder)


def test_a_card_shows_scores_of_its_own_pipeline_alone(
    make_pipeline: MakePipeline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one, another = tmp_path / "one", tmp_path / "another"
    for folder in (one, another):
        make_pipeline().save_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16):
        report = reported(one, tmp_path / str(dtype), dtype)
        write_card(str(one), report=report)
        assert "## Scores" in card(one)
        before = card(another)
        with pytest.raises(ValueError, match=r"scores of samples that another model made: .* SHA-256"):
            write_card(str(another), report=report)
        assert card(another) == before
    assert "does not say" not in caplog.text
    write_card(str(another), report=str(Path(__file__).parents[1] / "saved" / "report-image" / "report"))
    assert "does not say what made its samples" in caplog.text


def test_a_card_takes_nothing_that_is_not_so(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    folder, picture = tmp_path / "pipeline", tmp_path / "grid.png"
    make_pipeline(training={"trained": "all weights"}).save_pretrained(folder)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir())
    picture.write_text("no picture")
    Image.new("RGB", (8, 8)).save(tmp_path / "jpeg.png", "jpeg")
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"picture": str(picture)}, "is no picture that can be read"),
        ({"picture": str(tmp_path / "jpeg.png")}, "is of the format JPEG: give a PNG file"),
        ({"picture": str(tmp_path / "nowhere.png")}, "is no picture that can be read"),
        ({"license": "Not A Licence"}, "license must be a name of the hub"),
        ({"base_model": "no id!"}, "base_model must be a hub id"),
        ({"datasets": ("a b",)}, "datasets must be hub ids"),
        ({"name": "../pets"}, "name must be a hub id"),
        ({"converted": True}, "was trained since it was converted"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            write_card(str(folder), **arguments)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.iterdir()) == before


def test_a_converted_pipeline_of_diffusers_has_a_card_that_says_so(
    make_stock_video_pipeline: Callable[[str], Any], tmp_path: Path
) -> None:
    make_stock_video_pipeline("wan").save_pretrained(tmp_path / "stock")
    result = run_script(
        "convert", "--model", tmp_path / "stock", "--out", tmp_path / "mhla", "--mhla.blocks", "8"
    )
    assert result.returncode == 0, result.stderr
    text = card(tmp_path / "mhla")
    assert "**Converted, not fine-tuned yet.** Weights are those of stock;" in text
    assert 'video = pipe(prompt="...").frames[0]' in text
    assert ModelCard(text).data.pipeline_tag == "text-to-video"
    assert str(tmp_path) not in text
    assert facts(text)["blocks"].count("x") == 2
    assert facts(text)["softmax window"] == "shared, margin 0.25 of a block"
    write_card(str(tmp_path / "mhla"), license="mit")
    assert "**Converted, not fine-tuned yet.**" in card(tmp_path / "mhla")
    write_card(str(tmp_path / "mhla"), converted=False)
    assert "**Converted" not in card(tmp_path / "mhla")
    assert ModelCard(card(tmp_path / "mhla")).data.license == "mit"


def test_what_is_not_known_is_said_to_be_so(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline(vae=False).save_pretrained(tmp_path)
    table = facts(card(tmp_path))
    assert table["training"] == "not recorded"
    assert table["size"] == "8 x 8 pixels, pixel space"


def test_the_hub_reads_the_header(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path)
    data = ModelCard(card(tmp_path)).data
    assert data.library_name == "diffusers"
    assert {"mhla", "linear-attention"} <= set(data.tags)


def test_the_example_of_the_card_runs(
    make_pipeline: MakePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pipeline().save_pretrained(tmp_path / "pets")
    (code,) = re.findall(r"```python\n(.+?)```", card(tmp_path / "pets"), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code.replace("]).images", "], num_inference_steps=1).images"), names)
    assert isinstance(names["pipe"], MHLADiTPipeline)
    assert len(names["images"]) == 1


def test_saving_again_renews_a_card_of_ours(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path)
    make_pipeline(training=TRAINING).save_pretrained(tmp_path)
    assert facts(card(tmp_path))["steps"] == "1234"
    assert not list(tmp_path.glob("*.partial"))


def test_a_card_that_somebody_wrote_is_kept(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    (tmp_path / "README.md").write_text("# My pets\n")
    pipeline.save_pretrained(tmp_path)
    assert card(tmp_path) == "# My pets\n"


def test_a_card_that_somebody_edited_is_kept(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    """The mark in the card says that without it the card is theirs."""
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    edited = re.sub(r"<!--.*?-->", "Mine.", card(tmp_path))
    assert edited != card(tmp_path)
    (tmp_path / "README.md").write_text(edited, encoding="utf-8")
    pipeline.save_pretrained(tmp_path)
    assert card(tmp_path) == edited


def test_edits_are_seen_without_that_and_nothing_is_touched(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    folder, picture = tmp_path / "pipeline", tmp_path / "grid.png"
    make_pipeline().save_pretrained(folder)
    picture.write_bytes(b"new")
    edited = card(folder).replace("MHLA-DiT", "My model", 1)
    (folder / "README.md").write_text(edited, encoding="utf-8")
    (folder / "samples.png").write_bytes(b"old")
    make_pipeline().save_pretrained(folder)
    assert card(folder) == edited
    with pytest.raises(ValueError, match="was edited, and is not written again: move it away first"):
        write_card(str(folder), license="mit", picture=str(picture))
    assert (folder / "samples.png").read_bytes() == b"old"


def test_a_card_of_an_earlier_version_is_renewed(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path)
    old = re.sub(r" \(sha256 \w+\)", "", card(tmp_path)).replace("MHLA-DiT", "Another", 1)
    (tmp_path / "README.md").write_text(old, encoding="utf-8")
    make_pipeline().save_pretrained(tmp_path)
    assert "Another" not in card(tmp_path)


def test_a_loaded_stock_pipeline_has_a_card_too(
    make_stock_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    make_stock_pipeline().save_pretrained(tmp_path / "stock")
    MHLAPipeline.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    assert facts(card(tmp_path / "ours"))["attention"] == "softmax in 2 of 2 layers"


def test_a_pipeline_that_holds_a_stock_model_has_a_card_too(
    make_stock_pipeline: Callable[[], Any], tmp_path: Path
) -> None:
    MHLADiTPipeline(**make_stock_pipeline().components).save_pretrained(tmp_path)
    assert facts(card(tmp_path))["attention"] == "softmax in 2 of 2 layers"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What arrives where the hub would be: the two calls that reach for it are answered here."""
    received: dict[str, Any] = {}

    class Created:
        def __init__(self, repo_id: str) -> None:
            self.repo_id = f"someone/{repo_id.split('/')[-1]}"

    def create_repo(repo_id: str, **options: Any) -> Created:
        received["create"] = {"repo_id": repo_id, **options}
        return Created(repo_id)

    def upload_folder(*, repo_id: str, folder_path: str, **options: Any) -> str:
        files = {
            str(path.relative_to(folder_path)): path.read_bytes()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        }
        received["upload"] = {"repo_id": repo_id, "files": files, **options}
        return f"https://hub/{repo_id}"

    monkeypatch.setattr(mhla_diffusion.pipelines.model_card, "create_repo", create_repo)
    monkeypatch.setattr(diffusers.utils.hub_utils, "upload_folder", upload_folder)
    return received


@pytest.mark.parametrize("way", ["push_to_hub", "save_pretrained"])
def test_an_upload_holds_the_pipeline_and_its_card(
    make_pipeline: MakePipeline, hub: dict[str, Any], tmp_path: Path, way: str
) -> None:
    pipeline = make_pipeline(training=TRAINING)
    if way == "push_to_hub":
        address = pipeline.push_to_hub("pets", private=True, commit_message="First", token="t")
    else:
        address = pipeline.save_pretrained(
            tmp_path / "pets", push_to_hub=True, private=True, commit_message="First", token="t"
        )
    assert address == "https://hub/someone/pets"
    assert hub["create"].items() >= {"repo_id": "pets", "private": True, "token": "t"}.items()
    upload = hub["upload"]
    assert upload["repo_id"] == "someone/pets"
    assert upload["commit_message"] == "First"
    assert {"model_index.json", "README.md", "transformer/config.json"} <= upload["files"].keys()
    text = upload["files"]["README.md"].decode()
    assert 'MHLAPipeline.from_pretrained("someone/pets")' in text
    assert facts(text)["steps"] == "1234"

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiTPipeline, UNet2DModel, WanTransformer3DModel
from torch import Tensor

from mhla_diffusion import (
    MHLAConfig,
    MHLADiTPipeline,
    MHLADiTTransformer2DModel,
    MHLAPipeline,
    convert_to_mhla,
)
from mhla_diffusion.backbones import load_transformer
from mhla_diffusion.commands.card import card
from mhla_diffusion.planning import plan

MakePipeline = Callable[..., MHLADiTPipeline]
MakeStockPipeline = Callable[[], DiTPipeline]
SaveAsOnTheHub = Callable[[DiTPipeline, Path], None]


def generate(pipeline: Any, *, seed: int = 0, **arguments: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    settings = {
        "num_inference_steps": 2,
        "output_type": "pt",
        "generator": torch.Generator().manual_seed(seed),
    }
    return pipeline([0, 1], **{**settings, **arguments}).images


def same_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items())


def test_it_is_not_instantiated() -> None:
    with pytest.raises(TypeError, match=r"use MHLAPipeline\.from_pretrained"):
        MHLAPipeline()


@pytest.mark.parametrize("age", ["new", "as on the hub"])
def test_a_stock_pipeline_keeps_its_function(
    make_stock_pipeline: MakeStockPipeline,
    save_as_on_the_hub: SaveAsOnTheHub,
    assert_close: Callable[..., None],
    tmp_path: Path,
    age: str,
) -> None:
    stock = make_stock_pipeline()
    if age == "new":
        stock.save_pretrained(tmp_path)
    else:
        save_as_on_the_hub(stock, tmp_path)
    pipeline = MHLAPipeline.from_pretrained(tmp_path)
    assert type(pipeline) is MHLADiTPipeline
    assert isinstance(pipeline.transformer, MHLADiTTransformer2DModel)
    assert set(pipeline.transformer.layer_attention) == {"softmax"}
    if age == "as on the hub":  # DiTPipeline itself does not save its names
        assert pipeline.labels == {"tench": 0, "Tinca tinca": 0, "goldfish": 1}
    assert_close(generate(pipeline), generate(stock))
    assert generate(pipeline, height=8, width=32).shape == (2, 3, 8, 32)


@pytest.mark.parametrize("age", ["new", "as on the hub"])
@pytest.mark.parametrize(
    "config", [MHLAConfig(blocks=4), {"blocks": 4, "layers": [1], "gate": True}], ids=str
)
def test_a_stock_pipeline_is_converted_on_loading(
    make_stock_pipeline: MakeStockPipeline,
    save_as_on_the_hub: SaveAsOnTheHub,
    tmp_path: Path,
    age: str,
    config: MHLAConfig | dict[str, Any],
) -> None:
    stock = make_stock_pipeline()
    if age == "new":
        stock.save_pretrained(tmp_path / "stock")
    else:
        save_as_on_the_hub(stock, tmp_path / "stock")
    pipeline = MHLAPipeline.from_pretrained(tmp_path / "stock", mhla_config=config)
    assert "mhla" in pipeline.transformer.layer_attention
    assert same_weights(stock.transformer, pipeline.transformer)
    pipeline.save_pretrained(tmp_path / "converted")
    again = MHLAPipeline.from_pretrained(tmp_path / "converted")
    assert again.transformer.layer_attention == pipeline.transformer.layer_attention
    assert torch.equal(generate(again), generate(pipeline))


LOAD_AND_GENERATE = """
import sys
import torch
import mhla_diffusion
from diffusers import DiffusionPipeline

openers = {"ours": mhla_diffusion.MHLAPipeline, "stock": DiffusionPipeline}
images = {}
for name, opener in openers.items():
    pipeline = opener.from_pretrained(f"{sys.argv[1]}/{name}")
    generator = torch.Generator().manual_seed(0)
    images[name] = pipeline([0, 1], generator=generator, num_inference_steps=2, output_type="np").images
torch.save(images, f"{sys.argv[1]}/images.pt")
"""


def test_a_new_process_generates_the_same_images(
    make_pipeline: MakePipeline, make_stock_pipeline: MakeStockPipeline, tmp_path: Path
) -> None:
    """Ours, and diffusers' own pipeline with our model in it."""
    stock = make_stock_pipeline()
    stock.register_modules(transformer=make_pipeline(num_embeds_ada_norm=1000, out_channels=8).transformer)
    pipelines = {"ours": make_pipeline(), "stock": stock}
    for name, pipeline in pipelines.items():
        pipeline.save_pretrained(tmp_path / name)
    subprocess.run([sys.executable, "-c", LOAD_AND_GENERATE, str(tmp_path)], check=True, timeout=200)
    images = torch.load(tmp_path / "images.pt", weights_only=False)
    for name, pipeline in pipelines.items():
        assert (images[name] == generate(pipeline, output_type="np")).all()


def test_an_mhla_pipeline_is_given_another_config_on_loading(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path)
    again = MHLAPipeline.from_pretrained(tmp_path, mhla_config={"blocks": (1, 2)})
    assert again.transformer.mixing_blocks == (1, 2)
    assert torch.equal(again.transformer.pos_embed.proj.weight, pipeline.transformer.pos_embed.proj.weight)


def test_dtype_reaches_a_conversion(make_stock_pipeline: MakeStockPipeline, tmp_path: Path) -> None:
    make_stock_pipeline().save_pretrained(tmp_path)
    pipeline = MHLAPipeline.from_pretrained(tmp_path, mhla_config={"blocks": 4}, dtype=torch.bfloat16)
    assert {p.dtype for p in pipeline.transformer.parameters()} == {torch.bfloat16}


def test_a_transformer_handed_in_takes_the_place_of_the_stored_one(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    make_pipeline().save_pretrained(tmp_path)
    mine = make_pipeline().transformer
    assert MHLAPipeline.from_pretrained(tmp_path, transformer=mine).transformer is mine


def test_subfolder_of_a_folder(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    pipeline = make_pipeline()
    pipeline.save_pretrained(tmp_path / "checkpoints" / "last")
    loaded = MHLAPipeline.from_pretrained(tmp_path, subfolder="checkpoints/last")
    assert torch.equal(generate(loaded), generate(pipeline))
    with pytest.raises(ValueError, match=r"has no subfolder 'checkpoints/first'"):
        MHLAPipeline.from_pretrained(tmp_path, subfolder="checkpoints/first")


@pytest.fixture
def hub_cache(make_pipeline: MakePipeline, tmp_path: Path) -> tuple[Path, dict[str, MHLADiTPipeline]]:
    """A hub cache that holds someone/pets: revisions main and v2, and a pipeline in a subfolder of v2."""
    repository = tmp_path / "models--someone--pets"
    pipelines = {name: make_pipeline() for name in ("main", "v2", "v2/small")}
    (repository / "refs").mkdir(parents=True)
    for revision, digit in (("main", "a"), ("v2", "b")):
        (repository / "refs" / revision).write_text(digit * 40)
        pipelines[revision].save_pretrained(repository / "snapshots" / (digit * 40))
    pipelines["v2/small"].save_pretrained(repository / "snapshots" / ("b" * 40) / "small")
    return tmp_path, pipelines


@pytest.mark.parametrize("local_files_only", [True, False])
@pytest.mark.parametrize(
    ("name", "arguments"),
    [("main", {}), ("v2", {"revision": "v2"}), ("v2/small", {"revision": "v2", "subfolder": "small"})],
    ids=["default", "revision", "subfolder"],
)
def test_hub_arguments_choose_what_is_loaded(
    hub_cache: tuple[Path, dict[str, MHLADiTPipeline]],
    name: str,
    arguments: dict[str, str],
    local_files_only: bool,
) -> None:
    """From the cache; without local_files_only the hub is asked first and, being offline, is not there."""
    cache, pipelines = hub_cache
    loaded = MHLAPipeline.from_pretrained(
        "someone/pets", cache_dir=cache, local_files_only=local_files_only, **arguments
    )
    assert same_weights(loaded.transformer, pipelines[name].transformer)


def test_a_transformer_is_found_in_a_pipeline_on_the_hub(
    hub_cache: tuple[Path, dict[str, MHLADiTPipeline]],
) -> None:
    cache, pipelines = hub_cache
    loaded = load_transformer("someone/pets", cache_dir=cache, local_files_only=True, revision="v2")
    assert same_weights(loaded, pipelines["v2"].transformer)


@pytest.mark.parametrize("component", ["transformer", "transformer_2"])
def test_each_of_two_experts_is_loaded_as_it_is_stored(
    make_stock_video_pipeline: Callable[[str], Any], tmp_path: Path, component: str
) -> None:
    pipeline = make_stock_video_pipeline("wan2.2")
    pipeline.save_pretrained(tmp_path)
    loaded = load_transformer(str(tmp_path), component=component)
    assert type(loaded) is WanTransformer3DModel
    assert same_weights(loaded, getattr(pipeline, component))
    ours = convert_to_mhla(loaded, MHLAConfig(layers=()))
    ours.save_pretrained(tmp_path / component)
    assert type(load_transformer(str(tmp_path), component=component)) is type(ours)


def test_what_is_not_in_the_cache_is_named(hub_cache: tuple[Path, Any]) -> None:
    with pytest.raises(OSError, match="someone/cars"):
        MHLAPipeline.from_pretrained("someone/cars", cache_dir=hub_cache[0], local_files_only=True)


def test_a_single_model_is_refused_with_the_remedy(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline().transformer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError,
        match=r"single model.* mhla_diffusion\.MHLADiTTransformer2DModel\.from_pretrained .*as transformer=",
    ):
        MHLAPipeline.from_pretrained(tmp_path)


def test_a_pipeline_with_a_config_beside_its_index_is_a_pipeline(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    """Repositories carry one so that the hub counts downloads."""
    make_pipeline().save_pretrained(tmp_path)
    shutil.copy(tmp_path / "model_index.json", tmp_path / "config.json")
    assert isinstance(MHLAPipeline.from_pretrained(tmp_path), MHLADiTPipeline)


def test_another_kind_of_pipeline_is_refused(tmp_path: Path) -> None:
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4,), layers_per_block=1,
        norm_num_groups=2, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    DDPMPipeline(unet, DDPMScheduler()).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds a DDPMPipeline, which has no MHLA form; .*DiTTransformer2DModel"
    ):
        MHLAPipeline.from_pretrained(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"model_index\.json"):
        MHLAPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize("command", ["pipeline", "plan", "card"])
def test_of_the_folder_of_a_training_its_pipeline_is_named(command: str, tmp_path: Path) -> None:
    def open_it() -> None:
        if command == "pipeline":
            MHLAPipeline.from_pretrained(tmp_path)
        elif command == "plan":
            plan(str(tmp_path), 16, 16)
        else:
            card(str(tmp_path))

    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints").mkdir()
    for expected in ("mhla export-checkpoint writes its pipeline", "its pipeline is .*/pipeline"):
        with pytest.raises(ValueError, match=f"is of the output folder of a training: {expected}"):
            open_it()
        (tmp_path / "pipeline").mkdir(exist_ok=True)


def test_a_checkpoint_is_no_pipeline_and_a_path_to_nothing_no_name_on_the_hub(
    make_pipeline: MakePipeline, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    make_pipeline().save_pretrained(tmp_path / "pipeline")
    MHLAPipeline.from_pretrained(tmp_path / "pipeline")
    load_transformer(str(tmp_path / "pipeline" / "transformer"))
    for name in ("checkpoints", "checkpoints/step-00000002"):
        with pytest.raises(ValueError, match=r"is of the output folder of a training: its pipeline is"):
            MHLAPipeline.from_pretrained(tmp_path / name)
    for path in (tmp_path / "nothing", "./nothing", "a/b/c"):
        with pytest.raises(
            ValueError, match=r"(nothing|a/b/c) does not exist; on the hub models are called OWNER"
        ):
            MHLAPipeline.from_pretrained(path)


def test_the_index_names_the_package_and_not_its_files(make_pipeline: MakePipeline, tmp_path: Path) -> None:
    make_pipeline().save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "MHLADiTPipeline"
    assert index["transformer"] == ["mhla_diffusion", "MHLADiTTransformer2DModel"]

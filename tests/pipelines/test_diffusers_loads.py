"""What diffusers itself opens once the package is imported."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoModel,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    DiTPipeline,
    SanaPAGPipeline,
    SanaPipeline,
    WanPipeline,
)

from mhla_diffusion import MHLADiTPipeline, MHLAPipeline, MHLAWanPipeline, convert_to_mhla
from mhla_diffusion.backbones import BACKBONES
from mhla_diffusion.pipelines.auto import _OWN
from mhla_diffusion.pipelines.identity import weights_sha256

OPEN = """
import sys
{first}
{second}
from diffusers import DiffusionPipeline
print(type(DiffusionPipeline.from_pretrained(sys.argv[1])).__name__)
"""


@pytest.mark.parametrize("order", [0, 1], ids=["after diffusers", "before diffusers"])
def test_diffusion_pipeline_opens_our_pipelines_whichever_was_imported_first(
    make_pipeline: Callable[..., MHLADiTPipeline], tmp_path: Path, order: int
) -> None:
    make_pipeline().save_pretrained(tmp_path)
    imports = ["import diffusers", "import mhla_diffusion"]
    first, second = imports[::-1] if order else imports
    program = OPEN.format(first=first, second=second)
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True)
    assert run.stdout == "MHLADiTPipeline\n", run.stderr


def test_importing_the_package_imports_no_diffusers() -> None:
    program = "import sys, mhla_diffusion; assert not {'torch', 'diffusers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_pipelines_exchange_their_parts_with_from_pipe(
    make_pipeline: Callable[..., MHLADiTPipeline],
    make_stock_pipeline: Callable[[], DiTPipeline],
    make_stock_video_pipeline: Callable[[str], Any],
) -> None:
    ours = make_pipeline()
    assert MHLADiTPipeline.from_pipe(ours, scheduler=ours.scheduler).transformer is ours.transformer
    stock = make_stock_pipeline()
    assert MHLADiTPipeline.from_pipe(stock).transformer is stock.transformer
    wan = make_stock_video_pipeline("wan")
    wan.register_modules(transformer=convert_to_mhla(wan.transformer))
    video = MHLAWanPipeline.from_pipe(wan)
    assert video.transformer is wan.transformer
    # diffusers hands on parts of exactly the class that a pipeline names: a subclass is given by hand.
    back = WanPipeline.from_pipe(video, transformer=video.transformer)
    assert back.transformer is wan.transformer


def test_auto_pipelines_open_stock_pipelines_with_our_transformers(
    sana_pipeline: SanaPipeline, tmp_path: Path
) -> None:
    sana_pipeline.save_pretrained(tmp_path / "stock")
    converted = MHLAPipeline.from_pretrained(tmp_path / "stock", mhla_config={"blocks": 4})
    converted.save_pretrained(tmp_path / "mhla")
    pipe = AutoPipelineForText2Image.from_pretrained(tmp_path / "mhla")
    assert type(pipe) is SanaPipeline
    assert type(pipe.transformer).__name__ == "MHLASanaTransformer2DModel"
    assert type(AutoPipelineForText2Image.from_pipe(pipe, enable_pag=True)) is SanaPAGPipeline


def test_a_name_that_nobody_has_is_diffusers_own_error() -> None:
    import diffusers

    with pytest.raises(AttributeError, match="module diffusers has no attribute NoSuchPipeline"):
        diffusers.NoSuchPipeline  # noqa: B018
    assert not hasattr(diffusers, "MHLANoSuchPipeline")
    assert not hasattr(diffusers, "__bool__"), "None has it"


def test_every_pipeline_of_ours_and_every_model_is_found_by_diffusers() -> None:
    import diffusers

    for ours in (*_OWN.values(), *BACKBONES.values()):
        assert getattr(diffusers, ours.__name__) is ours


def test_auto_model_opens_a_transformer_alone(
    make_pipeline: Callable[..., MHLADiTPipeline], tmp_path: Path
) -> None:
    model = make_pipeline().transformer
    model.save_pretrained(tmp_path)
    opened = AutoModel.from_pretrained(str(tmp_path))
    assert type(opened) is type(model)
    assert weights_sha256(opened) == weights_sha256(model)


def test_what_diffusion_pipeline_opens_generates_as_ours_does(
    make_pipeline: Callable[..., MHLADiTPipeline], tmp_path: Path
) -> None:
    ours = make_pipeline()
    ours.save_pretrained(tmp_path)
    opened = DiffusionPipeline.from_pretrained(tmp_path)
    call: dict[str, Any] = {"num_inference_steps": 2, "output_type": "pt"}
    images = [pipe("cat", generator=torch.manual_seed(0), **call).images for pipe in (ours, opened)]
    assert torch.equal(*images)

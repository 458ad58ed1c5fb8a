"""Write what tests/test_saved.py opens: pipelines, checkpoints in mid-run, an unfinished folder, reports.

Run once, by version 0.1.0 of the package, so that everything later still opens what it wrote:

    python tests/saved/make.py

What is here is not written again when the package changes; a new kind gets an entry of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import yaml
from diffusers import (
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    SanaVideoPipeline,
)
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

import mhla_diffusion
from mhla_diffusion import MHLADiTPipeline, MHLAWanPipeline

HERE = Path(__file__).parent
KINDS: dict[str, dict[str, Any]] = {
    "mhla": {"attention": "mhla"},
    "hybrid": {"mhla": {"layers": [1]}},
    "stock": {"attention": None},  # softmax, for SanaVideo its linear attention
}
MHLA: dict[str, Any] = {"gate": True, "output_norm": True}


def machine() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return {
        "torch": torch.__version__,
        "processor": sorted({line.partition(":")[2].strip() for line in lines if line.startswith("model")}),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def randomize(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        low, high = (0.1, 0.9) if name.endswith(".mixing") else (-0.3, 0.3)
        with torch.no_grad():
            parameter.copy_(low + (high - low) * torch.rand(parameter.shape, generator=generator))


def text_parts() -> dict[str, Any]:
    torch.manual_seed(0)
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(letter, -float(i)) for i, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyz")]
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return {
        "tokenizer": T5Tokenizer(vocab=pieces, extra_ids=0),
        "text_encoder": UMT5EncoderModel(config).eval(),
    }


def settings(kind: str, stock: str, **mhla: Any) -> dict[str, Any]:
    chosen = KINDS[kind]
    config = {**MHLA, **mhla, **chosen.get("mhla", {})}
    attention = chosen.get("attention", "mhla") or stock
    return {"attention": attention, "mhla_config": config}


def dit(kind: str) -> Any:
    model = mhla_diffusion.MHLADiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=3, **settings(kind, "softmax", blocks=4, cpe="zero"),
    ).eval()  # fmt: skip
    randomize(model, 1)
    return MHLADiTPipeline(model, FlowMatchEulerDiscreteScheduler(), id2label={0: "cat", 1: "dog", 2: "fox"})


def wan(kind: str) -> Any:
    model = mhla_diffusion.MHLAWanTransformer3DModel(
        patch_size=(2, 4, 4), num_attention_heads=2, attention_head_dim=8, in_channels=1, out_channels=1,
        num_layers=2, text_dim=16, freq_dim=16, ffn_dim=16, sample_grid=(2, 2, 3),
        **settings(kind, "softmax", blocks=[1, 1, 2], normalizer="none"),
    ).eval()  # fmt: skip
    randomize(model, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return MHLAWanPipeline(
        **text_parts(), transformer=model, scheduler=scheduler, max_sequence_length=8, fps=8.0
    )


def sana_video(kind: str) -> Any:
    model = mhla_diffusion.MHLASanaVideoTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, num_layers=2,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_grid=(3, 2, 3), **settings(kind, "linear", blocks=[1, 1, 3]),
    ).eval()  # fmt: skip
    randomize(model, 3)
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaVideoPipeline(**text_parts(), vae=vae, transformer=model, scheduler=scheduler)


PIPELINES: dict[str, Any] = {"dit": dit, "wan": wan, "sana_video": sana_video}


@torch.no_grad()
def generate(name: str, pipeline: Any) -> Tensor:
    """What a pipeline makes, at another size than its own too."""
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    call: dict[str, Any] = {"num_inference_steps": 2, "generator": generator, "output_type": "pt"}
    if name == "dit":
        return pipeline(["dog", 2], height=8, width=12, **call).images
    if name == "wan":
        return pipeline("a cat", num_frames=4, height=8, width=12, **call).frames
    return pipeline(
        "a cat", height=32, width=64, frames=5, max_sequence_length=8, complex_human_instruction=None,
        use_resolution_binning=False, **call | {"output_type": "latent"},
    ).frames  # fmt: skip


def image_training() -> dict[str, Any]:
    return {
        "output_dir": "run",
        "model": {
            "sample_size": 28, "patch_size": 4, "in_channels": 1, "num_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 8, "num_embeds_ada_norm": 10,
            "mhla": {"blocks": 4, "cpe": "zero", "gate": True},
        },
        "data": {"source": "mnist", "flip": True},
        "objective": {"name": "ddpm"},
        "trainer": {
            "max_steps": 6, "batch_size": 4, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0,
            "log_every": 1, "checkpoint_every": 3,
            "optimizer": {"learning_rate": 0.01, "schedule": "cosine", "warmup_steps": 2},
        },
    }  # fmt: skip


def video_training() -> dict[str, Any]:
    return {
        "output_dir": "run",
        "model": {
            "patch_size": [2, 8, 8], "in_channels": 1, "num_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 8, "ffn_dim": 16, "mhla": {"blocks": [1, 1, 2], "gate": True},
        },
        "data": {
            "source": "moving_mnist", "frames": 4, "sizes": [[24, 24]],
            "moving_digits": {"digits": 1, "digit_size": 12, "num_clips": 10},
        },
        "text": {"encoder": "text", "max_length": 32},
        "objective": {"shift": 2.0},
        "trainer": {
            "max_steps": 6, "batch_size": 4, "log_every": 1, "checkpoint_every": 3,
            "optimizer": {"learning_rate": 0.01},
        },
    }  # fmt: skip


def make_training(kind: str, config: dict[str, Any]) -> None:
    """A whole run in a folder of its own, of which the checkpoint and the end are kept."""
    from tests.processes import ROOT

    target = HERE / f"training-{kind}"
    target.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "video":
            for part in text_parts().values():
                part.save_pretrained(target / "text")
            shutil.copytree(target / "text", Path(folder) / "text")
        (Path(folder) / "config.yaml").write_text(yaml.safe_dump(config))
        script = ROOT / "scripts" / f"train_{kind}.py"
        environment = "OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1"
        command = f"cd {folder} && {environment} {sys.executable} {script} --config config.yaml"
        if os.system(command):
            raise SystemExit(f"{command} failed")
        run = Path(folder) / "run"
        shutil.copyfile(Path(folder) / "config.yaml", target / "config.yaml")
        shutil.copytree(run / "checkpoints" / "step-00000003", target / "step-00000003")
        shutil.copyfile(run / "metrics.jsonl", target / "metrics.jsonl")
        weights = run / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors"
        shutil.copyfile(weights, target / "end.safetensors")


def make_reports() -> None:
    """Two folders of pictures and two of clips, what they scored, and the cache."""
    from mhla_diffusion.evaluation import evaluate_images, evaluate_videos
    from mhla_diffusion.files.videos import write_video

    random = np.random.default_rng(0)
    for number, name in enumerate(("real", "generated")):
        for i in range(10):
            pixels = random.integers(0, 150 + 80 * number, (6, 6, 3), dtype=np.uint8)
            path = HERE / "report-image" / name / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((24, 24), Image.Resampling.NEAREST).save(path)
        for i in range(4):
            frames = np.zeros((9, 32, 32, 3), np.uint8)
            for frame in range(9):
                frames[frame, frame : frame + 12, 5 * i : 5 * i + 12, number] = 200 - 20 * i
            write_video(frames, HERE / "report-video" / name / f"{i}.mp4", fps=8)
    os.chdir(HERE)
    for kind, evaluate, more in (
        ("image", evaluate_images, {"extractor": "efficientnet_lite0"}),
        ("video", evaluate_videos, {"extractor": "transnetv2", "frames": 8}),
    ):
        folder = Path(f"report-{kind}")
        report = evaluate(folder / "real", folder / "generated", cache=folder / "cache", bootstrap=4, **more)
        report.save(folder / "report")


def make_unfinished() -> None:
    """A folder of images with the files of its first batch."""
    from mhla_diffusion.pipelines.generation import generate_images

    pipeline = mhla_diffusion.MHLAPipeline.from_pretrained(HERE / "pipelines" / "dit-mhla")
    out = HERE / "unfinished"
    manifest = generate_images(pipeline, out, num_images=6, batch_size=3, num_inference_steps=2, seed=5)
    content = json.loads(manifest.read_text())
    content |= {"complete": False, "model": "pipelines/dit-mhla"}
    manifest.write_text(json.dumps(content, indent=1))
    (HERE / "unfinished-rest").mkdir()
    for row in content["images"][3:]:
        (out / row["file"]).rename(HERE / "unfinished-rest" / row["file"])


def main() -> None:
    torch.set_num_threads(1)
    outputs = {}
    for name, make in PIPELINES.items():
        for kind in KINDS:
            pipeline = make(kind)
            pipeline.save_pretrained(HERE / "pipelines" / f"{name}-{kind}")
            outputs[f"{name}-{kind}"] = generate(name, pipeline).contiguous()
    save_file(outputs, HERE / "outputs.safetensors")
    make_training("image", image_training())
    make_training("video", video_training())
    make_unfinished()
    make_reports()
    (HERE / "machine.json").write_text(json.dumps(machine(), indent=2) + "\n")


if __name__ == "__main__":
    main()

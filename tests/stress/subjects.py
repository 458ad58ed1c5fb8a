"""What faults are done to: commands on tiny things, and what of their output is the same every time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from tests.processes import Script

Digest = dict[str, str]


@dataclass(frozen=True)
class Subject:
    """Command that leaves something behind.

    Args:
        name: of the subject.
        script: of scripts/.
        arguments: of the command, with ``{out}`` where its output goes.
        digest: hashes of what has to be the same whenever it is done, of the folder that it leaves.
        again: more arguments to go on with what was begun.
        done_once: a second time is refused, as what is there is not replaced.
    """

    name: str
    script: str
    arguments: tuple[str, ...]
    digest: Callable[[Path], Digest]
    again: tuple[str, ...] = ()
    done_once: bool = False

    def start(
        self, out: Path, *more: str, before: Callable[[], object] | None = None, again: bool = False
    ) -> Script:
        arguments = [argument.replace("{out}", str(out)) for argument in self.arguments]
        return Script(self.script, *arguments, *(self.again if again else ()), *more, before=before)

    def run(self, out: Path, *more: str, again: bool = False) -> CompletedProcess[str]:
        return self.start(out, *more, again=again).finish()


def digest_files(folder: Path, pattern: str = "**/*") -> Digest:
    """Hash every visible file below a folder."""
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    visible = [path for path in paths if not any(p.startswith(".") for p in path.relative_to(folder).parts)]
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in visible
    }


def _digest_training(folder: Path) -> Digest:
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = max(path.name for path in folder.glob("checkpoints/step-*"))  # a signal leaves one more before
    return {
        **digest_files(folder, "pipeline/**/*"),
        **digest_files(folder, f"checkpoints/{last}/*.safetensors"),
        "losses": str([(line["step"], line["loss"]) for line in metrics]),
    }


def _digest_generation(folder: Path) -> Digest:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["complete"]
    found = digest_files(folder)
    return {name: value for name, value in found.items() if name != "SHA256SUMS"}


def _digest_report(folder: Path) -> Digest:
    report = json.loads((folder / "report.json").read_text())
    for key in ("date", "command"):
        report["protocol"].pop(key)
    names = {"report.md", "report.html", "samples.json"}
    assert names <= {path.name for path in folder.iterdir()}
    return {"report": json.dumps({**report, "real": report["real"]["count"]}, sort_keys=True)}


def prepare(place: Path) -> dict[str, Subject]:
    """Make what the subjects need in a folder, unless it is there; return the subjects by their names."""
    if not (place / "ready").exists():
        place.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        _write_images(place / "images")
        _write_models(place)
        (place / "training.yaml").write_text(yaml.safe_dump(_training(place)))
        (place / "ready").touch()
    return {subject.name: subject for subject in _subjects(place)}


def _subjects(place: Path) -> Iterator[Subject]:
    training = ("--config", str(place / "training.yaml"), "--output_dir", "{out}")
    yield Subject("training", "train_image", training, _digest_training, again=("--resume", "latest"))
    images = ("image", "--model", str(place / "pipeline"), "--num", "12", "--batch_size", "2", "--steps", "2")
    yield Subject("images", "generate", (*images, "--out", "{out}"), _digest_generation)
    videos = ("video", "--model", str(place / "wan"), "--prompts", "a b", "--num", "3", "--batch_size", "1")
    size = ("--steps", "1", "--height", "32", "--width", "32", "--frames", "5", "--guidance", "1")
    options = ("--options", '{"max_sequence_length": 8}', "--out", "{out}")
    yield Subject("videos", "generate", (*videos, *size, *options), _digest_generation)
    sets = ("--real", str(place / "images" / "cat"), "--generated", str(place / "images" / "dog"))
    score = ("image", *sets, "--extractor", "efficientnet_lite0", "--bootstrap", "2", "--batch_size", "4")
    report = ("--cache", "{out}-cache", "--out", "{out}")
    yield Subject("scoring", "evaluate", (*score, *report), _digest_report, done_once=True)
    latents = ("image", "--vae", str(place / "vae"), "--size", "16", "--shard_size", "3")
    data = ("--data.source", "folder", "--data.path", str(place / "images"), "--output_dir", "{out}")
    yield Subject("caching", "cache_latents", (*latents, *data), digest_files)
    convert = ("--model", str(place / "stock"), "--mhla.blocks", "4", "--out", "{out}")
    yield Subject("conversion", "convert", convert, digest_files, done_once=True)
    export = ("--data.source", "folder", "--data.path", str(place / "images"), "--out", "{out}")
    yield Subject("export", "export_images", export, digest_files, done_once=True)


def _training(place: Path) -> dict[str, Any]:
    """A run of 12 steps with a checkpoint every second."""
    optimizer = {"learning_rate": 0.01}
    return {
        "output_dir": str(place / "unused"),
        "model": {
            "sample_size": 8, "patch_size": 2, "in_channels": 1, "num_layers": 1, "num_attention_heads": 2,
            "attention_head_dim": 8, "num_embeds_ada_norm": 2,
            "mhla": {"blocks": 4, "cpe": "zero", "gate": True},
        },
        "data": {"source": "folder", "path": str(place / "images"), "flip": True},
        "trainer": {
            "max_steps": 12, "batch_size": 8, "max_grad_norm": 1.0, "log_every": 1, "checkpoint_every": 2,
            "optimizer": optimizer,
        },
        "sampling": {"num_inference_steps": 2, "images_per_class": 1, "every": 3},
    }  # fmt: skip


def _write_images(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(10):
            pixels = generator.integers(0, 256, (9, 10 + number % 5, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def _write_models(place: Path) -> None:
    from diffusers import (
        AutoencoderKL,
        AutoencoderKLWan,
        DDIMScheduler,
        DiTPipeline,
        DiTTransformer2DModel,
        FlowMatchEulerDiscreteScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

    from mhla_diffusion import MHLAConfig, MHLAPipeline

    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), latent_channels=4, norm_num_groups=2, sample_size=16,
    )  # fmt: skip
    vae.save_pretrained(place / "vae")
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2,
        sample_size=8, patch_size=2,
    )  # fmt: skip
    names = {0: "cat", 1: "dog"}
    stock = DiTPipeline(transformer, vae=vae, scheduler=DDIMScheduler(), id2label=names)
    stock.save_pretrained(place / "stock")
    config = MHLAConfig(blocks=4)
    MHLAPipeline.from_pretrained(place / "stock", mhla_config=config).save_pretrained(place / "pipeline")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), ("a", -2.0), ("b", -3.0)]
    wan = WanPipeline(
        tokenizer=T5Tokenizer(vocab=pieces, extra_ids=0),
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
        ),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        transformer=WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=12, in_channels=16, out_channels=16, text_dim=16,
            freq_dim=16, ffn_dim=16, num_layers=1,
        ),
    )  # fmt: skip
    wan.save_pretrained(place / "wan-stock")
    MHLAPipeline.from_pretrained(place / "wan-stock", mhla_config=MHLAConfig(blocks=2)).save_pretrained(
        place / "wan"
    )

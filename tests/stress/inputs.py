"""Valid inputs of many kinds, and what a user does with them."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from .bench import Bench


@dataclass(frozen=True)
class Input:
    """Kind of input.

    Args:
        name: of the kind.
        write: writes valid ones into a new folder, and returns which file is changed.
        read: does with it what a user would, and returns ``read`` or ``skipped``.
        structured: how the file is parsed and written again, where values are to be changed too.
        text: whether words are put in.
        named: whether a refusal has to say which file; else which key.
    """

    name: str
    write: Callable[[Bench, Path, int], Path]
    read: Callable[[Bench, Path, Path], str]
    structured: tuple[Callable[[str], Any], Callable[[Any], str]] | None = None
    text: bool = False
    named: bool = True


def _means(batch: torch.Tensor) -> torch.Tensor:
    return batch.flatten(2).mean(-1)


def _score(open_set: Callable[[Path], Any], place: Path) -> str:
    """Pass over a set, and count what was read and what was skipped."""
    from mhla_diffusion.evaluation.measure import PassSettings, measure
    from mhla_diffusion.evaluation.networks.extractor import FeatureExtractor

    extractor = FeatureExtractor(
        name="means", score_name="fd_means", dimension=3, network=_means, resize="none", normalization="none",
        prepare=lambda x: np.moveaxis(x, -1, 0).reshape(3, -1, 1).astype(np.float32), weights="none",
        weights_sha256="0",
    )  # fmt: skip
    samples = open_set(place)
    found = measure(samples, [extractor], PassSettings(max_skipped=1.0), title="fuzzed")
    summary = found.summary
    assert summary.count is not None
    assert summary.count + len(summary.skipped) == len(samples.names)
    return "skipped" if summary.skipped else "read"


def _picture(draw: np.random.Generator) -> Image.Image:
    return Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))


_PICTURES = (
    *(
        ".png",
        ".jpg",
        ".tiff",
        ".webp",
        ".gif",
        ".bmp",
        ".ppm",
        ".tga",
        ".ico",
        ".avif",
        ".jp2",
        ".pcx",
        ".sgi",
    ),
    *(".dds", ".im", ".qoi", ".icns"),
)


def _write_pictures(bench: Bench, place: Path, variant: int) -> Path:
    draw = np.random.default_rng(variant)
    (place / "cat").mkdir()
    for number in range(3):
        _picture(draw).save(place / "cat" / f"{number}.png")
    path = place / "cat" / f"changed{_PICTURES[variant % len(_PICTURES)]}"
    _picture(draw).resize((16, 16)).save(path)
    return path


def _read_pictures(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.evaluation.sets.images import open_images

    trained = _load_all(bench, "image", {"source": "folder", "path": str(place)})
    scored = _score(open_images, place)
    return "skipped" if "skipped" in (trained, scored) else "read"


def _load_all(bench: Bench, kind: str, data: dict[str, Any]) -> str:
    """Load every sample of a source as training does; one that cannot be read is skipped."""
    from mhla_diffusion.training import data as sources
    from mhla_diffusion.training.data.images import ImageSamples
    from mhla_diffusion.training.data.stream import UnreadableSampleError

    samples: Any
    if kind == "image":
        samples = ImageSamples(sources.open_images(sources.DataConfig(**data)), channels=3, sizes=[(8, 8)])
    else:
        config = sources.VideoDataConfig(**data, frames=4, sizes=((16, 16),))
        samples = sources.VideoSamples(sources.open_videos(config), config, channels=3)
    outcome = "read"
    for index in range(len(samples)):
        try:
            assert samples.load(index, torch.Generator().manual_seed(0))["samples"].isfinite().all()
        except UnreadableSampleError:
            outcome = "skipped"
    return outcome


_VIDEOS = {
    ".mp4": ("libx264", "yuv420p"), ".mkv": ("libx264", "yuv420p"), ".avi": ("mpeg4", "yuv420p"),
    ".webm": ("libvpx-vp9", "yuv420p"), ".mov": ("mjpeg", "yuvj420p"), ".ts": ("mpeg2video", "yuv420p"),
    ".flv": ("flv", "yuv420p"), ".gif": ("gif", "rgb8"),
}  # fmt: skip


def _write_videos(bench: Bench, place: Path, variant: int) -> Path:
    import av

    draw, suffix = np.random.default_rng(variant), list(_VIDEOS)[variant % len(_VIDEOS)]
    (place / "captions.csv").write_text("path,caption\n" + "".join(f"{n}{suffix},a b\n" for n in range(3)))
    (place / "clips").mkdir()
    codec, pixels = _VIDEOS[suffix]
    for number in range(3):
        with av.open(str(place / "clips" / f"{number}{suffix}"), "w") as container:
            stream: Any = container.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, pixels
            for _ in range(8):
                frame = av.VideoFrame.from_ndarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                container.mux(stream.encode(frame.reformat(format=pixels)))
            container.mux(stream.encode(None))
    return place / "clips" / f"1{suffix}"


def _read_videos(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.evaluation.sets.videos import open_videos

    data = {"source": "folder", "path": str(place / "clips"), "captions": str(place / "captions.csv")}
    trained = _load_all(bench, "video", data)
    scored = _score(partial(open_videos, frames=4), place / "clips")
    return "skipped" if "skipped" in (trained, scored) else "read"


def _write_npz(bench: Bench, place: Path, variant: int) -> Path:
    draw = np.random.default_rng(variant)
    save = np.savez_compressed if variant % 2 else np.savez
    save(place / "set.npz", arr_0=draw.integers(0, 256, (4, 8, 8, 3), dtype=np.uint8), arr_1=np.arange(4))
    return place / "set.npz"


def _read_npz(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.evaluation.sets.images import open_images

    scored = _score(open_images, path)
    _load_all(bench, "image", {"source": "npz", "path": str(path)})
    return scored


def _write_npy(bench: Bench, place: Path, variant: int) -> Path:
    draw = np.random.default_rng(variant)
    clips = draw.random((3, 6, 3, 8, 8), dtype=np.float32)
    np.save(place / "set.npy", clips if variant % 2 else (255 * np.moveaxis(clips, 2, -1)).astype(np.uint8))
    return place / "set.npy"


def _read_npy(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.evaluation.sets.videos import open_videos

    return _score(partial(open_videos, frames=4), path)


def _write_archive(bench: Bench, place: Path, variant: int) -> Path:
    draw, pictures = np.random.default_rng(variant), io.BytesIO
    files: dict[str, bytes] = {}
    for number in range(4):
        buffer = pictures()
        _picture(draw).save(buffer, "PNG")
        files |= {f"{number}.png": buffer.getvalue(), f"{number}.cls": b"1", f"{number}.txt": b"a cat"}
    if variant % 2:
        with zipfile.ZipFile(place / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return place / "set.zip"
    with tarfile.open(place / "set.tar", "w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return place / "set.tar"


def _read_images(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.evaluation.sets.images import open_images

    return _score(open_images, path)


def _write_parquet(bench: Bench, place: Path, variant: int) -> Path:
    import datasets

    draw = np.random.default_rng(variant)
    rows = {"image": [_picture(draw) for _ in range(4)], "label": ["a", "b", "a", "b"]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(place / "set.parquet")
    return place / "set.parquet"


def _write_captions(bench: Bench, place: Path, variant: int) -> Path:
    _write_videos(bench, place, 8 * variant)
    rows = [{"path": f"clips/{n}.mp4", "caption": text} for n, text in enumerate(["a, b", "ab", '"b" a'])]
    (place / "captions.csv").unlink()
    path = place / ("captions.csv" if variant % 2 else "captions.jsonl")
    if variant % 2:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["path", "caption"])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _read_captions(bench: Bench, place: Path, path: Path) -> str:
    return _load_all(bench, "video", {"source": "folder", "path": str(place)})


def _write_prompts(bench: Bench, place: Path, variant: int) -> Path:
    rows = [{"prompt": "a, b", "seed": 3, "file": "first"}, {"prompt": "b", "seed": 4, "file": "x/second"}]
    path = place / ["prompts.csv", "prompts.jsonl", "prompts.txt"][variant % 3]
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["prompt", "seed", "file"])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text("a, b\nb a\n")
    return path


def _read_prompts(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.pipelines.prompts import read_prompts
    from mhla_diffusion.pipelines.rows import prompt_rows

    prompts = read_prompts([str(path)])
    rows, _ = prompt_rows(prompts, None, None, seed=0, negative_prompt=None, kind="videos")
    assert all((place / row["file"]).resolve().is_relative_to(place.resolve()) for row in rows)
    return "read"


def _write_config(bench: Bench, place: Path, variant: int) -> Path:
    shutil.copy(bench.given / "training.yaml", place / "config.yaml")
    return place / "config.yaml"


def _read_config(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.training import ImageTrainingConfig, parse_config, train_image

    small = ("--trainer.max_steps", "1", "--output_dir", str(place / "run"))
    config, resume = parse_config(ImageTrainingConfig, ["--config", str(path), *small])
    model = config.model
    if (
        model.init_from is None
        and max(model.num_layers or 0, model.sample_size or 0, model.in_channels or 0) > 64
    ):
        return "read"  # a large model is no fault
    if config.trainer.batch_size <= 64 and config.trainer.num_workers <= 8:
        train_image(config, resume=resume)
    return "read"


def _write_manifest(bench: Bench, place: Path, variant: int) -> Path:
    shutil.copytree(bench.undisturbed("images")[0], place, dirs_exist_ok=True)
    return place / "manifest.json"


def _read_folder(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.evaluation.sets.images import open_images

    return _score(open_images, place)


def _write_statistics(bench: Bench, place: Path, variant: int) -> Path:
    draw = np.random.default_rng(variant)
    features = draw.normal(size=(50, 8))
    np.savez(place / "real.npz", mu=features.mean(0), sigma=np.cov(features, rowvar=False))
    return place / "real.npz"


def _read_statistics(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.evaluation.scores.frechet import FeatureStatistics, frechet_distance

    read = FeatureStatistics.load(path)
    distance = frechet_distance(read.mu, read.sigma, np.zeros_like(read.mu), np.eye(len(read.mu)))
    assert np.isfinite(distance)
    assert distance >= 0
    return "read"


def _write_report(bench: Bench, place: Path, variant: int) -> Path:
    for name in ("a", "b"):
        shutil.copytree(bench.undisturbed("scoring")[0], place / name)
    return place / "a" / ("report.json" if variant % 4 else "samples.json")


def _read_report(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.evaluation import compare_reports

    compare_reports([place / "a", place / "b"]).save(place / "both")
    return "read"


def _write_pipeline(bench: Bench, place: Path, variant: int) -> Path:
    shutil.copytree(bench.given / "pipeline", place / "pipeline")
    names = [
        "model_index.json",
        "transformer/config.json",
        "scheduler/scheduler_config.json",
        "vae/config.json",
    ]
    return place / "pipeline" / names[variant % len(names)]


def _write_weights(bench: Bench, place: Path, variant: int) -> Path:
    shutil.copytree(bench.given / "pipeline", place / "pipeline")
    names = ["transformer", "vae"]
    return place / "pipeline" / names[variant % len(names)] / "diffusion_pytorch_model.safetensors"


def _read_pipeline(bench: Bench, place: Path, path: Path) -> str:
    from mhla_diffusion.commands import generate

    small = ("--num", "1", "--batch_size", "1", "--steps", "1")
    generate.main(
        ["--model", str(place / "pipeline"), *small, "--out", str(place / "out")], "generate", "image"
    )
    assert len(list((place / "out").glob("*.png"))) == 1
    return "read"


_JSON = (json.loads, json.dumps)
_LINES = (
    lambda text: [json.loads(line) for line in text.splitlines()],
    lambda rows: "\n".join(map(json.dumps, rows)),
)
INPUTS = [
    Input("pictures", _write_pictures, _read_pictures),
    Input("videos", _write_videos, _read_videos),
    Input("npz", _write_npz, _read_npz),
    Input("npy", _write_npy, _read_npy),
    Input("archives", _write_archive, _read_images),
    Input("parquet", _write_parquet, _read_images),
    Input("captions", _write_captions, _read_captions, _LINES, text=True),
    Input("prompts", _write_prompts, _read_prompts, _LINES, text=True),
    Input("configs", _write_config, _read_config, (yaml.safe_load, yaml.safe_dump), text=True, named=False),
    Input("manifests", _write_manifest, _read_folder, _JSON, text=True),
    Input("statistics", _write_statistics, _read_statistics),
    Input("reports", _write_report, _read_report, _JSON, text=True),
    Input("pipelines", _write_pipeline, _read_pipeline, _JSON, text=True),
    Input("weights", _write_weights, _read_pipeline),
]  # fmt: skip

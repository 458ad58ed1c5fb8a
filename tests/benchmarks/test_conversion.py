"""The benchmark of conversion loads what its rows say; its times and memory are not tested."""

from __future__ import annotations

import io
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import pytest

import mhla_diffusion
from mhla_diffusion import MHLAWanTransformer3DModel
from mhla_diffusion.benchmarks import conversion as benchmark

TINY = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 16,
    "freq_dim": 16, "ffn_dim": 16, "num_layers": 2, "rope_max_seq_len": 64,
}  # fmt: skip


def test_each_way_is_a_row_and_converts_where_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MHLAWanTransformer3DModel.presets, "Wan2.1-1.3B", TINY)
    converted, opened = [], []
    convert, from_pretrained = benchmark.convert_to_mhla, mhla_diffusion.MHLAPipeline.from_pretrained

    def converting(*args: Any) -> Any:
        converted.append(args)
        return convert(*args)

    def opening(*args: Any, **kwargs: Any) -> Any:
        pipe = from_pretrained(*args, **kwargs)
        opened.append((kwargs["mhla_config"], type(pipe.transformer).__name__, len(pipe.transformer.blocks)))
        return pipe

    def here(command: list[str], **_: Any) -> Any:
        assert command[:2] == [sys.executable, "-c"]
        with redirect_stdout(io.StringIO()) as out:
            exec(command[2], {})
        return SimpleNamespace(stdout=out.getvalue())

    monkeypatch.setattr(benchmark, "convert_to_mhla", converting)
    monkeypatch.setattr(mhla_diffusion.MHLAPipeline, "from_pretrained", opening)
    monkeypatch.setattr(benchmark.subprocess, "run", here)
    text = benchmark.conversion(layers=1, repeats=2)
    names = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines()[4:]]
    assert names == [
        "stock model",
        "stock model, converted",
        "stock pipeline",
        "pipeline, converted on loading",
    ]
    assert len(converted) == 2
    stock = (None, "WanTransformer3DModel", 1)
    assert opened == [stock, (benchmark.CONFIG, "MHLAWanTransformer3DModel", 1)] * 2


def test_numbers_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        benchmark.conversion(repeats=0)
    with pytest.raises(ValueError, match="layers must be at least 1, got 0"):
        benchmark.conversion(layers=0)

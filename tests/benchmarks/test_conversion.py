"""The benchmark of conversion loads what its rows say, and compares what its runs say."""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import mhla_diffusion
from mhla_diffusion import MHLAWanTransformer3DModel
from mhla_diffusion.benchmarks import conversion as benchmark

from .tables import cells

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


def test_what_is_converted_is_compared_with_the_stock_of_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([(1e8, 1.0), (2e8, 3.0), (4e8, 2.0), (5e8, 4.0)])

    def run(*_: Any, **__: Any) -> Any:
        return SimpleNamespace(stdout=json.dumps(dict(zip(("bytes", "seconds"), next(runs), strict=True))))

    monkeypatch.setattr(benchmark, "_write_pipeline", lambda *_: 1)
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    assert [row[1:] for row in cells(benchmark.conversion(repeats=1))] == [
        ["100", "", "1.00", ""],
        ["200", "2.00 x", "3.00", "3.00 x"],
        ["400", "", "2.00", ""],
        ["500", "1.25 x", "4.00", "2.00 x"],
    ]


def test_memory_is_that_of_this_process_in_bytes() -> None:
    resident = psutil.Process().memory_info().rss
    assert benchmark._memory("VmRSS") == pytest.approx(resident, rel=0.01)
    held = torch.ones(2**25)
    del held
    assert benchmark._memory("VmHWM") - benchmark._memory("VmRSS") >= 2**26

"""The benchmark of the operator measures what it says; its times are not tested."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mhla_diffusion.benchmarks import operator
from mhla_diffusion.benchmarks.operator import Measurement, Shape, convolution_mhla, linear_attention, slope
from mhla_diffusion.benchmarks.shared import clock_of
from mhla_diffusion.ops import BlockLayout, mhla, mhla_reference

from .tables import cells

TINY = {"tiny": Shape(8, 2, (6, 4), (3, 2)), "ragged": Shape(8, 1, (5, 3), (2, 2))}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "SHAPES", TINY)


def test_peers_are_what_they_are_called() -> None:
    layout = BlockLayout((6, 4), (3, 2))
    q, k, v, mixing = (*torch.randn(3, 2, 3, 24, 8), torch.rand(6, 6))
    one = BlockLayout((6, 4), (1, 1))
    expected = mhla_reference(q, k, v, torch.ones(1, 1), one).float()
    torch.testing.assert_close(linear_attention(q, k, v), expected, rtol=1e-4, atol=1e-5)
    expected = mhla_reference(q, k, v, mixing, layout, normalizer="official").float()
    torch.testing.assert_close(convolution_mhla(q, k, v, mixing, layout), expected, rtol=1e-4, atol=1e-5)


def test_operator_writes_a_row_for_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "measure_rates", lambda dtype, device, clock: (1e12, 1e12))
    points = [(1024, 1.0), (4096, 4.0)]
    monkeypatch.setattr(operator, "measure_scaling", lambda device, clock: {"forward": points})
    text = operator.operator(["tiny"], repeats=3, out=tmp_path, device="cpu")
    rows = [line for line in text.splitlines() if line.startswith("| d 8, H 2, N 24, M 6")]
    assert len(rows) == 4, "float32 and bfloat16, forward and with backward"
    assert "slope of log time over log tokens 1.000" in text
    record = json.loads((tmp_path / "operator.json").read_text())
    assert len(record["measurements"]) == 4 * len(operator.PEERS)
    assert all(row["seconds"] > 0 for row in record["measurements"])
    assert (tmp_path / "operator.md").read_text() == text
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_softmax_attention_that_takes_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "measure_rates", lambda dtype, device, clock: (1.0, 1e12))
    text = operator.operator(["tiny"], ["float32"], ["forward"], repeats=1, scaling=False, device="cpu")
    assert text.splitlines()[-1].split(" | ")[6] == "-"


def test_times_are_those_of_the_chosen_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def linear_that_waits(*tensors: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return linear_attention(*tensors)

    monkeypatch.setattr(operator, "linear_attention", linear_that_waits)
    monkeypatch.setattr(operator, "measure_rates", lambda dtype, device, clock: (1e12, 1e12))
    for processor_time in (False, True):
        out = tmp_path / str(processor_time)
        text = operator.operator(
            ["tiny"], ["float32"], ["forward"], ["mhla", "linear"], repeats=3, scaling=False, out=out,
            device="cpu", processor_time=processor_time,
        )  # fmt: skip
        times = [row["seconds"] for row in json.loads((out / "operator.json").read_text())["measurements"]]
        assert (times[1] < 0.1) == processor_time
        assert ("processor time" in text.splitlines()[0]) == processor_time
        assert text.splitlines()[2].endswith("| spread |")


@pytest.mark.parametrize("wrong", ["output", "gradient"])
def test_nothing_is_timed_that_is_not_right(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def broken(q: Any, k: Any, v: Any, mixing: Any, layout: BlockLayout) -> Any:
        out = mhla(q, k, v, mixing, layout)
        return 1.001 * out if wrong == "output" else out + 0.001 * (k - k.detach())

    monkeypatch.setattr(operator, "mhla", broken)
    name = {"output": "output", "gradient": "k"}[wrong]
    with pytest.raises(RuntimeError, match=f"{name} differs from the reference by .*no times are given"):
        operator.check(TINY["ragged"], "cpu", rows=4)


def test_the_check_covers_every_shape(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        for shape in TINY.values():
            operator.check(shape, "cpu", rows=4)
    assert caplog.text.count("equals the reference") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": ["2k"]}, "shapes must be of tiny, ragged, got '2k'"),
        ({"dtypes": ["float16"]}, "dtypes must be of float32, bfloat16, got 'float16'"),
        ({"device": "gpu"}, "device 'gpu' cannot be used: choose one of cpu"),
        ({"peers": ["softmax"]}, r"peers must hold mhla, .* got \['softmax'\]"),
        ({"passes": []}, "passes is empty: give one or more of forward"),
        ({"peers": ["sdpa"]}, "peers must be of mhla, softmax, linear, convolution, got 'sdpa'"),
    ],
)
def test_unknown_choices_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        operator.operator(**{"shapes": ["tiny"], **arguments})


def test_time_of_processors_is_that_of_the_cpu_alone() -> None:
    assert clock_of("cpu", processor_time=True) is time.process_time
    assert clock_of("cuda", processor_time=False) is time.perf_counter
    with pytest.raises(ValueError, match="processor_time is for the device cpu, got cuda: leave it out"):
        clock_of("cuda", processor_time=True)


def test_slope_is_the_exponent() -> None:
    assert slope([(x, 3 * x**1.5) for x in (10, 100, 1000)]) == pytest.approx(1.5)


def test_rates_are_of_both_factors_of_a_product_and_of_reading_and_writing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operator, "best", lambda *_, **__: (1.0, 1.0))
    assert operator.measure_rates(torch.float32, "cpu") == (2 * 2048**3, 2 * 2**28)


def test_a_table_has_times_of_mhla_and_how_many_times_slower_others_are() -> None:
    rows = [
        Measurement("tiny", "float32", "forward", "mhla", 2.0, 0.1, 1.0, 30_000_000),
        Measurement("tiny", "float32", "forward", "softmax", 6.0, None, 1.0, 50_000_000),
    ]
    (found,) = cells(operator._operator_table(rows))
    assert found[:3] == ["d 8, H 2, N 24, M 6", "float32", "forward"]
    assert found[3:7] == ["2,000.0", "1,000.0", "2.00 x", "3.00 x"]
    assert found[7:] == ["mhla 30 / softmax 50", "mhla 10%"]


@pytest.mark.parametrize(
    ("rates", "floor"),
    [((1e3, 1e12), 2 * 8**2 * (4 * 24 + 2 * 6**2) / 1e3), ((1e12, 1e3), 4 * 2 * 24 * 8 * 4 / 1e3)],
    ids=["product", "copy"],
)
def test_a_floor_is_of_the_slower_of_product_and_copy_and_a_time_is_the_median(
    monkeypatch: pytest.MonkeyPatch, rates: tuple[float, float], floor: float
) -> None:
    monkeypatch.setattr(operator, "interleaved", lambda calls, *_, **__: [[1.0, 2.0, 9.0] for _ in calls])
    monkeypatch.setattr(operator, "measure_rates", lambda *_: rates)
    found = operator._measure_shape(
        "tiny", "float32", operator.PASSES, ["mhla"], 3, 60, "cpu", time.perf_counter
    )
    assert [row.floor for row in found] == pytest.approx([floor, 3 * floor])
    assert [row.seconds for row in found] == [2.0, 2.0]


def test_scaling_is_over_blocks_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    monkeypatch.setattr(operator, "_calls", lambda peer, shape, *_: shapes.append(shape))
    monkeypatch.setattr(operator, "best", lambda *_, **__: [1.0, 2.0])
    times = operator.measure_scaling("cpu", 4**6)
    assert {shape.layout.num_tokens // shape.layout.num_blocks for shape in shapes} == {1024}
    forward, both = operator.PASSES
    assert times == {forward: [(1024, 1.0), (4096, 1.0)], both: [(1024, 2.0), (4096, 2.0)]}

"""The module for those who know torch's operators alone: torch.export, and ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mhla_diffusion import MHLAConfig

from .test_attention import OwnAttention

CASES = {
    "every part": (MHLAConfig(blocks=(2, 2), cpe="identity", gate=True, output_norm=True), (8, 8)),
    "the paper's": (MHLAConfig.paper(blocks=(2, 2)), (8, 8)),
    "no denominator": (MHLAConfig(blocks=(2, 2), normalizer="none"), (8, 8)),
    "ragged, no denominator": (MHLAConfig(blocks=(2, 2), normalizer="none", feature_map="elu"), (5, 7)),
    "official": (MHLAConfig(blocks=(2, 2), normalizer="official", constraint="softmax"), (4, 6)),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[OwnAttention, torch.Tensor]:
    config, grid = CASES[request.param]
    return OwnAttention(config, grid).eval(), torch.randn(2, *grid, 16)


def operators(program: torch.export.ExportedProgram) -> set[str]:
    return {str(node.target).partition(".")[0] for node in program.graph.nodes if node.op == "call_function"}


def test_an_exported_module_keeps_the_operators_or_takes_them_apart(
    case: tuple[OwnAttention, torch.Tensor],
) -> None:
    model, x = case
    program = torch.export.export(model, (x,))
    assert "mhla" in operators(program)
    torch.testing.assert_close(program.module()(x), model(x))
    table = {
        operator: torch._decomp.decomposition_table[operator]
        for operator in (torch.ops.mhla.summarize.default, torch.ops.mhla.read.default)
    }
    apart = program.run_decompositions(table)
    assert "mhla" not in operators(apart)
    torch.testing.assert_close(apart.module()(x), model(x))


def test_onnx_runtime_computes_the_same(case: tuple[OwnAttention, torch.Tensor], tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model, x = case
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(tmp_path / "mhla.onnx")
    session = runtime.InferenceSession(tmp_path / "mhla.onnx")
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model(x))

"""Weights that are elsewhere until a layer is called: the same output, to the last bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

from mhla_diffusion import MHLADiTTransformer2DModel

MakeModel = Callable[..., MHLADiTTransformer2DModel]
MakeInputs = Callable[..., dict[str, Tensor]]

SETTINGS: dict[str, Any] = {
    "num_layers": 3,
    "attention": ["mhla", "softmax", "mhla"],
    "mhla_config": {"blocks": 4, "cpe": "zero", "gate": True, "output_norm": True},
}
CPU = torch.device("cpu")


def sequential(model: MHLADiTTransformer2DModel, folder: Path) -> Any:
    accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def disk(model: MHLADiTTransformer2DModel, folder: Path) -> Any:
    accelerate.disk_offload(model, folder, execution_device=CPU, offload_buffers=True)


def group(**options: Any) -> Callable[..., Any]:
    def offload(model: MHLADiTTransformer2DModel, folder: Path) -> Any:
        to_disk = {"offload_to_disk_path": str(folder)} if options.get("to_disk") else {}
        chosen = {key: value for key, value in options.items() if key != "to_disk"} | to_disk
        model.enable_group_offload(onload_device=CPU, offload_device=CPU, **chosen)

    return offload


OFFLOADS: dict[str, Callable[[MHLADiTTransformer2DModel, Path], Any]] = {
    "sequential": sequential,
    "disk": disk,
    "leaf": group(offload_type="leaf_level"),
    "leaf to disk": group(offload_type="leaf_level", to_disk=True),
    "block": group(offload_type="block_level", num_blocks_per_group=1),
    "block to disk": group(offload_type="block_level", num_blocks_per_group=1, to_disk=True),
    "two blocks to disk": group(offload_type="block_level", num_blocks_per_group=2, to_disk=True),
}


@pytest.mark.parametrize("name", OFFLOADS)
@torch.no_grad()
def test_offloading_changes_no_output(
    make_model: MakeModel, make_inputs: MakeInputs, tmp_path: Path, name: str
) -> None:
    model = make_model(**SETTINGS)
    batches = [make_inputs(size) for size in [(8, 8), (4, 16), (8, 8)]]
    expected = [model(**batch).sample for batch in batches]
    OFFLOADS[name](model, tmp_path)
    # Where a weight is used outside of the call that brings it, it is on meta or freshly allocated.
    for batch, output in zip(batches, expected, strict=True):
        assert torch.equal(model(**batch).sample, output)
    if "disk" in name:
        assert list(tmp_path.iterdir())


@torch.no_grad()
def test_layerwise_casting_stores_linear_layers_in_less(
    make_model: MakeModel, make_inputs: MakeInputs, assert_close: Callable[..., None]
) -> None:
    model = make_model(**SETTINGS)
    expected = model(**make_inputs()).sample
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    attn = model.transformer_blocks[0].attn1
    assert {attn.to_q.weight.dtype, attn.processor.gate.weight.dtype} == {torch.bfloat16}
    assert attn.processor.mixing.dtype == torch.float32
    output = model(**make_inputs()).sample
    assert output.dtype == torch.float32
    assert_close(output, expected, dtype=torch.bfloat16)

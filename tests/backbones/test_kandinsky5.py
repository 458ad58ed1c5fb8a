"""Kandinsky 5: sparse attention, which linear attention has no form of."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, sample

CASE = CASES["Kandinsky5"]


def test_models_with_sparse_attention_are_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_type is 'nabla'.*set attention_type to 'regular'"):
        CASE.make(attention=["mhla", "softmax"], attention_type="nabla")
    assert set(CASE.make(attention="softmax", attention_type="nabla").layer_attention) == {"softmax"}


@torch.no_grad()
def test_a_call_with_a_sparse_mask_is_refused() -> None:
    model = CASE.make()
    inputs = CASE.inputs(model)
    dense = {**inputs, "sparse_params": {"to_fractal": False}}
    assert torch.equal(sample(model, dense), sample(model, inputs))
    with pytest.raises(ValueError, match="leave sparse_params out"):
        model(**inputs, sparse_params={"to_fractal": False, "sta_mask": torch.ones(1), "P": 0.9})
    with pytest.raises(ValueError, match="leave sparse_params out"):
        model(**CASE.inputs(model, (1, 8, 8)), sparse_params={"to_fractal": True})

"""Which weights are trained, and adapters that become part of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mhla_diffusion import MHLAWanTransformer3DModel
from mhla_diffusion.training import LoraConfig
from mhla_diffusion.training.adapters import merge_adapters, set_trainable


@pytest.fixture
def model() -> MHLAWanTransformer3DModel:
    return MHLAWanTransformer3DModel(
        patch_size=(2, 4, 4), in_channels=1, out_channels=1, num_layers=2, num_attention_heads=2,
        attention_head_dim=12, ffn_dim=32, text_dim=16, sample_grid=(2, 4, 4),
    )  # fmt: skip


def test_only_attention_is_trained_when_asked(model: MHLAWanTransformer3DModel) -> None:
    set_trainable(model, "attention", LoraConfig())
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".attn1." in name}
    assert trained


def test_merged_adapters_are_the_same_function(model: MHLAWanTransformer3DModel) -> None:
    nn.init.normal_(model.proj_out.weight)
    arguments = (torch.randn(1, 1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 5, 16))
    plain = model(*arguments).sample
    names = set(model.state_dict())
    set_trainable(model, "all", LoraConfig(rank=2, alpha=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    adapted = model(*arguments).sample
    assert not torch.allclose(adapted, plain, rtol=1e-2)
    merge_adapters(model)
    torch.testing.assert_close(model(*arguments).sample, adapted, rtol=1e-4, atol=1e-4)
    assert set(model.state_dict()) == names

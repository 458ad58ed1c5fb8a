"""Forms beside the paper's: softmax alone, wide features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.ops import mhla_reference


@pytest.mark.parametrize("key_mask", [False, True])
def test_one_block_alone_is_softmax_attention_with_convolution_and_gate(key_mask: bool) -> None:
    config = MHLAConfig(blocks=1, local="only", cpe="zero", gate=True)
    module = MHLA(config, heads=2, head_dim=8, grid=(4, 6))
    assert [name for name, _ in module.named_parameters()] == [
        "cpe.weight", "cpe.bias", "gate.weight", "gate.bias",
    ]  # fmt: skip
    q, k, v = torch.randn(3, 2, 2, 24, 8)
    mask = torch.rand(2, 24) < 0.5 if key_mask else None
    out = module(q, k, v, grid=(4, 6), hidden_states=torch.randn(2, 24, 16), key_mask=mask)
    wide = None if mask is None else mask[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=wide).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    torch.nn.init.normal_(module.cpe.weight)  # type: ignore[union-attr]
    changed = module(q, k, v, grid=(4, 6), hidden_states=torch.randn(2, 24, 16), key_mask=mask)
    assert not torch.allclose(changed, expected)


def test_blocks_alone_do_not_see_each_other() -> None:
    module = MHLA(MHLAConfig(blocks=(2, 2), local="only"), heads=2, head_dim=8, grid=(4, 4))
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    before = module(q, k, v, grid=(4, 4))
    v[:, :, 0] += 1  # of the first block: the tokens 0, 1, 4 and 5
    changed = (module(q, k, v, grid=(4, 4)) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [0, 1, 4, 5]
    with pytest.raises(ValueError, match="no features and no block of extra tokens"):
        MHLAConfig(local="only", feature_map="hedgehog")


def test_crelu_is_relu_of_queries_and_keys_and_of_what_they_are_not() -> None:
    module = MHLA(MHLAConfig(blocks=(2, 2), feature_map="crelu"), heads=2, head_dim=8, grid=(4, 4))
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    wide = [torch.cat((x, -x), -1) for x in (q, k)]
    layout = module.config.layout((4, 4))
    expected = mhla_reference(*wide, v, module.mixing_matrix(), layout).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module(q, k, v, grid=(4, 4)), expected.float())


def test_the_paper_is_one_argument_away() -> None:
    assert MHLAConfig.paper() == MHLAConfig(blocks=16, feature_map="relu", constraint="clamp")
    assert MHLAConfig.paper(cpe="identity", blocks=(2, 2)) == MHLAConfig(blocks=(2, 2), cpe="identity")
    with pytest.raises(ValueError, match="unknown MHLA setting heads"):
        MHLAConfig.paper(heads=2)

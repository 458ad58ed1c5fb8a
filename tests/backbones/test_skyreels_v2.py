"""SkyReels V2 and the pipeline of diffusion forcing, which asks for frames that see earlier ones alone."""

from __future__ import annotations

import warnings

import pytest

from .cases import CASES

CASE = CASES["SkyReelsV2"]


def test_causal_blocks_are_refused_before_the_config_is_changed() -> None:
    model = CASE.make()
    with pytest.raises(ValueError, match=r"causal_block_size is 2: .* take causal_block_size=1"):
        model._set_ar_attention(2)
    assert model.config.num_frame_per_block == 1
    model._set_ar_attention(1)
    softmax = CASE.make(attention="softmax")
    softmax._set_ar_attention(2)
    assert softmax.config.num_frame_per_block == 2
    with pytest.raises(ValueError, match=r"num_frame_per_block is 2: .* call _set_ar_attention\(1\)"):
        CASE.make(num_frame_per_block=2)


def test_layers_are_planned_once() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CASE.make(mhla={"blocks": 16}, sample_grid=(1, 4, 4))
    assert len([its for its in caught if "mixing costs" in str(its.message)]) == 1

"""What MHLA cannot do is refused with the value, what is allowed and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mhla_diffusion import MHLA, MHLAConfig
from tests.test_attention import make_module


def test_a_gate_without_hidden_states_says_what_is_missing() -> None:
    module = MHLA(MHLAConfig(blocks=4, gate=True), heads=2, head_dim=8, grid=(4, 4))
    q, k, v = torch.randn(3, 1, 2, 16, 8)
    with pytest.raises(ValueError, match="pass hidden_states=x"):
        module(q, k, v, grid=(4, 4))


@pytest.mark.parametrize("local", [None, "auto", "only"])
def test_what_does_not_fit_is_refused_in_the_same_words_with_a_window(local: str | None) -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=4, local=local))
    narrow, short = torch.rand(2, 24, 2), torch.rand(2, 20, 3)
    for wrong, message in (
        ({"rotary_emb": tuple(narrow)}, r"rotary_emb must be .*\(24, 2\)"),
        ({"rotary_emb": tuple(short)}, r"rotary_emb must be .*\(20, 3\)"),
        ({"k": k[:, :, :20], "v": v[:, :, :20]}, r"k and v hold 20 tokens"),
        ({"k": k[..., :4]}, r"k must be .* H = 2 and d = 6 of this MHLA, got \(2, 2, 24, 4\)"),
        ({"q": q[:, :1], "k": k[:, :1], "v": v[:, :1]}, r"q must be .* got \(2, 1, 24, 6\)"),
        ({"v": v[0]}, r"v must be .* got \(2, 24, 6\)"),
    ):
        with pytest.raises(ValueError, match=message):
            module(**{"q": q, "k": k, "v": v, "grid": (4, 6), **wrong})


@pytest.mark.parametrize("shape", [(2, 24, 8), (2, 20, 12), (24, 12), (1, 24, 12)], ids=str)
def test_hidden_states_that_the_gate_cannot_read_are_refused(shape: tuple[int, ...]) -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=4, gate=True))
    with pytest.raises(ValueError, match=r"\[B, N, query_dim\] = \[2, 24, 12\], got"):
        module(q, k, v, grid=(4, 6), hidden_states=torch.randn(shape))


@pytest.mark.parametrize("local", [None, "auto"])
@pytest.mark.parametrize(
    ("shape", "allowed"),
    [
        ((24, 3), True), ((2, 24, 3), True), ((1, 24, 3), True), ((3, 1, 24, 3), True), ((3, 2, 24, 3), True),
        ((3, 24, 3), False), ((2, 2, 24, 3), False), ((1, 3, 2, 24, 3), False), ((3,), False),
    ],
)  # fmt: skip
def test_rotary_tables_broadcast_over_samples_and_heads_or_are_refused(
    local: str | None, shape: tuple[int, ...], allowed: bool
) -> None:
    module = MHLA(MHLAConfig(blocks=4, local=local), heads=2, head_dim=6, grid=(4, 6))
    q, k, v = torch.randn(3, 3, 2, 24, 6)
    angles = torch.rand(shape)
    if allowed:
        whole = angles.expand(3, 2, 24, 3)
        expected = module(q, k, v, grid=(4, 6), rotary_emb=(whole.cos(), whole.sin()))
        out = module(q, k, v, grid=(4, 6), rotary_emb=(angles.cos(), angles.sin()))
        torch.testing.assert_close(out, expected)
        return
    with pytest.raises(ValueError, match=r"rotary_emb must be \(cos, sin\), each .* of q \(3, 2, 24, 6\)"):
        module(q, k, v, grid=(4, 6), rotary_emb=(angles.cos(), angles.sin()))


@pytest.mark.parametrize(
    "tables",
    [
        torch.ones(24, 3, dtype=torch.complex64), (torch.ones(24, 3, dtype=torch.complex64),) * 2,
        (torch.ones(24, 3),) * 3, (None, None), torch.ones(24, 3).tolist(),
    ],
    ids=["complex", "complex pair", "three", "none", "list"],
)  # fmt: skip
def test_what_is_no_pair_of_rotary_tables_is_refused(tables: Any) -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=4))
    with pytest.raises(
        ValueError, match=r"pair of real tensors \(cos, sin\); of complex .* \(x.real, x.imag\)"
    ):
        module(q, k, v, grid=(4, 6), rotary_emb=tables)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grid": None}, "grid must be .* got None"),
        ({"grid": 24}, "grid must be .* got 24"),
        ({"grid": "46"}, "grid must be .* got '46'"),
        ({"extra": 6}, r"extra must be \(before, after\), .* got 6"),
        ({"extra": "60"}, r"extra must be \(before, after\), .* got '60'"),
        ({"key_mask": [[True] * 24] * 2}, r"key_mask must be a bool tensor \[B, N\], got a list"),
        (
            {"key_mask": torch.ones(2, 24, dtype=torch.bool, device="meta")},
            "key_mask is on meta and k on cpu: move it",
        ),
        (
            {"rotary_emb": (torch.ones(24, 3, device="meta"),) * 2},
            "rotary_emb is on meta and q on cpu: move it",
        ),
    ],
)
def test_grids_and_masks_of_another_type_are_refused(wrong: dict[str, Any], message: str) -> None:
    module, (q, k, v), _ = make_module(MHLAConfig(blocks=4))
    with pytest.raises(ValueError, match=message):
        module(q, k, v, **{"grid": (4, 6), **wrong})


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        ({"cpe": "zero"}, {"grid": (8,)}, r"grids of 2 or 3 axes, got \(8,\): leave them out"),
        ({"qk_conv": True}, {"grid": (2, 2, 2, 2)}, "grids of 2 or 3 axes"),
        ({"gate": True}, {"query_dim": 0}, "query_dim must be an integer >= 1, or None for H d, got 0"),
        ({"gate": True}, {"query_dim": "a"}, "query_dim must be .* got 'a'"),
        ({}, {"heads": True}, "heads and head_dim must be integers >= 1, got True and 8"),
    ],
)
def test_modules_that_cannot_be_are_refused(
    settings: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    config = MHLAConfig(blocks=1, **settings)
    with pytest.raises(ValueError, match=message):
        MHLA(config, **{"heads": 2, "head_dim": 8, "grid": (4, 4), **arguments})

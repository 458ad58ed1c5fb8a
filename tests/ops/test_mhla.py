"""The properties of the operator's specification, forward and gradients, against the O(N^2) reference."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mhla_diffusion.ops import FEATURE_MAPS, BlockLayout, apply_rotary_emb, mhla, mhla_reference, tiles

AssertClose = Callable[..., None]

LAYOUTS = [
    BlockLayout((8, 8), (2, 4)),
    BlockLayout((4, 16), (4, 4)),
    BlockLayout((7, 9), (3, 2)),
    BlockLayout((1, 63), (1, 8)),
    BlockLayout((6, 5), (1, 1)),
    BlockLayout((3, 6, 4), (3, 3, 2)),
    BlockLayout((5, 5, 3), (2, 2, 2)),
    BlockLayout((7, 9), (3, 2), extra=(1, 30)),
    BlockLayout((2, 6, 4), (1, 3, 2), extra=(5, 0)),
    BlockLayout((4, 4), (1, 1), extra=(0, 3)),
    BlockLayout((4, 5), (2, 2), extra=(0, 0)),
]
EVEN_LAYOUTS = [layout for layout in LAYOUTS if layout.is_even]


def make_inputs(
    layout: BlockLayout,
    dtype: torch.dtype = torch.float64,
    *,
    heads: int = 3,
    d: int = 8,
    per_head: bool = False,
    per_sample: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(2, heads, layout.num_tokens, d, dtype=torch.float64) for _ in range(3))
    blocks = layout.num_blocks
    each = [2, heads] if per_sample else [heads] if per_head else []
    mixing = torch.rand(*each, blocks, blocks, dtype=torch.float64)
    q, k, v, mixing = (x.to(dtype).requires_grad_() for x in (q, k, v, mixing))
    return q, k, v, mixing


def make_rotary(layout: BlockLayout, d: int = 8) -> tuple[Tensor, Tensor]:
    angles = torch.rand(layout.num_tokens, d // 2, dtype=torch.float64) * 2 * math.pi
    return angles.cos(), angles.sin()


def check_against_reference(
    assert_close: AssertClose,
    layout: BlockLayout,
    dtype: torch.dtype,
    *,
    per_head: bool = False,
    inputs: tuple[Tensor, ...] | None = None,
    **options: Any,
) -> None:
    """Output and the gradients of q, k, v and mixing."""
    inputs = inputs or make_inputs(layout, dtype, per_head=per_head)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    out, expected = mhla(*inputs, layout, **options), mhla_reference(*exact, layout, **options)
    assert out.dtype == dtype
    assert_close(out, expected)
    cotangent = torch.randn_like(expected)
    gradients = torch.autograd.grad(out, inputs, cotangent.to(dtype))
    references = torch.autograd.grad(expected, exact, cotangent.to(dtype).double())
    scales = ("q", "k", "v", "mixing")
    for name, gradient, reference in zip(scales, gradients, references, strict=True):
        if reference.abs().max() < 1e-9:
            # One block: the output does not depend on the single weight, and what is left is rounding.
            assert name == "mixing"
            assert gradient.abs().max() < 5e-3
            continue
        assert_close(gradient, reference, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_equals_the_reference(assert_close: AssertClose, layout: BlockLayout, dtype: torch.dtype) -> None:
    check_against_reference(assert_close, layout, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[5], LAYOUTS[7]], ids=str)
def test_a_matrix_for_each_sample_equals_the_reference(
    assert_close: AssertClose, layout: BlockLayout, dtype: torch.dtype
) -> None:
    inputs = make_inputs(layout, dtype, per_sample=True)
    assert not torch.equal(*inputs[3])
    check_against_reference(assert_close, layout, dtype, inputs=inputs)


@pytest.mark.parametrize("rotary", [False, True], ids=["", "rotary"])
@pytest.mark.parametrize(
    ("layout", "normalizer"),
    [(layout, normalizer) for layout in LAYOUTS for normalizer in ("paper", "none")]
    + [(layout, "official") for layout in EVEN_LAYOUTS],
    ids=str,
)
def test_normalizers_and_positions_equal_the_reference(
    assert_close: AssertClose, layout: BlockLayout, normalizer: str, rotary: bool
) -> None:
    rotary_emb = make_rotary(layout) if rotary else None
    check_against_reference(
        assert_close, layout, torch.float32, normalizer=normalizer, rotary_emb=rotary_emb, per_head=rotary
    )


@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_feature_maps_equal_the_reference(assert_close: AssertClose, feature_map: str) -> None:
    check_against_reference(assert_close, LAYOUTS[2], torch.float32, feature_map=feature_map)


@pytest.mark.parametrize("feature_map", ["elu", "softmax"])
@pytest.mark.parametrize("normalizer", ["paper", "none"])
def test_all_at_once_equals_the_reference(
    assert_close: AssertClose, feature_map: str, normalizer: str
) -> None:
    layout = LAYOUTS[6]
    key_mask = torch.rand(2, layout.num_tokens) > 0.3
    check_against_reference(
        assert_close, layout, torch.float32,
        feature_map=feature_map, normalizer=normalizer, rotary_emb=make_rotary(layout), key_mask=key_mask,
        per_head=True,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per_head", [False, True], ids=["shared", "per head"])
def test_keys_on_another_grid_equal_the_reference(
    assert_close: AssertClose, dtype: torch.dtype, per_head: bool
) -> None:
    layout, key_layout = BlockLayout((7, 9), (3, 2)), BlockLayout((11,), (4,))
    q, k, v = torch.randn(2, 3, 63, 8), torch.randn(2, 3, 11, 8), torch.randn(2, 3, 11, 5)
    mixing = torch.rand(*([3] if per_head else []), 6, 4)
    inputs = tuple(x.to(dtype).requires_grad_() for x in (q, k, v, mixing))
    key_mask = torch.rand(2, 11) > 0.2
    check_against_reference(
        assert_close, layout, dtype, inputs=inputs, key_layout=key_layout, key_mask=key_mask
    )


@pytest.mark.parametrize(
    "layout",
    [LAYOUTS[2], LAYOUTS[4], LAYOUTS[6], BlockLayout((40, 3), (1, 3)), LAYOUTS[7], LAYOUTS[10]],
    ids=str,
)
@pytest.mark.parametrize("heads_inside", [False, True], ids=["heads outside", "heads inside"])
@pytest.mark.parametrize("tile", [1, 40, 600])
def test_tiles_of_any_size_equal_the_reference(
    assert_close: AssertClose,
    monkeypatch: pytest.MonkeyPatch,
    layout: BlockLayout,
    heads_inside: bool,
    tile: int,
) -> None:
    """From a row of one block of one head to all samples at once; also in the memory order of projections."""
    monkeypatch.setattr(tiles, "_TILE_SIZE", tile)
    monkeypatch.setattr(tiles, "_MIN_RUN", 16)
    *tensors, mixing = make_inputs(layout, torch.float32)
    if heads_inside:
        tensors = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in tensors]
    check_against_reference(assert_close, layout, torch.float32, inputs=(*tensors, mixing))
    out = mhla(*tensors, mixing, layout)
    assert out.transpose(1, 2).is_contiguous() == heads_inside, "the order of the axes of q is kept"


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[6], LAYOUTS[7], LAYOUTS[10]], ids=str)
def test_no_memory_is_read_before_it_is_written(assert_close: AssertClose, layout: BlockLayout) -> None:
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN
    try:
        check_against_reference(assert_close, layout, torch.float32, rotary_emb=make_rotary(layout))
    finally:
        torch.use_deterministic_algorithms(False)


def test_tokens_may_lie_anywhere_in_memory(assert_close: AssertClose) -> None:
    """Parts of one projection, and the expanded gradient of a sum."""
    layout = LAYOUTS[2]
    qkv = torch.randn(2, layout.num_tokens, 3, 3, 8, requires_grad=True)
    mixing = torch.rand(6, 6)

    def attend(operator: Callable[..., Tensor], x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in x.unbind(2))
        return operator(q, k, v, mixing, layout).sum(-1).square().sum()

    exact = qkv.detach().double().requires_grad_()
    gradients = [
        torch.autograd.grad(attend(operator, x), x)[0]
        for operator, x in ((mhla, qkv), (mhla_reference, exact))
    ]
    assert_close(*gradients)


def test_no_tokens_no_samples_no_heads() -> None:
    for shape in ((0, 3, 16, 4), (2, 0, 16, 4)):
        x = torch.empty(shape, requires_grad=True)
        out = mhla(x, x, x, torch.ones(4, 4), GOOD)
        assert out.shape == shape
        assert torch.autograd.grad(out.sum(), x)[0].shape == shape


@pytest.mark.parametrize("layout", [LAYOUTS[2], LAYOUTS[7]], ids=str)
def test_compiles_in_one_piece(layout: BlockLayout) -> None:
    q, k, v, mixing = make_inputs(layout, torch.float32)
    mask = torch.rand(2, layout.num_tokens) > 0.2
    options: dict[str, Any] = {"rotary_emb": make_rotary(layout), "key_mask": mask}

    def attend(*inputs: Tensor) -> Tensor:
        return 2 * mhla(*inputs, layout, **options)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for found, expected in zip(
        torch.autograd.grad(compiled(q, k, v, mixing).sum(), (q, k, v, mixing)),
        torch.autograd.grad(attend(q, k, v, mixing).sum(), (q, k, v, mixing)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


def test_flops_are_counted() -> None:
    """H d (d + 1) (4 N + 2 M^2), section 4.2 of the paper with the denominators; the backward twice that.

    And the summaries are mixed once more.
    """
    layout = LAYOUTS[0]
    inputs = make_inputs(layout, torch.float32)
    mixing = 2 * 3 * 2 * 64 * 8 * 9
    with FlopCounterMode(display=False) as counter:
        out = mhla(*inputs, layout)
    assert counter.get_total_flops() == 2 * 3 * 8 * 9 * 4 * 64 + mixing
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), inputs)
    assert counter.get_total_flops() == 2 * (2 * 3 * 8 * 9 * 4 * 64) + 3 * mixing


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_values_of_one_give_one(layout: BlockLayout) -> None:
    q, k, v, mixing = make_inputs(layout, torch.float32)
    out = mhla(q, k, torch.ones_like(v), mixing, layout)
    torch.testing.assert_close(out, torch.ones_like(out))


def test_the_official_denominator_does_not_give_one() -> None:
    q, k, v, mixing = make_inputs(LAYOUTS[0])
    out = mhla(q, k, torch.ones_like(v), mixing, LAYOUTS[0], normalizer="official")
    assert (out - 1).abs().max() > 0.1


def plain_linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k = q.relu() + 1e-6, k.relu() + 1e-6
    return (q @ (k.transpose(-1, -2) @ v)) / (q @ k.sum(-2)[..., None])


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mixing_of_ones_is_plain_linear_attention(layout: BlockLayout) -> None:
    q, k, v, mixing = make_inputs(layout)
    out = mhla(q, k, v, torch.ones_like(mixing), layout)
    torch.testing.assert_close(out, plain_linear_attention(q, k, v))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_mixing_of_identity_is_linear_attention_inside_each_block(layout: BlockLayout) -> None:
    q, k, v, _ = make_inputs(layout)
    out = mhla(q, k, v, torch.eye(layout.num_blocks, dtype=q.dtype), layout)
    for block in range(layout.num_blocks):
        inside = layout.block_index() == block
        expected = plain_linear_attention(*(x[:, :, inside] for x in (q, k, v)))
        torch.testing.assert_close(out[:, :, inside], expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_scaling_a_row_of_the_mixing_changes_nothing(layout: BlockLayout) -> None:
    q, k, v, mixing = make_inputs(layout)
    scale = torch.rand(layout.num_blocks, 1, dtype=q.dtype) * 10 + 0.1
    torch.testing.assert_close(mhla(q, k, v, mixing * scale, layout), mhla(q, k, v, mixing, layout))


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2], LAYOUTS[5]], ids=str)
def test_permuting_tokens_inside_a_block_permutes_the_output(layout: BlockLayout) -> None:
    q, k, v, mixing = make_inputs(layout)
    permutation = torch.arange(layout.num_tokens)
    inside = (layout.block_index() == 1).nonzero().flatten()
    permutation[inside] = inside[torch.randperm(len(inside))]
    assert not torch.equal(permutation.sort().values, permutation), "the permutation moves something"
    permuted = mhla(q[:, :, permutation], k[:, :, permutation], v[:, :, permutation], mixing, layout)
    torch.testing.assert_close(permuted, mhla(q, k, v, mixing, layout)[:, :, permutation])


def attention_matrix(q: Tensor, k: Tensor, mixing: Tensor, layout: BlockLayout) -> Tensor:
    """A itself, read off with unit values: one head, ``[N, N]``."""
    tokens = layout.num_tokens
    v = torch.eye(tokens, dtype=q.dtype)[None, None]
    return mhla(q, k, v, mixing, layout)[0, 0]


def test_rank_is_bounded_by_blocks_and_not_by_width() -> None:
    layout, d = BlockLayout((8, 8), (4, 4)), 4
    q, k, _, mixing = make_inputs(layout, heads=1, d=d)
    q, k = q[:1], k[:1]
    bound = min(layout.num_tokens, layout.num_blocks * min(4, d))
    rank = int(torch.linalg.matrix_rank(attention_matrix(q, k, mixing, layout)))
    plain = BlockLayout((8, 8), (1, 1))
    plain_rank = int(torch.linalg.matrix_rank(attention_matrix(q, k, torch.ones(1, 1), plain)))
    assert plain_rank <= d < rank <= bound


def test_values_may_have_another_width(assert_close: AssertClose) -> None:
    layout = LAYOUTS[2]
    q, k, _, mixing = make_inputs(layout)
    v = torch.randn(2, 3, layout.num_tokens, 5, dtype=torch.float64)
    assert_close(mhla(q, k, v, mixing, layout), mhla_reference(q, k, v, mixing, layout))


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[2]], ids=str)
def test_nothing_is_nan_where_no_key_is_seen(layout: BlockLayout) -> None:
    q, k, v, mixing = make_inputs(layout, torch.float32)
    nothing = torch.zeros(2, layout.num_tokens, dtype=torch.bool)
    for options in ({"key_mask": nothing}, {}):
        weights = mixing if options else torch.zeros_like(mixing)
        out = mhla(q, k, v, weights, layout, **options)  # type: ignore[arg-type]
        assert torch.equal(out, torch.zeros_like(out))
        gradients = torch.autograd.grad(out.sum(), (q, k, v), allow_unused=True)
        assert all(gradient is None or gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_are_float32_whatever_the_input(assert_close: AssertClose, dtype: torch.dtype) -> None:
    # 16,384 features of about 8: a float16 sum overflows at 65,504 and a bfloat16 sum stops growing at 2,048.
    layout = BlockLayout((128, 128), (2, 2))
    q, k, v, mixing = (x.detach() for x in make_inputs(layout, dtype, heads=1, d=4))
    k = k.abs() + 8
    with torch.no_grad():
        exact = mhla(*(x.double() for x in (q, k, v, mixing)), layout)
    assert_close(mhla(q, k, v, mixing, layout), exact)
    with torch.autocast("cpu", dtype=dtype):
        # All three are cast, as F.scaled_dot_product_attention does: they were of this dtype before.
        found = mhla(q.float(), k.float(), v, mixing, layout)
    assert torch.equal(found, mhla(q, k, v, mixing, layout))


def test_inputs_need_not_be_contiguous(assert_close: AssertClose) -> None:
    layout = LAYOUTS[0]
    q, k, v, mixing = make_inputs(layout, torch.float32)
    strided = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    assert_close(mhla(*strided, mixing, layout), mhla(q, k, v, mixing, layout).double())


@pytest.mark.parametrize("extra", [None, (1, 2)])
def test_gradients_of_gradients(extra: tuple[int, int] | None) -> None:
    layout = BlockLayout((2, 3), (2, 2), extra)
    inputs = make_inputs(layout, heads=1, d=2)
    assert torch.autograd.gradgradcheck(lambda *x: mhla(*x, layout, feature_map="elu"), inputs)


def test_rotation_keeps_length_and_relative_position() -> None:
    angles = torch.arange(6, dtype=torch.float64)[:, None] * torch.tensor([1.0, 0.1])
    x, y = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    x, y = (apply_rotary_emb(z.expand(6, 4), (angles.cos(), angles.sin())) for z in (x, y))
    torch.testing.assert_close(x.norm(dim=-1), x[0].norm().expand(6))
    torch.testing.assert_close(x[5] @ y[3], x[2] @ y[0])


GOOD = BlockLayout((4, 4), (2, 2))
BAD_INPUT = {
    "layout": ({"layout": (4, 4)}, r"layout must be a BlockLayout\(grid, blocks\), got \(4, 4\)"),
    "no mixing": ({"mixing": None}, "mixing must be a tensor, got NoneType"),
    "feature map": ({"feature_map": "gelu"}, r"feature_map 'gelu' is not one of relu, elu, softmax"),
    "normalizer": ({"normalizer": "row"}, r"normalizer 'row' is not one of paper, official, none"),
    "mixing size": ({"mixing": torch.ones(3, 3)}, r"M = 4 .*got \(3, 3\)"),
    "mixing heads": ({"mixing": torch.ones(2, 4, 4)}, r"H = 1 and B = 1, got \(2, 4, 4\)"),
    "mixing samples": ({"mixing": torch.ones(2, 1, 4, 4)}, r"B = 1, got \(2, 1, 4, 4\)"),
    "keys": ({"k": torch.ones(1, 1, 15, 4)}, r"same B, H, N for k and v, got .*\(1, 1, 15, 4\)"),
    "heads": ({"q": torch.ones(1, 2, 16, 4)}, r"same B, H and d, got \(1, 2, 16, 4\)"),
    "width": ({"q": torch.ones(1, 1, 16, 6)}, r"same B, H and d, got \(1, 1, 16, 6\)"),
    "axes": ({"q": torch.ones(16, 4)}, r"must be \[B, H, N, d\].*got \(16, 4\)"),
    "grid": ({"layout": BlockLayout((4, 5), (2, 2))}, r"q hold 16 tokens, but the grid \(4, 5\) has 20"),
    "key grid": ({"key_layout": BlockLayout((3,), (2,))}, r"k and v hold 16 .* grid \(3,\) has 3"),
    "rotary of two grids": (
        {"key_layout": GOOD, "rotary_emb": (torch.ones(16, 2), torch.ones(16, 2))},
        r"leave rotary_emb out",
    ),
    "official of two grids": (
        {"key_layout": GOOD, "normalizer": "official"},
        r"keys of another grid .*take normalizer 'paper' or 'none'",
    ),
    "rotary axes": (
        {"rotary_emb": (torch.ones(1, 1, 1, 16, 2), torch.ones(1, 1, 1, 16, 2))},
        r"\[B, H, N, d / 2\] .*got \(1, 1, 1, 16, 2\)",
    ),
    "rotary with gradient": (
        {"rotary_emb": (torch.ones(16, 2, requires_grad=True), torch.ones(16, 2))},
        r"gets no gradient",
    ),
    "dtype": (
        {"q": torch.ones(1, 1, 16, 4, dtype=torch.int64)},
        r"q must have a floating-point dtype.*int64",
    ),
    "device": ({"mixing": torch.ones(4, 4, device="meta")}, r"q is on cpu, but mixing on meta"),
    "uneven official": (
        {"layout": BlockLayout((2, 8), (2, 3)), "mixing": torch.ones(6, 6), "normalizer": "official"},
        r"needs equal blocks.*normalizer='paper'",
    ),
    "extra official": (
        {
            "layout": BlockLayout((4, 3), (2, 1), (1, 3)),
            "mixing": torch.ones(3, 3),
            "normalizer": "official",
        },
        r"extra tokens are a block of their own; use normalizer='paper'",
    ),
    "extra tokens": (
        {"layout": BlockLayout((4, 4), (2, 2), (1, 3))},
        r"q hold 16 tokens, but the grid \(4, 4\) has 16 and 4 extra tokens",
    ),
    "extra mixing": (
        {"layout": BlockLayout((4, 3), (2, 2), (1, 3))},
        r"M = 5 \(blocks \(2, 2\) and that of extra tokens\).*got \(4, 4\)",
    ),
    "rotary": (
        {"rotary_emb": (torch.ones(16, 4), torch.ones(16, 4))},
        r"q \(1, 1, 16, 4\) .*got \(16, 4\)",
    ),
    "eps": ({"eps": -1.0}, r"eps must be a number from 0 to less than 1, got -1\.0"),
    "mask shape": ({"key_mask": torch.ones(1, 15, dtype=torch.bool)}, r"\[1, 16\].*\(1, 15\)"),
    "mask dtype": ({"key_mask": torch.ones(1, 16)}, r"bool tensor.*float32"),
}


@pytest.mark.parametrize("operator", [mhla, mhla_reference])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused(operator: Callable[..., Tensor], case: str) -> None:
    change, message = BAD_INPUT[case]
    x = torch.ones(1, 1, 16, 4)
    arguments = {"q": x, "k": x, "v": x, "mixing": torch.ones(4, 4), "layout": GOOD, **change}
    with pytest.raises(ValueError, match=message):
        operator(**arguments)

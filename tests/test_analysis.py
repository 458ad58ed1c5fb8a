"""Rank and entropy of attention matrices that are known, and the report about them."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mhla_diffusion import MHLA, MHLAConfig, MHLADiTTransformer2DModel
from mhla_diffusion.analysis import Analysis, analyze, audit_mixing, mixing_map
from mhla_diffusion.analysis.matrices import matrix_statistics, tables_of, window_matrices
from mhla_diffusion.analysis.record import _recording, analyze_stored
from mhla_diffusion.causal import CausalMHLA
from mhla_diffusion.ops import BlockLayout, initial_mixing, locality_mixing
from tests.backbones.cases import CASES
from tests.processes import run_script


class OneLayer(nn.Module):
    """A model of one MHLA layer."""

    def __init__(self, config: MHLAConfig, grid: tuple[int, ...], d: int = 4) -> None:
        super().__init__()
        self.grid = grid
        self.layer = MHLA(config, heads=2, head_dim=d, grid=grid)

    def forward(self, q: Tensor, k: Tensor, **kwargs: Any) -> Tensor:
        return self.layer(q, k, k, grid=self.grid, **kwargs)


def analyze_one(config: MHLAConfig, grid: tuple[int, ...] = (6, 6), **kwargs: Any) -> Any:
    model = OneLayer(config, grid)
    if model.layer.mixing is not None and "mixing" in kwargs:
        with torch.no_grad():
            model.layer.mixing.copy_(kwargs.pop("mixing"))
    q, k = kwargs.pop("qk", torch.randn(2, 1, 2, math.prod(grid), 4)).unbind()
    (layer,) = analyze(model, lambda: model(q, k, **kwargs)).layers
    return layer


def make_dit(**settings: Any) -> MHLADiTTransformer2DModel:
    model = MHLADiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, num_layers=3, sample_size=16,
        patch_size=2, num_embeds_ada_norm=4, attention=["mhla", "softmax", "linear"],
        mhla_config={"blocks": 4, "qk_norm": True, **settings},
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.abs().max() == 0:
            nn.init.normal_(parameter, std=0.2)
    return model


def hooks(model: nn.Module) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


def analyze_dit(model: MHLADiTTransformer2DModel, **kwargs: Any) -> Analysis:
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([1, 2]), torch.tensor([0, 3])
    return analyze(model, lambda: model(x, timestep=t, class_labels=y), **kwargs)


def test_rank_is_bounded_by_blocks_and_not_by_width() -> None:
    layer = analyze_one(MHLAConfig(blocks=(3, 3)))
    assert layer.rank_bound == 36, "9 blocks of 4 tokens, d 4"
    assert layer.matrices["linear"].rank <= 4
    assert 4 < layer.matrices["mhla"].rank <= 36
    assert analyze_one(MHLAConfig(blocks=(1, 2))).rank_bound == 8
    assert analyze_one(MHLAConfig(blocks=(1, 2), feature_map="hedgehog")).rank_bound == 16, "twice as wide"


def test_blocks_that_see_themselves_alone_have_the_rank_of_the_bound() -> None:
    layer = analyze_one(MHLAConfig(blocks=(2, 2), feature_map="softmax"), mixing=torch.eye(4))
    assert layer.matrices["mhla"].rank == layer.rank_bound == 16
    # Within one of four blocks of 9 tokens a row cannot be more even than this.
    assert layer.matrices["mhla"].entropy <= math.log(9)


def test_queries_that_do_not_tell_tokens_apart_give_uniform_rows() -> None:
    layer = analyze_one(MHLAConfig(blocks=(2, 3)), qk=torch.ones(2, 1, 2, 36, 4))
    for kind in ("softmax", "linear"):
        assert layer.matrices[kind].rank == 1
        assert layer.matrices[kind].entropy == pytest.approx(math.log(36))


def test_positions_turn_the_matrix_and_not_its_entropy() -> None:
    qk = torch.randn(2, 1, 2, 36, 4)
    angles = torch.rand(36, 2) * 6
    plain = analyze_one(MHLAConfig(blocks=(2, 2)), qk=qk)
    turned = analyze_one(MHLAConfig(blocks=(2, 2)), qk=qk, rotary_emb=(angles.cos(), angles.sin()))
    assert turned.matrices["mhla"].entropy == pytest.approx(plain.matrices["mhla"].entropy)
    assert turned.matrices["linear"].rank <= 4
    assert turned.matrices["softmax"].entropy != pytest.approx(plain.matrices["softmax"].entropy)


@pytest.mark.parametrize("local", ["shared", "gate", "only"])
def test_a_softmax_window_is_part_of_the_matrix(local: str) -> None:
    torch.manual_seed(0)
    config = MHLAConfig(blocks=(2, 2), local=local)
    layer = analyze_one(config)
    assert layer.kind == "local"
    assert 0 < layer.matrices["local"].entropy < math.log(36)
    even = analyze_one(config, qk=torch.zeros(2, 1, 2, 36, 4)).matrices["local"].entropy
    if local == "only":
        assert even == pytest.approx(math.log(9))
    else:
        assert math.log(9) < even < math.log(36) + 1e-9
    whole = analyze_one(MHLAConfig(blocks=1, local="only"))
    assert (whole.kind, sorted(whole.matrices)) == ("softmax", ["linear", "mhla", "softmax"])


def test_every_kind_of_layer_is_found_and_hooks_are_gone() -> None:
    model = make_dit(mixing_per_head=True, constraint="softmax")
    before = hooks(model)
    found = analyze_dit(model)
    assert [layer.kind for layer in found.layers] == ["mhla", "softmax", "linear"]
    assert [layer.mixing is not None for layer in found.layers] == [True, False, False]
    assert all(layer.num_tokens == 64 for layer in found.layers)
    assert found.layers[0].mixing is not None
    assert found.layers[0].mixing.row_sum_maximum == pytest.approx(1)
    assert hooks(model) == before
    mean = found.mean("mhla")
    assert mean.rank == pytest.approx(sum(layer.matrices["mhla"].rank for layer in found.layers) / 3)


def test_too_many_tokens_are_refused_and_hooks_are_gone() -> None:
    model = make_dit()
    before = hooks(model)
    with pytest.raises(ValueError, match=r"attn1.processor has 64 tokens, more than max_tokens = 63"):
        analyze_dit(model, max_tokens=63)
    assert hooks(model) == before


@pytest.mark.parametrize("size", [{"height": 0}, {"width": -8}], ids=str)
def test_sizes_that_are_none_are_refused(size: dict[str, int], tmp_path: Path) -> None:
    MHLADiTTransformer2DModel(
        num_attention_heads=1, attention_head_dim=8, in_channels=1, out_channels=1, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=2, mhla_config={"blocks": 4},
    ).save_pretrained(tmp_path)  # fmt: skip
    with pytest.raises(ValueError, match="height, width and frames must be 1 or more"):
        analyze_stored(str(tmp_path), **size)
    with pytest.raises(ValueError, match=r"has 1000000000000 tokens, more than max_tokens = 4096"):
        analyze_stored(str(tmp_path), height=2_000_000)
    with pytest.raises(ValueError, match=r"seed must be a whole number from 0 to \d+, got 1000000000"):
        analyze_stored(str(tmp_path), seed=10**20)


def test_a_model_without_attention_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Linear went through no self-attention"):
        analyze(model, lambda: model(torch.zeros(1, 2)))
    causal = CausalMHLA(MHLAConfig.paper(blocks=2), heads=1, head_dim=4, block_size=2)
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    with pytest.raises(ValueError, match=r"CausalMHLA went through no .*, but for causal ones"):
        analyze(causal, lambda: causal(q, k, v))


def test_what_has_no_matrices_is_refused() -> None:
    model = OneLayer(MHLAConfig(blocks=4), (4, 4))
    q, k = torch.randn(2, 1, 2, 16, 4)
    with pytest.raises(ValueError, match="max_matrices must be at least 1, got 0"):
        analyze(model, lambda: model(q, k), max_matrices=0)
    q[0, 0, 3] = math.nan
    with pytest.raises(ValueError, match="queries or keys of layer are not finite"):
        analyze(model, lambda: model(q, k))


def test_layers_may_be_called_by_names_alone() -> None:
    model = OneLayer(MHLAConfig(blocks=4), (4, 4))
    q, k = torch.randn(2, 1, 2, 16, 4)
    by_place, by_name = (
        analyze(model.layer, run).layers[0].matrices
        for run in (
            lambda: model.layer(q, k, k, grid=(4, 4)),
            lambda: model.layer(q=q, k=k, v=k, grid=(4, 4)),
        )
    )
    assert by_place == by_name


def test_audit_counts_what_a_checkpoint_may_hold() -> None:
    start = initial_mixing(BlockLayout((2, 2), (2, 2)), "uniform")
    mixing = start.clone()
    mixing[0, 1] = -0.75
    audit = audit_mixing(mixing, start)
    assert (audit.minimum, audit.maximum, audit.negatives) == (-0.75, 0.25, 1)
    assert (audit.row_sum_minimum, audit.row_sum_maximum) == (0, 1)
    assert audit.change == pytest.approx(1)
    assert audit_mixing(start, start).row_entropy == pytest.approx(math.log(4))


def test_extra_tokens_are_analyzed_and_padding_is_not() -> None:
    grid, extra = (4, 4), (0, 5)
    qk = torch.randn(2, 1, 2, 21, 4)
    mask = torch.arange(21)[None] < 18
    config = MHLAConfig(blocks=(2, 2), extra_block=True, feature_map="softmax")
    arguments: dict[str, Any] = {"grid": grid, "extra": extra, "qk": qk}
    layer = analyze_one(config, **arguments)
    assert (layer.grid, layer.blocks, layer.extra, layer.num_tokens) == (grid, (2, 2), 5, 21)
    assert layer.rank_bound == 20, "five blocks of at most d"
    # At the start they weigh as much as the own block, whose neighbours have 1 - 1 / sqrt(2) of that.
    own = 1 / (1 + 2 * (1 - 2**-0.5))
    assert layer.mixing.extra_share == pytest.approx(own / (1 + own))
    masked, shorter = (
        analyze_one(config, **arguments, key_mask=mask),
        analyze_one(config, grid=grid, extra=(0, 2), qk=qk[..., :18, :]),
    )
    for kind in ("softmax", "linear", "mhla"):
        assert masked.matrices[kind].rank == shorter.matrices[kind].rank
        assert masked.matrices[kind].entropy == pytest.approx(shorter.matrices[kind].entropy)
    identity = torch.eye(5)
    alone = analyze_one(config, **arguments, mixing=identity)
    assert alone.mixing.extra_share == 0
    assert mixing_map(identity, BlockLayout(grid, (2, 2), extra)) == mixing_map(
        identity[:4, :4], BlockLayout(grid, (2, 2))
    )


@torch.no_grad()
def test_joint_attention_is_analyzed_whatever_its_kind() -> None:
    """On what the layer attends with: its matrix is that of softmax over text and image, padding left out."""
    case = CASES["QwenImage"]
    model = case.make(attention=["softmax", "linear"])
    inputs = case.inputs(model, (3, 5), batch_size=1)
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :6]
    inputs["encoder_hidden_states_mask"] = torch.arange(6)[None] < 4
    softmax, linear = analyze(model, lambda: model(**inputs)).layers
    assert (softmax.kind, linear.kind) == ("softmax", "linear")
    assert {layer.num_tokens for layer in (softmax, linear)} == {21}
    assert softmax.matrices["linear"].rank <= 12
    inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :4]
    del inputs["encoder_hidden_states_mask"]
    for padded, bare in zip((softmax, linear), analyze(model, lambda: model(**inputs)).layers, strict=True):
        for kind in ("softmax", "linear"):
            assert padded.matrices[kind].entropy == pytest.approx(bare.matrices[kind].entropy)


def test_map_shows_each_query_block_where_it_lies() -> None:
    layout = BlockLayout((2, 3), (2, 3))
    picture = Image.open(io.BytesIO(mixing_map(torch.eye(6), layout, side=1)))
    assert picture.size == (3 * 4 - 1, 2 * 3 - 1)
    brightest, darkest = (253, 231, 37), (29, 17, 71)
    for i in range(2):
        for j in range(3):
            for y in range(2):
                for x in range(3):
                    expected = brightest if (i, j) == (y, x) else darkest
                    assert picture.getpixel((j * 4 + x, i * 3 + y)) == expected


def test_map_puts_frames_beside_each_other() -> None:
    layout = BlockLayout((2, 1, 2), (2, 1, 2))
    mixing = torch.zeros(4, 4)
    mixing[3, 1] = 1  # the last block of the second frame, to the last of the first
    picture = Image.open(io.BytesIO(mixing_map(mixing, layout, side=1)))
    assert picture.size == (4 * 5 - 1, 1)
    assert picture.getpixel((3 * 5 + 1, 0)) == (253, 231, 37)


def test_the_script_writes_a_report_once(tmp_path: Path) -> None:
    make_dit().save_pretrained(tmp_path / "model")
    command = ["analyze", "--model", tmp_path / "model", "--out", tmp_path / "out"]
    run_script(*command, "--width", "24").check_returncode()
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 1
    assert "transformer_blocks.2.attn1.processor" in page
    assert "http" not in page, "needs no network"
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["layers"][0]["grid"] == [8, 12]
    assert report["settings"]["latents"] == "2 x 16 x 24, noise"
    again = run_script(*command)
    assert again.returncode == 1
    assert "already there" in again.stderr


@pytest.mark.parametrize("local", ["shared", "gate", "only"])
@pytest.mark.parametrize(("margin", "routes", "exact"), [(0, 1, False), (0, 1, True), (1, 0, False)])
def test_the_matrix_of_a_layer_that_sees_further_is_what_acts_on_its_values(
    local: str, margin: int, routes: int, exact: bool
) -> None:
    seen = {"local_margin": margin, "routed_blocks": routes, "exact_routing": exact}
    config = MHLAConfig(blocks=(2, 2), local=local, **seen)
    module = MHLA(config, heads=1, head_dim=6, grid=(6, 6)).double()
    q, k, v = torch.randn(3, 1, 1, 36, 6, dtype=torch.float64)
    layout, _, mixing = module.fit((6, 6))
    options: dict[str, Any] = {"feature_map": module.operator_map, "eps": config.eps}
    call = (q, k, mixing.double(), layout, None, options, module.features(q, k))
    near, wide = (
        window_matrices(*call, form=local, weight=module.local, **settings)[0]
        for settings in ({}, {"margin": margin, "routes": routes, "exact": exact})
    )
    assert not torch.allclose(near, wide)
    torch.testing.assert_close(wide @ v[0, 0], module(q, k, v, grid=(6, 6))[0])


def test_queries_and_keys_are_recorded_behind_their_convolutions() -> None:
    module = MHLA(MHLAConfig(blocks=(2, 2), qk_conv=True), heads=1, head_dim=6, grid=(6, 6))
    for conv in (module.conv_q, module.conv_k):
        torch.nn.init.uniform_(conv.weight, 0.1, 1)  # type: ignore[union-attr]
    q, k, v = torch.randn(3, 1, 1, 36, 6)
    calls: dict[str, Any] = {}
    with _recording(module, calls, 100):
        module(q, k, v, grid=(6, 6))
    _, *found, _ = calls[""]
    layout, _, _ = module.fit((6, 6))
    torch.testing.assert_close(found, list(module.normed(q, k, layout)))
    assert not any(torch.allclose(x, before) for x, before in zip(found, (q, k), strict=True))


def test_a_routed_layer_on_a_grid_of_one_block_has_nothing_to_choose() -> None:
    config = MHLAConfig(blocks=(2, 2), local="shared", routed_blocks=1)
    module = MHLA(config, heads=1, head_dim=6, grid=(6, 6)).double()
    q, k, v = torch.randn(3, 1, 1, 1, 6, dtype=torch.float64)
    layout, _, mixing = module.fit((1, 1))
    options: dict[str, Any] = {"feature_map": module.operator_map, "eps": config.eps}
    call = (q, k, mixing.double(), layout, None, options, module.features(q, k))
    matrix = window_matrices(*call, form="shared", weight=module.local, routes=1)[0]
    torch.testing.assert_close(matrix @ v[0, 0], module(q, k, v, grid=(1, 1))[0])


def test_a_rank_does_not_count_what_float32_does_not_tell_from_nothing() -> None:
    acting = torch.diag(torch.tensor([1.0] * 35 + [1e-6], dtype=torch.float64))
    assert matrix_statistics(acting, acting).rank == 35


def test_the_change_of_heads_is_over_the_start_of_all() -> None:
    start = locality_mixing(BlockLayout((4, 4), (2, 2)))
    assert audit_mixing(torch.zeros(2, 4, 4), start).change == pytest.approx(1)


def test_a_map_of_heads_is_that_of_their_mean() -> None:
    layout, heads = BlockLayout((4, 4), (2, 2)), torch.rand(2, 4, 4)
    assert mixing_map(heads, layout) == mixing_map(heads.mean(0), layout)


def test_tables_are_those_of_the_sample_and_the_head() -> None:
    cos, sin = torch.rand(2, 2, 3, 5, 4)
    found = tables_of((cos, sin), 1, 2)
    assert torch.equal(found[0], cos[1, 2].double())
    assert torch.equal(found[1], sin[1, 2].double())
    alone = tables_of((cos[0, 0], sin[0, 0]), 1, 2)
    assert torch.equal(alone[0], cos[0, 0].double())


def test_matrices_that_are_looked_at_are_spread_over_samples() -> None:
    qk = 3 * torch.randn(2, 2, 2, 36, 4)
    qk[:, 1] = 1
    model = OneLayer(MHLAConfig(blocks=(2, 2)), (6, 6))
    one, two = (
        analyze(model, lambda: model(*qk), max_matrices=most).layers[0].matrices["softmax"].entropy
        for most in (1, 2)
    )
    assert one < 0.9 * math.log(36)
    assert two == pytest.approx((one + math.log(36)) / 2)


@pytest.mark.parametrize("local", [None, "shared"])
def test_each_head_has_its_own_mixing_and_weight(local: str | None) -> None:
    model = OneLayer(MHLAConfig(blocks=(2, 2), mixing_per_head=True, local=local), (6, 6))
    q, k = torch.randn(2, 1, 1, 36, 4).expand(2, 1, 2, 36, 4)

    @torch.no_grad()
    def entropy(first: int) -> float:
        if local:
            model.layer.local[first], model.layer.local[1 - first] = -4.0, 4.0
        else:
            model.layer.mixing[first], model.layer.mixing[1 - first] = torch.eye(4), torch.ones(4, 4)
        matrices = analyze(model, lambda: model(q, k)).layers[0].matrices
        return matrices["local" if local else "mhla"].entropy

    assert entropy(0) == pytest.approx(entropy(1))


def test_features_have_the_eps_of_their_config() -> None:
    qk = torch.randn(2, 1, 2, 36, 4)
    small, large = (
        analyze_one(MHLAConfig(blocks=(2, 2), eps=eps), qk=qk).matrices["linear"].entropy
        for eps in (1e-6, 0.9)
    )
    assert large > small + 0.01


def test_a_stored_model_is_analysed_at_its_time_on_noise_of_its_seed(tmp_path: Path) -> None:
    make_dit().save_pretrained(tmp_path)
    early, again, late, other = (
        analyze_stored(str(tmp_path), timestep=timestep, seed=seed, batch_size=1).layers
        for timestep, seed in ((10, 0), (10, 0), (900, 0), (10, 1))
    )
    assert early == again
    assert early != late
    assert early != other

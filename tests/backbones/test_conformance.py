"""What users of diffusers take for granted of a model, for every backbone and every kind of attention."""

from __future__ import annotations

import copy
import inspect
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import send_to_device
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from mhla_diffusion import MHLAAttnProcessor, convert_to_mhla
from mhla_diffusion.backbones.grid import our_arguments
from mhla_diffusion.backbones.positions import rotary_pairs
from mhla_diffusion.backbones.processors import is_joint, rotary_heads, split_heads
from mhla_diffusion.backbones.teacher import as_teacher, fingerprint
from mhla_diffusion.ops import apply_rotary_emb, mhla_reference

from .cases import CASES, EVERY_PART, Case, sample

KINDS = list(CASES["DiT"].kinds())


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, case: Case) -> Any:
    return case.make(**case.kinds()[request.param])


def one_of(value: Any, i: int) -> Any:
    """Argument of sample i alone."""
    return value[i : i + 1] if isinstance(value, Tensor) and len(value) == 2 else value


def gradients(model: nn.Module, *batches: dict[str, Any]) -> dict[str, Tensor]:
    """Of one loss over all batches, all forward calls before the backward one."""
    model.zero_grad()
    losses = [sample(model, batch).square().mean() for batch in batches]
    torch.stack(losses).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_stock_argument_is_taken_with_its_default(case: Case) -> None:
    for method in ("__init__", "forward"):
        stock, ours = (
            inspect.signature(getattr(cls, method)).parameters for cls in (case.model.stock, case.model)
        )
        assert [*stock] == [*ours][: len(stock)]
        assert all(ours[name].default == parameter.default for name, parameter in stock.items())
    assert [*ours] == [*stock], "the forward takes nothing more"


def test_arguments_by_position_are_those_of_the_stock_class(case: Case) -> None:
    names = list(inspect.signature(case.model.stock.__init__).parameters)[1:3]
    values = [case.stock().config[name] for name in names]
    rest = {name: value for name, value in case.settings.items() if name not in names}
    model = case.model(*values, **rest, **case.own, mhla_config=case.config())
    assert [model.config[name] for name in names] == values
    with pytest.raises(TypeError, match="heads"):
        case.model(**case.settings, heads=3)


def test_stock_layers_are_the_stock_model_to_the_bit(case: Case) -> None:
    stock, model = case.stock(), case.make(attention=case.stock_kind)
    model.load_state_dict(stock.state_dict())
    for grid in case.grids[: 1 if case.name == "DiT" else None]:  # stock DiT is square-only
        inputs = case.inputs(model, grid)
        assert torch.equal(sample(model, inputs), sample(stock, inputs))
    assert {type(block) for block in getattr(stock, case.layers)} <= {
        cls for block in getattr(model, case.layers) for cls in type(block).__mro__
    }


def test_blocks_and_processors_of_stock_layers_stay_stock(case: Case) -> None:
    model = case.make(attention=[case.stock_kind, "mhla"])
    first, second = getattr(model, case.layers)
    stock = getattr(case.stock(), case.layers)[1]
    if case.name == "Sana":  # whose blocks are told the grid and do not pass it on
        assert isinstance(second, type(stock))
    else:
        assert type(second) is type(stock)
    assert type(case.attention(first).processor) is type(case.attention(stock).processor)
    assert isinstance(case.attention(second).processor, MHLAAttnProcessor)


@pytest.mark.parametrize("kind", ["softmax", "mhla"])
@torch.no_grad()
def test_a_layer_is_its_formula_on_the_queries_and_keys_of_the_stock_layer(
    case: Case, kind: str, assert_close: Callable[..., None]
) -> None:
    if kind == "softmax" and case.stock_kind != "softmax":
        pytest.skip("the stock layer is linear")
    model = case.make(attention=kind)
    calls: list[Any] = []
    attn = model.self_attention[0]
    if is_joint(attn):
        pytest.skip("its text has a test of its own")
    attn.register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(our_arguments(attn, args, kwargs)),
        with_kwargs=True,
        prepend=True,
    )
    attn.register_forward_hook(lambda _, args, output: calls.append(output))
    grid = case.grids[3]
    sample(model, case.inputs(model, grid))
    (args, kwargs), output = calls
    assert kwargs["grid"] == grid
    x = args[0] if args else kwargs["hidden_states"]
    q, k = rotary_heads(attn.to_q(x), attn, attn.norm_q), rotary_heads(attn.to_k(x), attn, attn.norm_k)
    v = split_heads(attn.to_v(x), attn)
    tables = args[3] if len(args) > 3 else kwargs.get("rotary_emb", kwargs.get("image_rotary_emb"))
    turns = None if tables is None else rotary_pairs(tables, attn)
    if kind == "softmax":
        q, k = (x if turns is None else apply_rotary_emb(x, turns) for x in (q, k))
        expected = F.scaled_dot_product_attention(q, k, v)
    else:
        layout, _, mixing = attn.processor.fit(grid)
        expected = mhla_reference(q, k, v, mixing, layout, rotary_emb=turns).float()
    expected = expected.transpose(1, 2)
    if output.ndim == 3:
        expected = attn.to_out[0](expected.flatten(2))
    # Kandinsky rounds queries and keys before softmax.
    rounded = case.name == "Kandinsky5" and kind == "softmax"
    assert_close(output, expected, torch.bfloat16 if rounded else None)


def test_any_grid_runs_and_is_heard(model: Any, case: Case) -> None:
    outputs = [sample(model, case.inputs(model, grid)) for grid in case.grids]
    for grid, output in zip(case.grids, outputs, strict=True):
        sizes = case.inputs(model, grid)["hidden_states"].shape
        assert output.shape[2:] == sizes[2:] or output.shape[:2] == sizes[:2]
        assert output.isfinite().all()


def test_example_inputs_are_those_of_the_generator(case: Case) -> None:
    model = case.make()
    first, again, other = (
        model.example_inputs(case.grids[1], generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    assert all(torch.equal(again[key], x) for key, x in first.items() if isinstance(x, Tensor))
    assert not torch.equal(other["hidden_states"], first["hidden_states"])


def test_a_size_that_the_patch_does_not_divide_is_refused(case: Case) -> None:
    model = case.make()
    inputs = case.inputs(model)
    if inputs["hidden_states"].ndim == 3:
        pytest.skip("is given tokens")
    if getattr(model.config, "patch_size", 2) == 1:
        pytest.skip("has patches of one latent")
    last = -2 if case.name == "Kandinsky5" else -1  # channels are last there
    latents = inputs["hidden_states"]
    inputs["hidden_states"] = latents.narrow(last, 0, latents.shape[last] - 1)
    with pytest.raises(ValueError, match="must be multiples of the patch"):
        model(**inputs)


def test_two_calls_agree_and_a_tuple_holds_the_output(model: Any, case: Case) -> None:
    inputs = case.inputs(model)
    output = model(**inputs)
    assert torch.equal(output.sample, model(**inputs).sample)
    as_tuple = model(**inputs, return_dict=False)
    assert case.name == "Kandinsky5" or (isinstance(as_tuple, tuple) and len(as_tuple) == 1)
    assert torch.equal(sample(model, inputs), output.sample)


def test_each_sample_of_a_batch_is_on_its_own(
    model: Any, case: Case, assert_close: Callable[..., None]
) -> None:
    inputs = case.inputs(model, case.grids[3])
    alone = [sample(model, {k: one_of(v, i) for k, v in inputs.items()}) for i in range(2)]
    assert_close(sample(model, inputs), torch.cat(alone))


def test_config_rebuilds_the_architecture(model: Any, case: Case, tmp_path: Path) -> None:
    model.save_config(tmp_path)
    for rebuilt in (
        case.model.from_config(case.model.load_config(tmp_path)),
        case.model.from_config(model.config),
    ):
        before, after = (
            json.loads(json.dumps({key: value for key, value in m.config.items() if key[0] != "_"}))
            for m in (model, rebuilt)
        )
        assert after == before
        assert rebuilt.layer_attention == model.layer_attention
        rebuilt.load_state_dict(model.state_dict())


def test_a_training_step_reaches_every_parameter(model: Any, case: Case) -> None:
    before = copy.deepcopy(model.state_dict())
    # In proportion to no gradient, as some are too small for a step of SGD.
    optimizer = torch.optim.Adam(model.train().parameters(), lr=1e-2)
    sample(model, case.inputs(model, case.grids[3])).square().mean().backward()
    stock = case.stock()
    sample(stock, case.inputs(stock, case.grids[0])).square().mean().backward()
    # Such as a token for padding, or the last queries of a text in joint attention, which is no output.
    idle, without = (
        {name for name, p in x.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
        for x in (stock, model)
    )
    assert without <= idle
    optimizer.step()
    unmoved = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert unmoved <= idle


def test_checkpointing_keeps_gradients_with_grids_interleaved(case: Case) -> None:
    if not case.model._supports_gradient_checkpointing:
        pytest.skip("the stock class has none")
    model = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    batches = [case.inputs(model, grid) for grid in case.grids[:3]]
    expected = gradients(model.train(), *batches)
    model.enable_gradient_checkpointing()
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    getattr(model, case.layers)[1].register_forward_pre_hook(count)
    torch.testing.assert_close(gradients(model, *batches), expected, rtol=1e-4, atol=1e-5)
    assert calls == 6, "every batch runs a second time on the way back"


def test_threads_with_different_grids_share_a_model(case: Case) -> None:
    model = case.make(attention=["mhla", case.stock_kind])
    batches = [case.inputs(model, grid) for grid in case.grids[1:3]]
    with torch.no_grad():
        expected = [sample(model, batch) for batch in batches]
    wrong: list[int] = []
    start = threading.Barrier(len(batches))

    def work(i: int) -> None:
        start.wait()
        for _ in range(40):
            with torch.no_grad():
                if not torch.equal(sample(model, batches[i]), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("model", ["mhla", "hybrid"], indirect=True)
def test_ema_follows_saves_and_loads(model: Any, case: Case, tmp_path: Path) -> None:
    ema = EMAModel(model.parameters(), decay=0.5, model_cls=case.model, model_config=model.config)
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    sample(model, case.inputs(model)).square().mean().backward()
    optimizer.step()
    ema.step(model.parameters())
    decay = ema.cur_decay_value
    ema.save_pretrained(tmp_path)
    averaged = case.model.from_pretrained(tmp_path)
    for name, parameter in averaged.named_parameters():
        expected = decay * start[name] + (1 - decay) * model.get_parameter(name)
        torch.testing.assert_close(parameter, expected)
    assert averaged.layer_attention == model.layer_attention


@pytest.mark.parametrize(
    ("model", "dtype"),
    [*((kind, torch.bfloat16) for kind in KINDS), ("mhla", torch.float16)],
    indirect=["model"],
    ids=str,
)
def test_half_precision_stays_close_and_keeps_its_dtype(model: Any, case: Case, dtype: torch.dtype) -> None:
    expected = sample(model, case.inputs(model, case.grids[3]))
    case.cast(model, dtype)
    assert case.keeps_float32 or {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = sample(model, case.inputs(model, case.grids[3], dtype=dtype))
    assert output.dtype == dtype
    # Two layers of rounding, with random weights ten times the usual size.
    error = (output.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 6e-2, torch.float16: 1e-2}[dtype]


def test_the_meta_device_gives_shapes_alone(model: Any, case: Case) -> None:
    inputs = case.inputs(model)
    expected = sample(model, inputs)
    found = sample(copy.deepcopy(model).to("meta"), send_to_device(inputs, "meta"))
    assert found.is_meta
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)


def test_autocast_keeps_sums_in_float32(case: Case) -> None:
    model = case.make(mhla=EVERY_PART)
    expected = sample(model, case.inputs(model))
    with torch.autocast("cpu", torch.bfloat16):
        output = sample(model, case.inputs(model))
    assert output.isfinite().all()
    assert (output.float() - expected).norm() / expected.norm() < 6e-2


def test_conversion_takes_every_stock_weight_over(case: Case) -> None:
    stock = case.stock()
    model, info = convert_to_mhla(stock, case.config(gate=True, layers=[1]), output_loading_info=True)
    assert type(model) is case.model
    assert model.layer_attention == [case.stock_kind, "mhla"]
    fresh = dict(model.named_parameters())
    assert all(fresh[name].data_ptr() == p.data_ptr() for name, p in stock.named_parameters())
    assert info["dropped"] == []
    assert {name.rpartition(".processor.")[2] for name in info["new"]} == {
        "mixing", "gate.weight", "gate.bias",
    }  # fmt: skip
    same = convert_to_mhla(stock, {"layers": []})
    for grid in case.grids[:1]:
        inputs = case.inputs(model, grid)
        assert torch.equal(sample(same, inputs), sample(stock, inputs))
        assert not torch.equal(sample(model, inputs), sample(stock, inputs))
    assert sample(model, case.inputs(model, case.grids[3])).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_converted_model_is_the_one_that_is_made_and_filled(case: Case, dtype: torch.dtype) -> None:
    """What conversion leaves on the meta device, or does not start, would show."""
    stock = case.stock().to(dtype)
    converted = convert_to_mhla(stock, case.config(**EVERY_PART))
    made = case.model(**case.settings, **case.own, mhla_config=case.config(**EVERY_PART)).to(dtype)
    missing = made.load_state_dict(stock.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all(".processor." in name for name in missing.missing_keys)
    for (name, a), (_, b) in zip(
        sorted(converted.state_dict().items()), sorted(made.state_dict().items()), strict=True
    ):
        assert torch.equal(a, b), name
        assert a.dtype == b.dtype
    for grid in case.grids if dtype == torch.float32 else ():  # a cast rounds tables, a conversion does not
        inputs = case.inputs(made, grid)
        assert torch.equal(sample(converted, inputs), sample(made.eval(), inputs))


def test_weights_that_are_not_there_are_not_converted(case: Case) -> None:
    stock = case.stock()
    stock.proj = nn.Module()
    stock.proj.base_layer = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"the model has proj\.base_layer\.weight: merge or unload"):
        convert_to_mhla(stock, case.config())
    del stock.proj
    stock.to("meta")
    with pytest.raises(ValueError, match="is offloaded"):
        convert_to_mhla(stock, case.config())


def test_settings_that_do_not_fit_are_refused_before_weights_are_made(case: Case) -> None:
    many = [100] * len(case.blocks)
    # As large as it likes to be: 400 billion weights would not be made in time.
    known = inspect.signature(case.model.stock).parameters
    sizes = {
        "num_attention_heads": 1000,
        "attention_head_dim": 1000,
        "hidden_size": 10**6,
        "model_dim": 12 * 10**5,
    }
    large = {name: size for name, size in sizes.items() if name in known}
    for settings, message in (
        ({"attention": "flash"}, "attention must be one of mhla, .*linear.*, got 'flash'"),
        ({"attention": ["mhla"]}, "attention names 1 layers, but the model has 2"),
        ({"mhla_config": {"layers": [2]}}, "names layer 2, but the layers are 0 to 1"),
        ({"mhla_config": {"blocks": many}}, "cannot hold 100 blocks"),
        ({"mhla_config": {"block": 4}}, "unknown MHLA setting block"),
    ):
        with pytest.raises(ValueError, match=message):
            case.make(**{**large, **settings})


@pytest.mark.parametrize("name", ["HunyuanDiT", "Allegro"])
def test_softmax_layers_run_without_positions_as_the_stock_ones(name: str) -> None:
    case = CASES[name]
    stock, model = case.stock(), case.make(attention="softmax")
    model.load_state_dict(stock.state_dict())
    inputs = {**case.inputs(model), "image_rotary_emb": None}
    assert torch.equal(sample(model, inputs), sample(stock, inputs))


def test_latte_leaves_out_padding_of_texts_as_the_stock_model() -> None:
    case = CASES["Latte"]
    stock, model = case.stock(), case.make(attention="softmax")
    model.load_state_dict(stock.state_dict())
    inputs = case.inputs(model)
    text = inputs["encoder_hidden_states"]
    # The stock class repeats texts over frames, and not masks.
    mask = (torch.arange(text.shape[1]) < 5).expand(len(text) * model.config.video_length, -1)
    masked = {**inputs, "encoder_attention_mask": mask}
    found = sample(model, masked)
    assert torch.equal(found, sample(stock, masked))
    assert not torch.equal(found, sample(model, inputs))


def test_a_teacher_is_frozen_and_known_by_all_of_its_weights() -> None:
    teacher = as_teacher(CASES["DiT"].stock().train())
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = fingerprint(teacher)
    teacher.proj_out_2.weight.data[-1, -1] += 1
    assert fingerprint(teacher) != before

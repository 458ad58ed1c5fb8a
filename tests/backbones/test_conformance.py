"""What users of diffusers take for granted of a model, checked for every kind of attention."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.training_utils import EMAModel
from torch import Tensor

from mhla_diffusion import MHLAAttnProcessor, MHLADiTTransformer2DModel

MakeModel = Callable[..., MHLADiTTransformer2DModel]
MakeInputs = Callable[..., dict[str, Tensor]]

KINDS: dict[str, dict[str, Any]] = {
    "mhla": {"mhla_config": {"blocks": 4, "cpe": "zero", "gate": True, "output_norm": True}},
    "softmax logits": {"mhla_config": {"blocks": [2, 1], "constraint": "softmax", "mixing_per_head": True}},
    "linear": {"attention": "linear"},
    "hybrid": {"attention": ["softmax", "mhla"]},
    "softmax": {"attention": "softmax"},
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, make_model: MakeModel) -> MHLADiTTransformer2DModel:
    return make_model(**KINDS[request.param])


def test_two_calls_agree(model: MHLADiTTransformer2DModel, make_inputs: MakeInputs) -> None:
    assert torch.equal(model(**make_inputs()).sample, model(**make_inputs()).sample)


def test_a_tuple_holds_what_the_output_class_holds(
    model: MHLADiTTransformer2DModel, make_inputs: MakeInputs
) -> None:
    output = model(**make_inputs())
    as_tuple = model(**make_inputs(), return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert len(as_tuple) == len(output.to_tuple()) == 1
    assert torch.equal(as_tuple[0], output["sample"])


def test_each_image_of_a_batch_is_on_its_own(
    model: MHLADiTTransformer2DModel, make_inputs: MakeInputs, assert_close: Callable[..., None]
) -> None:
    inputs = make_inputs((8, 12))
    alone = [model(**{key: value[i : i + 1] for key, value in inputs.items()}).sample for i in range(2)]
    assert_close(model(**inputs).sample, torch.cat(alone))


def test_config_rebuilds_the_architecture(model: MHLADiTTransformer2DModel, tmp_path: Path) -> None:
    model.save_config(tmp_path)
    for rebuilt in (
        MHLADiTTransformer2DModel.from_config(MHLADiTTransformer2DModel.load_config(tmp_path)),
        MHLADiTTransformer2DModel.from_config(model.config),
    ):
        assert {key: value for key, value in rebuilt.config.items() if key[0] != "_"} == {
            key: value for key, value in model.config.items() if key[0] != "_"
        }
        assert rebuilt.layer_attention == model.layer_attention
        rebuilt.load_state_dict(model.state_dict())


def test_every_stock_argument_is_taken_with_its_default() -> None:
    stock = inspect.signature(DiTTransformer2DModel.__init__).parameters
    ours = inspect.signature(MHLADiTTransformer2DModel.__init__).parameters
    assert [*stock] == [*ours][: len(stock)]
    assert all(ours[name].default == parameter.default for name, parameter in stock.items())
    forward = inspect.signature(MHLADiTTransformer2DModel.forward).parameters
    assert [*forward] == [*inspect.signature(DiTTransformer2DModel.forward).parameters]


def test_a_training_step_reaches_every_parameter(
    model: MHLADiTTransformer2DModel, make_inputs: MakeInputs
) -> None:
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.train().parameters(), lr=1e-2)
    model(**make_inputs((8, 12))).sample.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without
    optimizer.step()
    unmoved = [name for name, value in model.state_dict().items() if torch.equal(value, before[name])]
    # Softmax does not depend on the bias of its keys.
    assert all(name.endswith("attn1.to_k.bias") for name in unmoved)


def test_ema_follows_saves_and_loads(
    model: MHLADiTTransformer2DModel, make_inputs: MakeInputs, tmp_path: Path
) -> None:
    ema = EMAModel(
        model.parameters(), decay=0.5, model_cls=MHLADiTTransformer2DModel, model_config=model.config
    )
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(**make_inputs()).sample.square().mean().backward()
    optimizer.step()
    ema.step(model.parameters())
    decay = ema.cur_decay_value
    ema.save_pretrained(tmp_path)
    averaged = MHLADiTTransformer2DModel.from_pretrained(tmp_path)
    for name, parameter in averaged.named_parameters():
        expected = decay * start[name] + (1 - decay) * model.get_parameter(name)
        torch.testing.assert_close(parameter, expected)
    assert averaged.layer_attention == model.layer_attention


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_keeps_its_dtype(
    model: MHLADiTTransformer2DModel, make_inputs: MakeInputs, dtype: torch.dtype
) -> None:
    expected = model(**make_inputs((8, 12))).sample
    model.to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    output = model(**make_inputs((8, 12), dtype=dtype)).sample
    assert output.dtype == dtype
    # Two layers of rounding, with random weights ten times the usual size.
    error = (output.float() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 5e-2, torch.float16: 5e-3}[dtype]


def test_a_cast_keeps_positions_exact(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    """The model's own grid reads a table, others compute it: a cast must not tell them apart."""
    model = make_model()
    table = model.pos_embed.pos_embed.clone()
    model.to(torch.bfloat16).to(torch.float64)
    assert torch.equal(model.pos_embed.pos_embed, table)
    assert model(**make_inputs(dtype=torch.float64)).sample.dtype == torch.float64


def test_autocast_keeps_sums_in_float32(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    model = make_model()
    expected = model(**make_inputs()).sample
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**make_inputs()).sample
    assert output.isfinite().all()
    assert (output.float() - expected).norm() / expected.norm() < 5e-2


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e4),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=5.0),
    "Adam foreach": lambda parameters: torch.optim.Adam(parameters, lr=5.0, foreach=True),
    "AdamW fused": lambda parameters: torch.optim.AdamW(parameters, lr=5.0, fused=True),
}


def as_it_is(model: MHLADiTTransformer2DModel, folder: Path) -> MHLADiTTransformer2DModel:
    return model


def copied(model: MHLADiTTransformer2DModel, folder: Path) -> MHLADiTTransformer2DModel:
    return copy.deepcopy(model)


def loaded(model: MHLADiTTransformer2DModel, folder: Path, **options: Any) -> MHLADiTTransformer2DModel:
    model.save_pretrained(folder)
    return MHLADiTTransformer2DModel.from_pretrained(folder, **options)


def loaded_at_once(model: MHLADiTTransformer2DModel, folder: Path) -> MHLADiTTransformer2DModel:
    return loaded(model, folder, low_cpu_mem_usage=False)


def cast(model: MHLADiTTransformer2DModel, folder: Path) -> MHLADiTTransformer2DModel:
    return model.to(torch.float64)


@pytest.mark.parametrize("origin", [as_it_is, copied, loaded, loaded_at_once, cast])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mixing_lies_in_range_after_any_step(
    make_model: MakeModel,
    make_inputs: MakeInputs,
    tmp_path: Path,
    optimizer: str,
    origin: Callable[..., MHLADiTTransformer2DModel],
) -> None:
    model = origin(make_model(), tmp_path)
    mixing = [m.mixing for m in model.modules() if isinstance(m, MHLAAttnProcessor)]
    before = [matrix.clone() for matrix in mixing]
    # The mixing matrices alone: elsewhere such a step would leave nothing finite to look at.
    step = OPTIMIZERS[optimizer](mixing)
    model(**make_inputs(dtype=model.dtype)).sample.square().mean().backward()
    step.step()
    for matrix, start in zip(mixing, before, strict=True):
        assert not torch.equal(matrix, start)
        assert matrix.min() == 0
        assert matrix.max() == 1


def test_anothers_step_leaves_a_living_graph_alone(make_model: MakeModel, make_inputs: MakeInputs) -> None:
    model = make_model()
    expected = torch.autograd.grad(model(**make_inputs()).sample.square().mean(), list(model.parameters()))
    loss = model(**make_inputs()).sample.square().mean()
    other = torch.nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=1.0).step()
    assert all(map(torch.equal, torch.autograd.grad(loss, list(model.parameters())), expected))

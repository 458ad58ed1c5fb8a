"""Vision transformers of transformers with MHLA: the stock weights, any grid, and the Auto classes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

import mhla_diffusion
from mhla_diffusion import MHLAConfig, convert_to_mhla
from mhla_diffusion.attention import MHLA
from mhla_diffusion.backbones import load_transformer
from mhla_diffusion.domains import FAMILIES
from mhla_diffusion.ops import BlockLayout, mhla_reference

VISION = [
    f"{family}{kind}" for family, (room, kinds) in FAMILIES.items() for kind in kinds if room == "vision"
]
SIZES: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32, "patch_size": 4,
    "num_labels": 3, "num_channels": 1,
}  # fmt: skip


def make_stock(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = getattr(transformers, name)
    return model(model.config_class(**{**SIZES, **changes})).eval()


def output(model: Any, pixels: Tensor, **inputs: Any) -> Tensor:
    out = model(pixels, **inputs)
    return out.logits if "logits" in out else out.last_hidden_state


@pytest.fixture(params=VISION)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_models_are_converted_saved_and_loaded_by_the_auto_classes(name: str, tmp_path: Path) -> None:
    stock, pixels = make_stock(name), torch.randn(2, 1, 32, 32)
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    config = MHLAConfig(blocks=4, gate=True, cpe="zero", layers=(1,))
    model, info = convert_to_mhla(stock, config, output_loading_info=True)
    assert type(model) is getattr(mhla_diffusion, f"MHLA{name}")
    assert {key.rpartition(".mhla.")[2] for key in info["new"]} == {
        "mixing", "local", "gate.weight", "gate.bias", "cpe.weight", "cpe.bias"
    }  # fmt: skip
    assert not info["dropped"]
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    next(module for module in model.modules() if isinstance(module, MHLA)).mixing.data.uniform_()
    model.save_pretrained(tmp_path)
    # By these names the Trainer of transformers resumes.
    assert load_file(tmp_path / "model.safetensors").keys() == after.keys()
    auto = AutoModel if name.endswith("Model") else AutoModelForImageClassification
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.mhla_config == {**config.to_dict(), "extra_block": True}
    assert torch.equal(output(loaded, pixels), output(model, pixels))
    if not name.startswith("DeiTFor"):  # of which there are two, as there are of stock ones
        new = type(model.config)(**{**model.config.to_dict(), "architectures": None})
        assert type(auto.from_config(new)) is type(model)
    # A file of the stock model: MHLA is at its start.
    stock.save_pretrained(tmp_path / "stock")
    fresh = type(model).from_pretrained(tmp_path / "stock", mhla_config=config)
    torch.testing.assert_close(output(fresh, pixels), output(convert_to_mhla(stock, config), pixels))


def test_layers_that_keep_softmax_are_the_stock_function_at_any_size(name: str) -> None:
    stock = make_stock(name)
    model = convert_to_mhla(stock, {"blocks": 4, "layers": []})
    for pixels in (torch.randn(2, 1, 32, 32), torch.randn(2, 1, 24, 40)):
        tuned = {} if "Dinov2" in name else {"interpolate_pos_encoding": True}
        torch.testing.assert_close(output(model, pixels), output(stock, pixels, **tuned))


def test_a_layer_is_the_reference_with_the_tokens_before_the_patches_as_a_block(name: str) -> None:
    model = convert_to_mhla(make_stock(name), {"blocks": [2, 3], "constraint": "none"}).double()
    layer = next(module for module in model.modules() if hasattr(module, "mhla"))
    layer.mhla.mixing.data.uniform_()
    seen: dict[str, Any] = {}
    layer.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(x=args[0], grid=kwargs["grid"], out=out[0]), with_kwargs=True
    )
    output(model, torch.randn(1, 1, 24, 40, dtype=torch.float64))
    extra = 2 if "DeiT" in name else 1
    assert seen["grid"] == (6, 10)
    assert seen["x"].shape[1] == 60 + extra
    q, k, v = (
        part(seen["x"]).unflatten(-1, (2, 16)).transpose(1, 2)
        for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    layout = BlockLayout((6, 10), (2, 3), (extra, 0))
    expected = mhla_reference(q, k, v, layer.mhla.mixing, layout).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen["out"], layer.o_proj(expected))


def test_patches_need_not_be_square() -> None:
    model = convert_to_mhla(
        make_stock("ViTModel", image_size=(32, 24), patch_size=(8, 4)), {"blocks": [2, 3]}
    )
    grids: list[Any] = []
    model.layers[0].attention.register_forward_pre_hook(
        lambda _, args, kwargs: grids.append(kwargs["grid"]), with_kwargs=True
    )
    assert output(model, torch.randn(1, 1, 32, 24)).shape == (1, 25, 32)
    assert grids == [(4, 6)]


@pytest.mark.parametrize("training", [True, False])
def test_conversion_keeps_mode_dtype_checkpointing_and_what_is_frozen(training: bool) -> None:
    stock = make_stock("ViTModel").to(torch.bfloat16).train(training)
    stock.embeddings.requires_grad_(False)
    stock.gradient_checkpointing_enable()
    model = convert_to_mhla(stock, {"blocks": 4, "gate": True})
    assert {module.training for module in model.modules()} == {training}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.is_gradient_checkpointing
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {f"embeddings.{name}" for name, _ in stock.embeddings.named_parameters()}


@pytest.mark.parametrize("family", ["ViTModel", "DeiTModel"])
@pytest.mark.parametrize("parts", [{"add_pooling_layer": False}, {"use_mask_token": True}], ids=str)
def test_models_without_a_pooler_or_with_a_token_for_masks_are_converted(
    family: str, parts: dict[str, bool]
) -> None:
    config = make_stock(family).config
    stock = type(make_stock(family))(config, **parts).eval()
    converted = convert_to_mhla(stock, MHLAConfig(blocks=1, local="only"))
    assert not any(weight.is_meta for weight in converted.parameters())
    assert (converted.pooler is None) == (stock.pooler is None)
    inputs = {"pixel_values": torch.randn(1, config.num_channels, 32, 32)}
    if parts.get("use_mask_token"):
        inputs["bool_masked_pos"] = torch.rand(1, (32 // config.patch_size) ** 2) < 0.5
    torch.testing.assert_close(
        converted.eval()(**inputs).last_hidden_state, stock(**inputs).last_hidden_state, rtol=1e-5, atol=1e-6
    )


def test_files_with_a_part_of_a_layer_are_refused(tmp_path: Path) -> None:
    model = convert_to_mhla(make_stock("ViTModel"), {"blocks": 4})
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the files lack .*gate\.weight but hold .*mixing: load with"):
        type(model).from_pretrained(tmp_path, mhla_config={"blocks": 4, "gate": True})


def test_linear_attention_needs_no_matrix() -> None:
    model = convert_to_mhla(make_stock("ViTModel"), attention="linear")
    assert not any("mhla" in key for key in model.state_dict())
    layer = model.layers[0].attention
    assert layer.mhla.mixing_matrix().tolist() == [[1]]


def test_a_mask_leaves_tokens_out_of_layers_of_both_kinds() -> None:
    model = convert_to_mhla(make_stock("ViTModel"), {"blocks": 4, "layers": [0]})
    first, second = torch.randn(2, 1, 1, 32, 32)
    second[..., :16, :] = first[..., :16, :]
    mask = torch.arange(65)[None] < 33  # the class token and the upper half
    outs = [model(x, attention_mask=mask).last_hidden_state[:, :33] for x in (first, second)]
    torch.testing.assert_close(*outs)
    assert not torch.allclose(*(model(x).last_hidden_state[:, :33] for x in (first, second)))


def test_softmax_is_never_run_in_the_place_of_mhla() -> None:
    model = convert_to_mhla(make_stock("ViTForImageClassification"), {"blocks": 4})
    with pytest.raises(ValueError, match=r"attn_implementation is mhla here.*'eager'"):
        model.set_attn_implementation("eager")
    model.vit.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=r"set to 'eager'.*brings it back"):
        model(torch.randn(1, 1, 32, 32))
    model.set_attn_implementation("mhla")
    with pytest.raises(ValueError, match="needs the grid of the patches"):
        model.vit(torch.randn(1, 1, 32, 32))


@pytest.mark.parametrize(
    ("config", "attention", "message"),
    [
        ({"layers": [2]}, "mhla", "names layer 2, but the layers are 0 to 1"),
        ({"blocks": 97}, "mhla", "97 blocks do not divide over the grid"),
        ({"key_blocks": 4}, "mhla", "extra_block is for self-attention"),
        ({"normalizer": "official"}, "mhla", "the class token is a block of its own here"),
        ({"local": "only"}, "mhla", "no block of extra tokens"),
        ({}, "softmax", "no MHLA form of ViTModel with attention 'softmax'"),
    ],
)
def test_what_cannot_be_is_refused(config: Any, attention: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        convert_to_mhla(make_stock("ViTModel"), config, attention=attention)
    with pytest.raises(ValueError, match="no MHLA form of BertModel"):
        convert_to_mhla(transformers.BertModel(transformers.BertConfig(num_hidden_layers=0)))


def test_commands_say_where_models_of_transformers_are_converted(tmp_path: Path) -> None:
    make_stock("ViTModel").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds a vit of transformers, .* convert_to_mhla\(model\)"):
        load_transformer(str(tmp_path))


def mhla_layers(model: Any) -> list[MHLA]:
    return [module for module in model.modules() if isinstance(module, MHLA)]


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2"])
def test_the_trainer_of_transformers_trains_it_and_goes_on_from_its_checkpoint(
    family: str, tmp_path: Path
) -> None:
    model = convert_to_mhla(make_stock(f"{family}ForImageClassification"), {"blocks": 4})
    data = [{"pixel_values": torch.randn(1, 32, 32), "labels": i % 3, "unused": 1} for i in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=0.5, save_only_model=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=data).train()
    mixing = mhla_layers(model)[0].mixing
    assert mixing.min() == 0, "clamped after every step"
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-4")
    assert type(again) is getattr(mhla_diffusion, f"MHLA{family}ForImageClassification")
    assert torch.equal(mhla_layers(again)[0].mixing, mixing)


@pytest.mark.parametrize("family", ["ViT", "DeiT", "Dinov2"])
def test_adapters_of_peft_train_with_the_layers_that_are_new(family: str, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")

    def make() -> Any:
        return convert_to_mhla(make_stock(f"{family}ForImageClassification"), {"blocks": 4, "gate": True})

    pixels, labels = torch.randn(2, 1, 32, 32), torch.tensor([0, 1])
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["mhla"], r=2)
    model = peft.get_peft_model(make(), lora)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    for _ in range(3):
        model(pixel_values=pixels, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.rpartition(".layer")[2].partition(".")[2].partition(".")[2] for name in trained} == {
        *(f"attention.{layer}.lora_{ab}.default.weight" for layer in ("q_proj", "v_proj") for ab in "AB"),
        *(f"attention.mhla.modules_to_save.default.{name}" for name in ("mixing", "gate.weight", "gate.bias"))
    }  # fmt: skip
    mixing = [value for name, value in model.named_parameters() if name.endswith("default.mixing")]
    assert min(value.min() for value in mixing) == 0, "clamped after every step"
    expected = model.eval()(pixel_values=pixels).logits
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
    assert torch.equal(loaded(pixel_values=pixels).logits, expected)
    merged = loaded.merge_and_unload()
    assert type(merged) is getattr(mhla_diffusion, f"MHLA{family}ForImageClassification")
    torch.testing.assert_close(merged(pixel_values=pixels).logits, expected)


@pytest.mark.parametrize(
    "first",
    ["import mhla_diffusion\nfrom transformers import AutoModel", "from transformers import AutoConfig"],
)
def test_auto_config_knows_our_models_whichever_was_imported_first(first: str) -> None:
    program = (
        f"{first}\nimport mhla_diffusion, sys\nfrom transformers import AutoConfig\n"
        "assert 'transformers.models.vit.modeling_vit' not in sys.modules\n"
        "print(type(AutoConfig.for_model('mhla_vit')).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout == "MHLAViTConfig\n", run.stderr


@pytest.mark.parametrize("stored", ["auto", None])
def test_another_config_on_loading_keeps_the_window_that_a_model_has(
    tmp_path: Path, stored: str | None
) -> None:
    model = convert_to_mhla(make_stock("ViTModel"), MHLAConfig(blocks=4, local=stored))
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, mhla_config=MHLAConfig(blocks=4))
    assert again.config.mhla_config.get("local") == stored
    assert again.state_dict().keys() == model.state_dict().keys()

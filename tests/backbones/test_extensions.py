"""What diffusers and peft do to a stock model: caches, skipped layers, fused projections, LoRA."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)
from diffusers.hooks import SeaCacheConfig, apply_layer_skip
from diffusers.models.attention import AttentionMixin
from diffusers.models.attention_processor import AttnProcessor2_0
from diffusers.models.cache_utils import CacheMixin
from torch import Tensor

from mhla_diffusion import convert_to_mhla
from mhla_diffusion.backbones.full_weights import own_weights

from .cases import CASES, EVERY_PART, Case, sample

CACHED = [name for name, case in CASES.items() if issubclass(case.model, CacheMixin)]
WITH_LORA = [name for name, case in CASES.items() if hasattr(case.model, "add_adapter")]
FUSED = [name for name, case in CASES.items() if issubclass(case.model, AttentionMixin)]

# By the name of self-attention in a block.
CACHES: dict[str, Callable[[str], Any]] = {
    "FirstBlockCache": lambda _: FirstBlockCacheConfig(threshold=100.0),
    "MagCache": lambda _: MagCacheConfig(
        num_inference_steps=4, retention_ratio=0.25, threshold=10.0, mag_ratios=[1.0] * 4
    ),
    "PyramidAttentionBroadcast": lambda name: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500,
        spatial_attention_block_identifiers=(rf"blocks.*\.{name}$",),
    ),
    "FasterCache": lambda name: FasterCacheConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500, tensor_format="BFCHW",
        attention_weight_callback=lambda _: 0.5,
        spatial_attention_block_identifiers=(rf"blocks.*\.{name}$",),
    ),
    "TaylorSeer": lambda name: TaylorSeerCacheConfig(
        cache_interval=2, disable_cache_before_step=1, taylor_factors_dtype=torch.float32,
        cache_identifiers=[rf".*blocks\.\d+\.{name}"],
    ),
    "SeaCache": lambda _: SeaCacheConfig(threshold=1e6),
}  # fmt: skip


@torch.no_grad()
def with_cache(case: Case, model: Any, cache: Any) -> list[Tensor] | str:
    """The outputs of four steps, with the cache and without; or why it cannot be."""
    batches = [case.inputs(model, case.grids[3]) for _ in range(4)]
    for i, batch in enumerate(batches):  # steps that differ, so that what is old shows
        batch["hidden_states"] = batch["hidden_states"] * (1 + i)
    try:
        model.enable_cache(cache)
        outputs = []
        for i, batch in enumerate(batches):
            with model.cache_context("cond", step_index=i, sigma=1 - i / 4, num_inference_steps=4):
                outputs.append(sample(model, batch))
        model.disable_cache()
    except Exception as error:  # whatever the installed diffusers raises
        return f"{type(error).__name__}: {error}"
    return outputs + [sample(model, batch) for batch in batches]


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CACHED)
def test_what_caches_take_of_the_stock_model_they_take_of_ours(name: str, cache: str) -> None:
    case = CASES[name]
    known = inspect.signature(case.model.stock).parameters
    settings = {"num_layers": 4}
    if "out_channels" in known:
        settings["out_channels"] = case.settings["in_channels"]
    of_stock = with_cache(case, case.stock(**settings), CACHES[cache](case.model.attention_name))
    model = case.make(**settings, attention=["mhla", case.stock_kind, "mhla", "mhla"], mhla=EVERY_PART)
    plain = [sample(model, case.inputs(model, case.grids[3]))]
    found = with_cache(case, model, CACHES[cache](case.model.attention_name))
    if isinstance(of_stock, str):
        assert isinstance(found, str), f"ours takes what stock refuses: {of_stock}"
        pytest.skip(f"the stock model takes no {cache}: {of_stock[:80]}")
    assert not isinstance(found, str), found
    assert all(output.isfinite().all() for output in found)
    assert torch.equal(found[0], plain[0]), "nothing is cached yet at the first step"
    from_cache = [
        [i for i in range(4) if not torch.equal(outputs[i], outputs[4 + i])] for outputs in (found, of_stock)
    ]
    assert from_cache[0] == from_cache[1]
    if not from_cache[0]:
        pytest.skip(f"{cache} does nothing for the stock model")


@pytest.mark.parametrize("mode", ["blocks", "attention", "feed-forward"])
@torch.no_grad()
def test_layers_are_skipped_as_in_the_stock_model(case: Case, mode: str) -> None:
    skip = {"skip_attention": mode != "feed-forward", "skip_ff": mode != "attention"}

    def skipped(model: Any) -> Tensor | str:
        inputs = case.inputs(model)
        before = sample(model, inputs)
        try:
            apply_layer_skip(model, LayerSkipConfig(indices=[0, 1], fqn=case.layers, **skip))
            after = sample(model, inputs)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        assert not torch.equal(before, after) or mode == "feed-forward"
        return after

    of_stock = skipped(case.stock())
    found = skipped(case.make(attention=["mhla", case.stock_kind]))
    if isinstance(of_stock, str):
        pytest.skip(f"the stock model's cannot be skipped: {of_stock[:80]}")
    assert isinstance(found, Tensor), found
    assert found.isfinite().all()


@torch.no_grad()
def test_scores_that_mhla_does_not_compute_are_not_skipped_without_a_word(case: Case) -> None:
    """As perturbed-attention guidance asks for it, whose third pass would be that of the condition."""
    model = case.make(attention=["mhla", case.stock_kind])
    inputs = case.inputs(model)
    perturbed = {"skip_attention": False, "skip_ff": False, "skip_attention_scores": True}
    # Layers of some models have no is_cross_attention, which diffusers asks for then.
    said = r"skip_attention_scores .* would change nothing: skip whole layers|'is_cross_attention'"
    with pytest.raises((ValueError, AttributeError), match=said):  # noqa: PT012 (in one of the two)
        apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn=case.layers, **perturbed))
        sample(model, inputs)


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_fused_projections_change_no_output(name: str) -> None:
    case = CASES[name]
    model = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    inputs = case.inputs(model, case.grids[3])
    expected = sample(model, inputs)
    if name == "Kandinsky5":  # nor those of the stock model: its layers have other names
        with pytest.raises(ValueError, match="Kandinsky5 cannot be fused"):
            model.fuse_qkv_projections()
        return
    model.fuse_qkv_projections()
    torch.testing.assert_close(sample(model, inputs), expected, rtol=1e-4, atol=1e-4)
    attn = model.self_attention[0]
    if getattr(attn, "fused_projections", False):
        calls: list[int] = []
        attn.to_qkv.register_forward_hook(lambda *_: calls.append(1))
        sample(model, inputs)
        assert calls, "the fused layer is what runs"
        with pytest.raises(ValueError, match="unfuse_qkv_projections"):
            convert_to_mhla(model, case.config())
    model.unfuse_qkv_projections()
    assert torch.equal(sample(model, inputs), expected)


@pytest.mark.parametrize("name", FUSED)
@torch.no_grad()
def test_one_processor_for_all_leaves_mhla_alone(name: str) -> None:
    case = CASES[name]
    model = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    inputs = case.inputs(model, case.grids[3])
    first, second = model.self_attention
    expected, ours = sample(model, inputs), first.processor
    other = type(second.processor)()
    model.set_attn_processor(other)
    assert first.processor is ours
    assert second.processor is other
    model.set_attn_processor(model.attn_processors)
    assert set(model.state_dict()) == set(
        case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART).state_dict()
    )
    if case.stock_kind == "softmax" and name != "WanAnimate":  # whose layers for the face have another
        assert torch.equal(sample(model, inputs), expected)


SAVERS: dict[str, Callable[[Any], None]] = {
    "xformers": lambda model: model.disable_xformers_memory_efficient_attention(),
    "npu": lambda model: model.disable_npu_flash_attention(),
    "xla": lambda model: model.disable_xla_flash_attention(),
    "backend": lambda model: model.set_attention_backend("native"),
    "default": lambda model: getattr(model, "set_default_attn_processor", lambda: None)(),
}


@pytest.mark.parametrize("saver", SAVERS)
@torch.no_grad()
def test_memory_savers_leave_mhla_alone(case: Case, saver: str) -> None:
    model = case.make(mhla=EVERY_PART)
    layer, inputs = case.attention(getattr(model, case.layers)[0]), case.inputs(model)
    processor, expected = layer.processor, sample(model, inputs)
    SAVERS[saver](model)
    layer.set_attention_slice(None)
    assert layer.processor is processor
    if case.name in ("HunyuanDiT", "LuminaNextDiT") and saver == "xformers":
        return  # whose cross-attention gets a processor that does not fit it, as in the stock model
    # npu and xla: diffusers switches cross-attention on where it is told off; Sana's own is exchanged.
    if saver not in ("npu", "xla") and case.stock_kind == "softmax":
        torch.testing.assert_close(sample(model, inputs), expected)


def test_a_model_that_lost_mhla_is_not_saved(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = case.make(attention=["mhla", case.stock_kind])
    layer = case.attention(getattr(model, case.layers)[0])
    with pytest.raises(ValueError, match="AttnProcessor2_0 cannot take the place of MHLA"):
        layer.processor = AttnProcessor2_0()  # as the pipelines with perturbed-attention guidance do
    model.save_pretrained(tmp_path / "whole")
    layer.set_processor(AttnProcessor2_0())
    assert "AttnProcessor2_0 takes the place of MHLA" in caplog.text
    with pytest.raises(
        ValueError,
        match=rf"0\.{case.model.attention_name} has a AttnProcessor2_0 in place of MHLA.*load the model",
    ):
        model.save_pretrained(tmp_path / "lost")
    assert not (tmp_path / "lost").exists()


def test_layers_with_mhla_are_copied_and_pickled(case: Case, tmp_path: Path) -> None:
    model = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    inputs = case.inputs(model)
    torch.save(model, tmp_path / "model.pt")
    for other in (copy.deepcopy(model), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert torch.equal(sample(other, inputs), sample(model, inputs))
        layer = case.attention(getattr(other, case.layers)[0])
        layer.set_use_memory_efficient_attention_xformers(False)
        assert layer.processor.mixing is not case.attention(getattr(model, case.layers)[0]).processor.mixing


PARTS: dict[str, dict[str, list[str]]] = {
    "modules_to_save": {"modules_to_save": ["processor"]},
    "target_parameters": {"target_parameters": ["processor.mixing"]},
}


def train_adapters(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Train what is not frozen, and return the output then."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.5)
    for _ in range(2):
        sample(model, inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sample(model, inputs).detach()


@pytest.mark.parametrize("parts", PARTS)
def test_peft_trains_and_saves_the_mixing_beside_an_adapter(case: Case, parts: str, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    inputs = case.inputs(base, case.grids[3])
    plain, mixing = (
        sample(base, inputs).detach(),
        case.attention(getattr(base, case.layers)[0]).processor.mixing,
    )
    config = LoraConfig(
        r=2, target_modules=[f"{case.model.attention_name}.{case.projections[0]}"], **PARTS[parts]
    )
    adapted = get_peft_model(copy.deepcopy(base), config)
    assert torch.equal(sample(adapted, inputs), plain), "the grid and the rotary tables reach what is wrapped"
    trained = train_adapters(adapted, inputs)
    assert not torch.equal(trained, plain)
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    torch.testing.assert_close(sample(loaded, inputs), trained)
    with pytest.raises(ValueError, match="merge or unload its adapters"):
        loaded.base_model.model.save_pretrained(tmp_path / "model")
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(sample(merged, inputs), trained, rtol=1e-4, atol=1e-4)
    assert set(merged.state_dict()) == set(base.state_dict())
    found = case.attention(getattr(merged, case.layers)[0]).processor.mixing
    assert not torch.equal(found, mixing), "the mixing is trained"
    merged.save_pretrained(tmp_path / "model")
    torch.testing.assert_close(
        sample(case.model.from_pretrained(tmp_path / "model"), inputs), sample(merged, inputs)
    )


@pytest.mark.parametrize("name", WITH_LORA)
def test_an_adapter_with_the_mixing_is_loaded_by_diffusers(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    case = CASES[name]
    base = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    inputs = case.inputs(base, case.grids[3])
    adapted, loaded = copy.deepcopy(base), copy.deepcopy(base)
    config = LoraConfig(
        r=2, target_modules=[f"{case.model.attention_name}.{case.projections[0]}"], **PARTS["modules_to_save"]
    )
    adapted.add_adapter(config, adapter_name="style")
    trained = train_adapters(adapted, inputs)
    adapted.save_lora_adapter(tmp_path, adapter_name="style")
    loaded.load_lora_adapter(
        tmp_path, adapter_name="style", prefix=None, weight_name="pytorch_lora_weights.safetensors"
    )
    torch.testing.assert_close(sample(loaded, inputs), trained)
    fused, plain = copy.deepcopy(loaded), sample(base, inputs)
    loaded.set_adapters("style", 0.0)
    assert torch.equal(sample(loaded, inputs), plain)
    loaded.set_adapters("style")
    torch.testing.assert_close(sample(loaded, inputs), trained)
    loaded.disable_lora()
    assert torch.equal(sample(loaded, inputs), plain)
    loaded.enable_lora()
    loaded.add_adapter(LoraConfig(r=2, target_modules=config.target_modules), adapter_name="other")
    loaded.set_adapters("other")
    torch.testing.assert_close(sample(loaded, inputs), plain)
    loaded.set_adapters("style")
    torch.testing.assert_close(sample(loaded, inputs), trained)
    loaded.disable_adapters()
    assert torch.equal(sample(loaded, inputs), plain)
    loaded.enable_adapters()
    torch.testing.assert_close(sample(loaded, inputs), trained)
    loaded.disable_lora()
    loaded.enable_lora()
    torch.testing.assert_close(sample(loaded, inputs), trained)
    part = copy.deepcopy(loaded)
    with pytest.raises(ValueError, match="that of style is in use"):
        part.fuse_lora(adapter_names=["other"])
    torch.testing.assert_close(sample(part, inputs), trained)
    part.set_adapters("other")
    part.fuse_lora(adapter_names=["other"])
    torch.testing.assert_close(sample(part, inputs), plain)
    part.unfuse_lora()
    part.set_adapters("style")
    torch.testing.assert_close(sample(part, inputs), trained)
    part.set_adapters("other")
    part.fuse_lora()
    part.unload_lora()
    torch.testing.assert_close(sample(part, inputs), plain)
    part = copy.deepcopy(loaded)
    part.delete_adapters("style")
    torch.testing.assert_close(sample(part, inputs), plain)
    part.set_adapters("other")
    torch.testing.assert_close(sample(part, inputs), plain)
    part.delete_adapters("other")
    assert {key.replace(".base_layer", "") for key in part.state_dict()} == set(base.state_dict())
    two = copy.deepcopy(adapted)
    two.add_adapter(config, adapter_name="second")
    trained_beside = {
        name for name, p in two.named_parameters() if p.requires_grad and "modules_to_save" in name
    }
    assert trained_beside
    assert all(".modules_to_save.second." in name for name in trained_beside)
    second = train_adapters(two, inputs)
    both = copy.deepcopy(two)
    two.delete_adapters("second")
    two.set_adapters("style")
    torch.testing.assert_close(sample(two, inputs), trained)
    both.set_adapters(["style", "second"], [0.0, 1.0])
    torch.testing.assert_close(sample(both, inputs), second)
    last = copy.deepcopy(both)
    both.fuse_lora()
    both.unload_lora()
    torch.testing.assert_close(sample(both, inputs), second, rtol=1e-4, atol=1e-4)
    last.set_adapters(["style", "second"])
    processor = case.attention(getattr(last, case.layers)[0]).processor
    assert processor.active_adapters == ["second"]
    decides = processor.modules_to_save["second"].mixing.detach().clone()
    last.fuse_lora()
    last.unload_lora()
    assert torch.equal(case.attention(getattr(last, case.layers)[0]).processor.mixing, decides)
    loaded.unload_lora()
    assert torch.equal(sample(loaded, inputs), plain)
    fused.fuse_lora()
    fused.unload_lora()
    fused.save_pretrained(tmp_path / "fused")
    again = case.model.from_pretrained(tmp_path / "fused")
    torch.testing.assert_close(sample(again, inputs), trained, rtol=1e-4, atol=1e-4)


def test_weights_that_a_run_trained_in_full_are_found_under_other_adapters() -> None:
    from peft import LoraConfig

    case = CASES["DiT"]
    model = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    weights = dict(model.named_parameters())
    targets = [f"{case.model.attention_name}.{case.projections[0]}"]
    model.add_adapter(LoraConfig(r=2, target_modules=targets, **PARTS["modules_to_save"]))
    assert weights.keys() != {name for name, _ in model.named_parameters()}
    found = own_weights(model)
    assert all(found[name] is weight for name, weight in weights.items())


@pytest.mark.parametrize("name", WITH_LORA)
def test_adapters_are_trained_saved_and_loaded(name: str, tmp_path: Path) -> None:
    from peft import LoraConfig

    case = CASES[name]
    model = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    inputs = case.inputs(model, case.grids[3])
    plain = sample(model, inputs).detach()
    targets = [f"{case.model.attention_name}.{part}" for part in (*case.projections, "processor.gate")]
    model.add_adapter(LoraConfig(r=2, target_modules=targets), adapter_name="style")
    assert torch.equal(sample(model, inputs), plain), "an adapter starts as nothing"
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name for name in trained)
    optimizer = torch.optim.SGD(trained.values(), lr=0.5)
    for _ in range(2):
        sample(model, inputs).square().mean().backward()
        optimizer.step()
    adapted = sample(model, inputs).detach()
    assert not torch.equal(adapted, plain)
    model.save_lora_adapter(tmp_path, adapter_name="style")
    model.disable_adapters()
    assert torch.equal(sample(model, inputs), plain)
    with pytest.raises(ValueError, match="merge or unload its adapters"):
        convert_to_mhla(model, case.config())
    other = case.make(attention=["mhla", case.stock_kind], mhla=EVERY_PART)
    model.delete_adapters("style")
    other.load_state_dict(
        {key.replace(".base_layer", ""): value for key, value in model.state_dict().items()}
    )
    other.load_lora_adapter(
        tmp_path, adapter_name="style", prefix=None, weight_name="pytorch_lora_weights.safetensors"
    )
    torch.testing.assert_close(sample(other, inputs), adapted, rtol=1e-4, atol=1e-4)

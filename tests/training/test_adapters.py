"""Which weights are trained, and adapters that become part of them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import peft
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from mhla_diffusion import MHLADiTPipeline, MHLATextToImagePipeline, MHLAWanTransformer3DModel
from mhla_diffusion.training import LoraConfig
from mhla_diffusion.training.adapters import merge_adapters, save_adapters, set_trainable
from mhla_diffusion.training.stock import IMAGES, VIDEOS
from mhla_diffusion.training.text import make_stock_pipeline
from tests.backbones.cases import CASES, Case, sample
from tests.backbones.test_offloading import CPU, OFFLOADS, sequential
from tests.text_encoders import make_text_parts


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


def pipeline_of(case: Case, transformer: Any) -> Any:
    """The pipeline that a run of a backbone leaves; None where there is none, or it loads no adapters."""
    scheduler = FlowMatchEulerDiscreteScheduler()
    if case.name == "DiT":
        return MHLADiTPipeline(transformer, scheduler)
    if case.name in ("PixArt", "Sana"):
        return MHLATextToImagePipeline(
            **make_text_parts("t5"), transformer=transformer, scheduler=scheduler, prediction_type="epsilon"
        )
    stock = {**IMAGES, **VIDEOS}.get(case.model)
    if stock is None and case.name != "Wan":
        return None
    pipeline = make_stock_pipeline(
        "WanPipeline" if stock is None else stock.pipeline, transformer=transformer
    )
    return pipeline if hasattr(pipeline, "load_lora_weights") else None


def train_adapters(base: Any, case: Case, folder: Path) -> tuple[Any, dict[str, Any], Tensor]:
    """Train adapters and self-attention, save them, and return the model, its inputs and its output."""
    lora, trained = LoraConfig(rank=2, alpha=4), copy.deepcopy(base)
    set_trainable(trained, "all", lora)
    inputs = case.inputs(trained, case.grids[3])
    optimizer = torch.optim.Adam((p for p in trained.parameters() if p.requires_grad), lr=0.1)
    sample(trained, inputs).square().mean().backward()
    optimizer.step()
    save_adapters(trained, lora, folder)
    return trained, inputs, sample(trained, inputs).detach()


@pytest.mark.parametrize("name", CASES)
def test_adapters_and_attention_of_any_backbone_are_read_back_beside_the_model_they_were_trained_from(
    name: str, tmp_path: Path
) -> None:
    case = CASES[name]
    base = case.make(mhla={"gate": True})
    trained, inputs, expected = train_adapters(base, case, tmp_path)
    adapters = [name for name, _ in trained.named_parameters() if ".lora_" in name]
    assert adapters
    assert not any(case.model.attention_name in name.split(".") for name in adapters)
    assert not any(set(case.model.uncalled) & set(name.split(".")) for name in adapters)

    ways: list[Callable[[Any], None]] = [lambda model: model.load_lora_adapter(tmp_path)]
    if pipeline_of(case, base) is not None:
        ways.append(lambda model: pipeline_of(case, model).load_lora_weights(tmp_path))
    for load in ways:
        model = copy.deepcopy(base)
        load(model)
        torch.testing.assert_close(sample(model, inputs), expected)
    plain = sample(base, inputs)
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)
    merge_adapters(trained)
    torch.testing.assert_close(sample(trained, inputs), expected, rtol=1e-3, atol=1e-3)


class Runs(NamedTuple):
    """A model, its inputs, and two runs that began with it: their files, and their outputs with them."""

    base: Any
    inputs: dict[str, Any]
    files: dict[str, dict[str, Tensor]]
    outputs: dict[str, Tensor]

    def model(self, *names: str) -> Any:
        model = copy.deepcopy(self.base)
        for name in names:
            model.load_lora_adapter(self.files[name], adapter_name=name)
        return model

    def is_at(self, model: Any, name: str) -> bool:
        """Tell if a model does what the one of this name alone does, and not what any other does."""
        output = sample(model, self.inputs)
        same = {key for key, other in self.outputs.items() if torch.allclose(output, other, atol=1e-4)}
        assert len(same) <= 1
        return same == {name}


@pytest.fixture
@torch.no_grad()
def runs(tmp_path: Path) -> Runs:
    case = CASES["Wan"]
    base = case.make(mhla={"gate": True})
    with torch.enable_grad():
        _, inputs, _ = train_adapters(base, case, tmp_path)
    first = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    second = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in first.items()}
    found = Runs(base, inputs, {"a": first, "b": second}, {"plain": sample(base, inputs)})
    for name in found.files:
        found.outputs[name] = sample(found.model(name), inputs)
    return found


@torch.no_grad()
def test_what_was_trained_in_full_is_switched_with_its_adapters(runs: Runs) -> None:
    model = runs.model("a", "b")
    for name in ("b", "a", "b", "a"):
        model.set_adapters(name)
        assert runs.is_at(model, name)
    model.set_adapters("a", 0.0)
    assert runs.is_at(model, "plain"), "of no strength"
    model.set_adapters("a", 1.0)
    model.disable_lora()
    assert runs.is_at(model, "plain")
    model.enable_lora()
    assert runs.is_at(model, "a")
    model.delete_adapters("a")
    model.set_adapters("b")
    assert runs.is_at(model, "b")
    model.load_lora_adapter(runs.files["a"], adapter_name="b", hotswap=True)
    assert runs.is_at(model, "a"), "hot-swapped"
    model.delete_adapters("b")
    assert runs.is_at(model, "plain")
    model.load_lora_adapter(runs.files["b"], adapter_name="b")
    assert runs.is_at(model, "b"), "after all were deleted"


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_unloaded_adapters_leave_what_was_there_before_or_what_they_became(
    runs: Runs, *, fused: bool
) -> None:
    model = runs.model("a", "b")
    model.set_adapters("a")
    if fused:
        model.fuse_lora()
    model.unload_lora()
    assert runs.is_at(model, "a" if fused else "plain")
    assert set(model.state_dict()) == set(runs.base.state_dict())
    if not fused:
        assert all(
            torch.equal(weight, runs.base.state_dict()[key]) for key, weight in model.state_dict().items()
        )
    model.load_lora_adapter(runs.files["b"], adapter_name="b")
    model.disable_lora()
    assert runs.is_at(model, "a" if fused else "plain"), "what was unloaded has no part in what was before"


@torch.no_grad()
def test_self_attention_is_switched_below_an_adapter_that_is_fused_into_it(runs: Runs) -> None:
    model = runs.model()
    targets = [f"attn1.{part}" for part in CASES["Wan"].projections]
    model.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
    alone = sample(model, runs.inputs)
    model.load_lora_adapter(runs.files["a"], adapter_name="a")
    assert runs.is_at(model, "a")
    model.set_adapters(["a", "style"])
    both = sample(model, runs.inputs)
    assert not torch.allclose(both, alone, rtol=1e-2, atol=1e-2)
    assert not runs.is_at(model, "a")
    model.fuse_lora()
    torch.testing.assert_close(sample(model, runs.inputs), both, rtol=1e-4, atol=1e-4)
    model.disable_lora()
    assert runs.is_at(model, "plain")
    model.enable_lora()
    torch.testing.assert_close(sample(model, runs.inputs), both, rtol=1e-4, atol=1e-4)
    model.fuse_lora()
    model.load_lora_adapter(runs.files["b"], adapter_name="b")  # which takes fused ones out
    assert runs.is_at(model, "b")
    model.set_adapters("style")
    torch.testing.assert_close(sample(model, runs.inputs), alone, rtol=1e-4, atol=1e-4)


def test_a_part_of_what_a_run_has_trained_is_refused(runs: Runs) -> None:
    missing = next(name for name in runs.files["a"] if name.endswith("attn1.processor.mixing"))
    some = {name: weight for name, weight in runs.files["a"].items() if name != missing}
    model = runs.model()
    with pytest.raises(ValueError, match=r"there is no blocks\.0\.attn1\.processor\.mixing; load the whole"):
        model.load_lora_adapter(some)
    full = {name: weight for name, weight in runs.files["a"].items() if ".lora_full." in name}
    with pytest.raises(ValueError, match="there is no adapters; load the whole file"):
        model.load_lora_adapter(full)
    assert runs.is_at(model, "plain")


@pytest.mark.parametrize("offload", [name for name in OFFLOADS if "disk" in name or name == "sequential"])
@torch.no_grad()
def test_what_would_be_lost_by_switching_is_refused_before_it_is_half_done(
    runs: Runs, offload: str, tmp_path: Path
) -> None:
    model = runs.model("a", "b")
    model.set_adapters("a")
    OFFLOADS[offload](model, tmp_path / "weights")
    calls: list[Callable[[], Any]] = [
        lambda: model.set_adapters("b"), lambda: model.set_adapters("a", 0.0), model.disable_lora,
        lambda: model.delete_adapters("a"), model.unload_lora,
    ]  # fmt: skip
    for call in calls:
        with pytest.raises(ValueError, match=r"are offloaded.*before"):
            call()
        assert model.active_adapters() == ["a"]
        assert runs.is_at(model, "a")


@torch.no_grad()
def test_what_pipelines_would_take_apart_is_refused(runs: Runs) -> None:
    """They unfuse layer by layer, and tell the model nothing of it."""
    model = runs.model("a", "b")
    pipeline = pipeline_of(CASES["Wan"], model)
    pipeline.set_adapters("a")
    with pytest.raises(ValueError, match=r"in full .* that of a is in use: set_adapters\(\['b'\]\) first"):
        pipeline.fuse_lora(components=["transformer"], adapter_names=["b"])
    pipeline.fuse_lora(components=["transformer"], adapter_names=["a"])
    for call in (model.set_adapters, model.set_adapter, model.delete_adapters):
        with pytest.raises(ValueError, match="which are fused is in use: unfuse_lora first"):
            call("a")
    assert runs.is_at(model, "a")
    pipeline.unfuse_lora(components=["transformer"])
    assert runs.is_at(model, "a")
    pipeline.set_adapters("b")
    assert runs.is_at(model, "b")


@torch.no_grad()
def test_a_run_of_no_strength_is_away_though_other_adapters_act(runs: Runs) -> None:
    targets = [f"attn1.{part}" for part in CASES["Wan"].projections]
    alone = runs.model()
    torch.manual_seed(0)
    alone.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), "style")
    model = copy.deepcopy(alone)
    model.load_lora_adapter(runs.files["a"], adapter_name="a")
    model.set_adapters(["a", "style"], [0.0, 1.0])
    assert torch.allclose(sample(model, runs.inputs), sample(alone, runs.inputs), atol=1e-5)
    model.set_adapters(["a", "style"], [0.0, 0.0])
    assert runs.is_at(model, "plain")


@torch.no_grad()
def test_a_hot_swapped_adapter_without_full_weights_has_those_of_the_model(runs: Runs) -> None:
    plain = {name: weight for name, weight in runs.files["b"].items() if ".lora_full." not in name}
    expected = runs.model()
    expected.load_lora_adapter(plain, adapter_name="a")
    model = runs.model("a")
    model.load_lora_adapter(
        {"text_encoder.x.lora_A.weight": torch.ones(1, 1)}, adapter_name="a", hotswap=True
    )
    assert runs.is_at(model, "a"), "nothing of this model"
    model.load_lora_adapter(plain, adapter_name="a", hotswap=True)
    assert torch.allclose(sample(model, runs.inputs), sample(expected, runs.inputs), atol=1e-5)


@torch.no_grad()
def test_self_attention_that_was_trained_on_is_kept_when_it_is_switched(runs: Runs) -> None:
    model = runs.model("a")
    weights = {name: weight for name, weight in model.named_parameters() if ".attn1." in name}
    for disabled in (False, True):
        if disabled:
            model.disable_lora()
        for weight in weights.values():
            weight.add_(0.5)
        changed = {name: weight.clone() for name, weight in weights.items()}
        for switch in (model.enable_lora, model.disable_lora)[:: 1 if disabled else -1]:
            switch()
        assert all(torch.equal(weights[name], weight) for name, weight in changed.items())


def test_an_adapter_is_not_saved_without_what_was_trained_beside_it(runs: Runs, tmp_path: Path) -> None:
    model = runs.model("a")
    with pytest.raises(
        ValueError, match="self-attention was trained in full beside a, and the file would lack"
    ):
        model.save_lora_adapter(tmp_path / "saved", "a")
    assert not (tmp_path / "saved").exists()


def whole(model: Any, folder: Path) -> None:
    accelerate.cpu_offload_with_hook(model, execution_device=CPU)


@pytest.mark.parametrize("way", ["pipeline", "model"])
@pytest.mark.parametrize("offload", [*OFFLOADS, "whole"])
@torch.no_grad()
def test_adapters_are_loaded_into_an_offloaded_model_or_refused(
    offload: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = CASES["Wan"]
    model = case.make(mhla={"gate": True})
    with torch.enable_grad():
        _, inputs, expected = train_adapters(model, case, tmp_path / "lora")
    pipeline, plain = pipeline_of(case, model), sample(model, inputs)
    OFFLOADS.get(offload, whole)(model, tmp_path / "weights")
    hook = type(getattr(model, "_hf_hook", None))
    # Which diffusers does on an accelerator alone.
    monkeypatch.setattr(pipeline, "enable_sequential_cpu_offload", lambda: sequential(model, tmp_path))
    monkeypatch.setattr(pipeline, "enable_model_cpu_offload", lambda: whole(model, tmp_path))
    load = pipeline.load_lora_weights if way == "pipeline" else model.load_lora_adapter
    by_accelerate = offload in ("sequential", "disk")
    refused = way == "model" if by_accelerate else "disk" in offload
    if refused:
        with pytest.raises(ValueError, match=r"are offloaded.*: load (adapters|and switch them) before"):
            load(tmp_path / "lora")
        assert not getattr(model, "peft_config", {})
        assert torch.equal(sample(model, inputs), plain)
        return
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    name = next(name for name in weights if name.endswith("processor.mixing"))
    with pytest.raises(ValueError, match=r"mixing \(1, 1\), and this model has \("):
        load({**weights, name: torch.ones(1, 1)})
    assert torch.equal(sample(model, inputs), plain)
    assert not getattr(model, "peft_config", {})
    load(tmp_path / "lora")
    assert type(getattr(model, "_hf_hook", None)) is hook, "it is offloaded as before"
    assert any(weight.is_meta for weight in model.parameters()) == by_accelerate
    torch.testing.assert_close(sample(model, inputs), expected)


class Attack:
    """What leaves a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def test_adapters_are_read_from_a_dict_without_prefix_and_from_no_pickle(tmp_path: Path) -> None:
    case = CASES["Wan"]
    model = case.make(mhla={"gate": True})
    trained, _, _ = train_adapters(model, case, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    weights = {key.removeprefix("transformer."): value for key, value in load_file(file).items()}
    file.unlink()
    pickled = tmp_path / "pytorch_lora_weights.bin"
    for content in (
        {f"transformer.{key}": value for key, value in weights.items()},
        Attack(tmp_path / "run"),
    ):
        torch.save(content, pickled)
        with pytest.raises(OSError, match=r"no file named pytorch_lora_weights\.safetensors"):
            model.load_lora_adapter(tmp_path)
    assert not (tmp_path / "run").exists()
    model.load_lora_adapter(weights, prefix=None)
    own, expected = ({n: p for n, p in m.named_parameters() if ".attn1." in n} for m in (model, trained))
    assert own
    assert all(torch.equal(own[name], weight) for name, weight in expected.items())


def test_a_dict_of_tensors_is_read_from_a_file_of_torch_where_that_is_asked_for(tmp_path: Path) -> None:
    case = CASES["Wan"]
    base = case.make(mhla={"gate": True})
    _, inputs, _ = train_adapters(base, case, tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    weights = load_file(file)
    torch.save(weights, file.with_suffix(".bin"))
    file.unlink()
    given, read = copy.deepcopy(base), copy.deepcopy(base)
    given.load_lora_adapter(weights)
    read.load_lora_adapter(tmp_path, use_safetensors=False)
    assert torch.equal(sample(read, inputs), sample(given, inputs))
    assert not torch.allclose(sample(read, inputs), sample(base, inputs), rtol=1e-2, atol=1e-2)

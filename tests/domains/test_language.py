"""The causal language model: one function in parallel, in pieces and token by token, in constant memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    Trainer,
    TrainingArguments,
)

from mhla_diffusion import MHLAConfig, MHLALlamaConfig, MHLALlamaForCausalLM, convert_to_mhla
from mhla_diffusion.causal import CausalMHLA
from mhla_diffusion.domains.language import MHLACacheLayer
from mhla_diffusion.ops import causal_mixing, mhla_causal_reference

CONFIGS: list[dict[str, Any]] = [
    {"blocks": 3},
    {"blocks": 1},
    {"blocks": 4, "mixing_per_head": True, "constraint": "softmax", "qk_norm": True, "gate": True,
     "output_norm": True, "feature_map": "hedgehog"},
    {"blocks": 3, "layers": [1], "feature_map": "elu"},
    {"blocks": 3, "layers": [0]},
]  # fmt: skip


def make(config: Any = None, kind: type[Any] = LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None,
        "block_size": 4,
    }  # fmt: skip
    stock = kind(LlamaConfig(**{**sizes, **changes})).eval()
    if config is None:
        return stock
    model = convert_to_mhla(stock, config)
    for module in model.modules():
        if isinstance(module, CausalMHLA) and module.mixing is not None:
            nn.init.uniform_(module.mixing)
    return model


def in_pieces(model: Any, tokens: Tensor, pieces: list[int]) -> tuple[Tensor, DynamicCache]:
    cache, outputs = DynamicCache(config=model.config), []
    with torch.no_grad():
        for piece in tokens.split(pieces, 1):
            outputs.append(model(piece, cache=cache, use_cache=True).logits)
    return torch.cat(outputs, 1), cache


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_logits_in_parallel_in_pieces_and_by_single_tokens_are_equal(config: dict[str, Any]) -> None:
    model, tokens = make(config).double(), torch.randint(50, (2, 23))
    logits = model(tokens, use_cache=False).logits
    for pieces in ([23], [1] * 23, [9, 1, 5, 8]):
        found, cache = in_pieces(model, tokens, pieces)
        torch.testing.assert_close(found, logits)
        assert cache.get_seq_length() == 23
    changed = torch.cat((tokens[:, :10], 49 - tokens[:, 10:]), 1)
    torch.testing.assert_close(model(changed).logits[:, :10], logits[:, :10])


def test_a_layer_is_the_dense_reference_with_llamas_rotary_positions() -> None:
    model = make({"blocks": 3}).double()
    seen: dict[str, Any] = {}
    layer = model.model.layers[0].self_attn
    layer.register_forward_hook(
        lambda _, args, kwargs, out: seen.update(kwargs, out=out[0]), with_kwargs=True
    )
    model(torch.randint(50, (2, 23)), use_cache=False)
    x, (cos, sin) = seen["hidden_states"], seen["position_embeddings"]
    q, k, v = (
        part(x).unflatten(-1, (-1, 8)).transpose(1, 2) for part in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    k, v = (part.repeat_interleave(2, 1) for part in (k, v))
    order = torch.arange(8).view(2, 4).T.flatten()  # i beside i + d / 2
    mixing = causal_mixing(layer.mhla.mixing, 6)
    expected = mhla_causal_reference(
        q[..., order],
        k[..., order],
        v,
        mixing,
        4,
        rotary_emb=(cos[0, :, :4].double(), sin[0, :, :4].double()),
    )
    torch.testing.assert_close(seen["out"], layer.o_proj(expected.transpose(1, 2).flatten(2)))


def test_the_cache_has_the_same_size_at_1k_and_at_16k_tokens() -> None:
    model = make({"blocks": 3}, num_hidden_layers=1, block_size=256)
    cache, sizes = DynamicCache(config=model.config), []
    with torch.no_grad():
        for _ in range(16):
            model(torch.randint(50, (1, 1024)), cache=cache, logits_to_keep=1)
            sizes.append(cache.layers[0].state.nbytes)
    assert cache.get_seq_length() == 16 * 1024
    assert sizes == [2 * 4 * 9 * 8 * 4] * 16, "two summaries of four heads, [d + 1, d] in float32"


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_gives_for_a_batch_what_it_gives_for_each(beams: int) -> None:
    model, tokens = make({"blocks": 3, "layers": [0]}), torch.randint(50, (3, 7))
    settings = {"max_new_tokens": 12, "do_sample": False, "num_beams": beams}
    together = model.generate(tokens, **settings)
    assert together.shape == (3, 19)
    for row, alone in zip(together, tokens, strict=True):
        assert torch.equal(model.generate(alone[None], **settings)[0], row)
    assert torch.equal(model.generate(tokens, use_cache=False, **settings), together)


@pytest.mark.parametrize("kind", [LlamaForCausalLM, LlamaModel])
def test_models_are_converted_saved_and_loaded_by_the_auto_classes(kind: type[Any], tmp_path: Path) -> None:
    stock, tokens = make(kind=kind, tie_word_embeddings=True), torch.randint(50, (2, 9))
    before = {key: value.clone() for key, value in stock.state_dict().items()}
    model, info = convert_to_mhla(stock, MHLAConfig(blocks=3), output_loading_info=True)
    assert [key.rpartition(".self_attn.")[2] for key in info["new"]] == ["mhla.mixing"] * 2
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())
    model.save_pretrained(tmp_path)
    auto = AutoModelForCausalLM if kind is LlamaForCausalLM else AutoModel
    loaded = auto.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert loaded.config.block_size == 4
    assert all(map(torch.equal, loaded(tokens).to_tuple()[:1], model(tokens).to_tuple()[:1]))
    new = MHLALlamaConfig(**{**model.config.to_dict(), "architectures": None})
    assert type(auto.from_config(new)) is type(model)
    layers = convert_to_mhla(stock, {"layers": []})
    torch.testing.assert_close(layers(tokens)[0], stock(tokens)[0])


def test_padding_and_packing_that_move_blocks_are_refused() -> None:
    model, tokens = make({"blocks": 3}), torch.randint(50, (2, 6))
    mask = torch.ones(2, 6, dtype=torch.int64)
    mask[1, 4:] = 0
    right = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(right[1, :4], model(tokens[1:, :4]).logits[0])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="padding before or between tokens"):
            call(tokens, attention_mask=mask.flip(1))
    cache = DynamicCache()
    for places, named in (((mask, None, cache), {}), ((mask,), {"past_key_values": cache})):
        with pytest.raises(ValueError, match="padding before or between tokens"):
            model.model(tokens, *places, **named)
    with pytest.raises(ValueError, match="prompts of one length"):
        model.generate(tokens, attention_mask=mask)
    with pytest.raises(ValueError, match="position_ids must count up by 1"):
        model(tokens, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(ValueError, match=r"attention_mask must be \[B, N\]"):
        model(tokens, attention_mask=torch.ones(2, 1, 6, 6))


@pytest.mark.parametrize(
    "inputs",
    [{}, {"attention_mask": torch.ones(2, 9)}, {"position_ids": torch.arange(9)[None], "use_cache": False}],
    ids=lambda inputs: ", ".join(inputs) or "tokens alone",
)
def test_whole_calls_are_one_graph(inputs: dict[str, Any]) -> None:
    model, tokens, further = make(CONFIGS[0]), torch.randint(50, (2, 9)), torch.randint(50, (2, 1))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        wanted, found = model(tokens, **inputs), compiled(tokens, **inputs)
        torch.testing.assert_close(found.logits, wanted.logits)
        if "use_cache" not in inputs:
            wanted, found = (
                f(further, past_key_values=past.past_key_values)
                for f, past in ((model, wanted), (compiled, found))
            )
            torch.testing.assert_close(found.logits, wanted.logits)


def test_graphs_of_any_length_refuse_padding_when_they_run() -> None:
    model, tokens = make(CONFIGS[0]), torch.randint(50, (2, 10))
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
    lengths = {1: torch.export.Dim.AUTO}
    shapes = {"input_ids": lengths, "attention_mask": lengths, "use_cache": None}
    exported = torch.export.export(model, (), given, dynamic_shapes=shapes).module()
    for length in (6, 15):
        cut = {
            **given,
            "input_ids": torch.randint(50, (2, length)),
            "attention_mask": torch.ones(2, length).long(),
        }
        torch.testing.assert_close(exported(**cut).logits, model(**cut).logits)
    with pytest.raises(RuntimeError, match="padding before"):
        exported(**{**given, "attention_mask": (torch.arange(10) > 1).long().expand(2, -1)})


def test_gradients_flow_with_the_cache_that_training_makes_unasked() -> None:
    model, tokens = make({"blocks": 3}), torch.randint(50, (2, 9))
    gradients = []
    for use_cache in (False, True):
        model.zero_grad()
        out = model(tokens, labels=tokens, use_cache=use_cache)
        out.loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*gradients)
    with pytest.raises(ValueError, match="no gradient flows through a cache"):
        model.train()(tokens, cache=out.cache)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        ({"cpe": "zero"}, {}, "causal MHLA has no cpe"),
        ({"local": "gate"}, {}, "causal MHLA has no local"),
        ({"local_margin": 2, "local": "auto"}, {}, "causal MHLA has no local_margin"),
        ({"normalizer": "official"}, {}, "causal MHLA has no normalizer official"),
        ({}, {"block_size": 0}, "block_size must be at least 1 token, got 0"),
        (
            {},
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope_type default",
        ),
    ],
)
def test_what_the_causal_form_does_not_have_is_refused(config: Any, changes: Any, message: str) -> None:
    stock = make(**changes)
    with pytest.raises(ValueError, match=message):
        convert_to_mhla(stock, config)


def test_other_caches_are_refused() -> None:
    model, tokens = make({"blocks": 3}), torch.randint(50, (1, 6))
    with pytest.raises(
        ValueError, match="MHLA keeps its own state, but layer 0 of the cache is a StaticLayer"
    ):
        model.generate(tokens, cache_implementation="static", max_new_tokens=2)
    _, cache = in_pieces(make(), tokens, [6])
    with pytest.raises(ValueError, match="DynamicLayer with 6 tokens"):
        model(tokens, cache=cache)
    _, ours = in_pieces(model, tokens, [6])
    with pytest.raises(ValueError, match="cannot take tokens back"):
        ours.crop(-1)
    ours.reset()
    assert ours.get_seq_length() == 0


def test_the_trainer_of_transformers_trains_it(tmp_path: Path) -> None:
    model = make({"blocks": 3})
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)} for _ in range(8)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=20, per_device_train_batch_size=8, report_to=[], use_cpu=True,
        disable_tqdm=True, learning_rate=1e-2, save_steps=20,
    )  # fmt: skip
    before = model(**data[0] | {k: v[None] for k, v in data[0].items()}).loss
    Trainer(model, arguments, train_dataset=data).train()
    loaded = MHLALlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    after = loaded(**{k: v[None] for k, v in data[0].items()}).loss
    assert after < 0.5 * before
    assert loaded.generate(torch.arange(3)[None], max_new_tokens=4, do_sample=False).tolist() == [
        list(range(7))
    ]


def test_adapters_of_peft_train_and_generate(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tokens = torch.arange(8)[None]
    lora = peft.LoraConfig(target_modules="all-linear", modules_to_save=["mhla", "lm_head"], r=4)
    model = peft.get_peft_model(make({"blocks": 3}), lora)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(40):
        losses.append(model(input_ids=tokens, labels=tokens).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make({"blocks": 3}), tmp_path).eval()
    assert losses[-1] < 0.5 * losses[0]
    start, *trained = (
        some.generate(input_ids=tokens[:, :3], max_new_tokens=4, do_sample=False)
        for some in (make({"blocks": 3}), model, loaded, loaded.merge_and_unload())
    )
    assert not torch.equal(start, trained[0])
    assert all(torch.equal(found, trained[0]) for found in trained)


def test_outside_of_training_the_past_counts_with_gradients_too() -> None:
    model, tokens = make({"blocks": 3}), torch.randint(50, (2, 9))
    cache = DynamicCache(config=model.config)
    found = [model(piece, cache=cache, use_cache=True).logits for piece in tokens.split([6, 3], 1)]
    assert found[0].requires_grad
    torch.testing.assert_close(torch.cat(found, 1), model(tokens, use_cache=False).logits)


@torch.no_grad()
def test_samples_of_a_cache_are_picked_and_repeated_in_order() -> None:
    mhla = CausalMHLA(MHLAConfig(blocks=3), heads=2, head_dim=4, block_size=4)
    q, k, v = torch.randn(3, 3, 2, 7, 4)
    layer, picked = MHLACacheLayer(), torch.tensor([2, 0])
    layer.attend(mhla, *(x[:, :, :6] for x in (q, k, v)))
    layer.batch_select_indices(picked)
    layer.batch_repeat_interleave(2)
    order = picked.repeat_interleave(2)
    last = layer.attend(mhla, *(x[order, :, 6:] for x in (q, k, v)))
    torch.testing.assert_close(last, mhla(q, k, v)[order, 6:])


def test_conversion_keeps_how_the_model_generates() -> None:
    stock = make()
    stock.generation_config.max_new_tokens = 7
    assert convert_to_mhla(stock, {"blocks": 3}).generation_config.max_new_tokens == 7

"""Random text encoders of every kind that models are trained with, and tokenizers that know the letters."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    GPT2Config,
    GPT2Model,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaModel,
    LlamaTokenizer,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    RobertaConfig,
    RobertaModel,
    RobertaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

WIDTH, POSITIONS = 16, 64
_SIZE: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": POSITIONS, "vocab_size": 400,
}  # fmt: skip
# Of tokenizers of bytes, and of pieces with "\u2581" at the beginning of words.
_BYTES = [*string.ascii_letters, *string.digits, *string.punctuation, "\u0120", "\u010a"]
_PIECES = ["\u2581", *string.ascii_letters, *string.punctuation, *(f"<0x{byte:02X}>" for byte in range(256))]


def _numbered(*pieces: str) -> dict[str, int]:
    return {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def _bert(positions: int = POSITIONS) -> tuple[Any, Any]:
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [*string.ascii_lowercase, *string.punctuation]
    vocabulary = _numbered(*marks, *letters, *(f"##{letter}" for letter in letters))
    config = BertConfig(**{**_SIZE, "max_position_embeddings": positions})
    return BertTokenizer(vocab=vocabulary), BertModel(config)


def _roberta() -> tuple[Any, Any]:
    vocabulary = _numbered("<s>", "<pad>", "</s>", "<unk>", "<mask>", *_BYTES)
    return RobertaTokenizer(vocab=vocabulary, merges=[]), RobertaModel(RobertaConfig(**_SIZE))


def _clip(positions: int = POSITIONS) -> tuple[Any, Any]:
    ends = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = _numbered(*_BYTES, *(f"{letter}</w>" for letter in _BYTES), *ends)
    start, end = (vocabulary[name] for name in ends)
    size = {**_SIZE, "max_position_embeddings": positions}
    config = CLIPTextConfig(**size, bos_token_id=start, eos_token_id=end)
    return CLIPTokenizer(vocab=vocabulary, merges=[]), CLIPTextModel(config)


def _gpt2() -> tuple[Any, Any]:
    size = {"n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": POSITIONS, "vocab_size": 400}
    tokenizer = GPT2Tokenizer(vocab=_numbered("<|endoftext|>", *_BYTES), merges=[])
    return tokenizer, GPT2Model(GPT2Config(**size, bos_token_id=0, eos_token_id=0))


def _begun(tokenizer: Any) -> Any:
    """Let a tokenizer put its first token before each text, as those on the hub do."""
    begin = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, tokenizer.bos_token_id)]
    )
    return tokenizer


def _llama() -> tuple[Any, Any]:
    tokenizer = LlamaTokenizer(vocab=_numbered("<unk>", "<s>", "</s>", *_PIECES), merges=[])
    return _begun(tokenizer), LlamaModel(LlamaConfig(**_SIZE, num_key_value_heads=1))


def _gemma() -> tuple[Any, Any]:
    vocabulary = _numbered("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_PIECES)
    config = Gemma2Config(**_SIZE, head_dim=8, num_key_value_heads=1)
    return _begun(GemmaTokenizer(vocab=vocabulary, merges=[])), Gemma2Model(config)


def _t5(width: int = WIDTH) -> tuple[Any, Any]:
    pieces = [(piece, -float(i)) for i, piece in enumerate(["<pad>", "</s>", "<unk>", *_PIECES])]
    config = T5Config(vocab_size=400, d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    return T5Tokenizer(vocab=pieces, extra_ids=0), T5EncoderModel(config)


_KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "t5": _t5, "gemma": _gemma, "llama": _llama, "gpt2": _gpt2, "clip": _clip, "bert": _bert,
    "roberta": _roberta,
}  # fmt: skip
KINDS = tuple(_KINDS)


def make_text_parts(kind: str) -> dict[str, Any]:
    """Return a tokenizer and a random encoder of 64 positions, whose embeddings have a width of 16."""
    torch.manual_seed(0)
    return _randomized("", *_KINDS[kind]())


def make_hunyuan_parts(seed: int = 0) -> dict[str, Any]:
    """Return tokenizers and random encoders as HunyuanDiT's, of widths 16 and 24."""
    torch.manual_seed(seed)
    return {**_randomized("", *_bert(77)), **_randomized("_2", *_t5(24))}


def make_kandinsky_parts(seed: int = 0) -> dict[str, Any]:
    """Return tokenizers and random encoders as Kandinsky 5's, of widths 16."""
    torch.manual_seed(seed)
    qwen = make_qwen_parts()
    return {**_randomized("", qwen["tokenizer"], qwen["text_encoder"]), **_randomized("_2", *_clip(77))}


def _randomized(suffix: str, tokenizer: Any, encoder: Any) -> dict[str, Any]:
    """Name a tokenizer and its encoder, of random weights that are not small."""
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return {f"tokenizer{suffix}": tokenizer, f"text_encoder{suffix}": encoder.eval()}


def make_qwen_parts() -> dict[str, Any]:
    """Return a tokenizer of characters and a random Qwen2.5-VL, whose embeddings have a width of 16."""
    characters = [
        *map(chr, range(33, 127)),
        "\u0120",
        "\u010a",
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    tokenizer = Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(characters)}, merges=[])
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config={
                "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                "num_key_value_heads": 2, "vocab_size": len(characters),
                "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
            },
            vision_config={
                "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
            },
        )
    )  # fmt: skip
    return {"tokenizer": tokenizer, "text_encoder": text_encoder.eval()}

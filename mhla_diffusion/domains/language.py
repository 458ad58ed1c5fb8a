"""A causal language model of Llama's shape with MHLA, whose memory does not grow while it generates."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaModel

from ..causal import CausalMHLA
from ..ops import MHLAState
from .pretrained import PretrainedMHLA, make_models, settings_of


class MHLACacheLayer(CacheLayerMixin):
    """Layer of a cache of transformers that holds an :class:`mhla_diffusion.ops.MHLAState`.

    Beams are reordered, repeated and selected; tokens cannot be taken back (``crop``), so that there is no
    decoding with an assistant.
    """

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MHLAState | None = None

    def attend(self, mhla: CausalMHLA, q: Tensor, k: Tensor, v: Tensor, **inputs: Any) -> Tensor:
        """Return what ``mhla`` gives for the tokens that come next, and remember them.

        Gradients flow where these are the first tokens.

        Raises:
            ValueError: in training, for tokens behind others, through which no gradient would flow.
        """
        if self.state is None:
            self.state, self.batch_size = mhla.state(), len(q)
        if not q.requires_grad:
            return mhla(q, k, v, state=self.state, **inputs)
        if self.state.tokens and mhla.training:
            raise ValueError(
                "no gradient flows through a cache: train with use_cache=False, or call eval() or no_grad()"
            )
        first = self.state.tokens == 0
        with torch.no_grad():
            remembered = mhla(q, k, v, state=self.state, **inputs)
        return mhla(q, k, v, **inputs) if first else remembered

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: there are no keys and values."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Refuse: MHLA needs the queries too, see :meth:`attend`."""
        raise ValueError("a layer with softmax was given the cache of one with MHLA; make a new cache")

    def get_seq_length(self) -> int:
        """Return the number of tokens that were seen."""
        return 0 if self.state is None else self.state.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys softmax layers beside this one see, and 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def reset(self) -> None:
        """Forget all tokens."""
        self.state = None

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: sums do not say what a token added."""
        raise ValueError("MHLA cannot take tokens back (crop): generate without an assistant")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep these samples, in this order."""
        if self.state is not None:
            self.state.select(beam_idx)
            self.batch_size = len(beam_idx)

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have each sample ``repeats`` times."""
        if self.state is not None:
            self.reorder_cache(torch.arange(self.batch_size).repeat_interleave(repeats))


def _layer_of(cache: Cache, index: int) -> MHLACacheLayer:
    """The layer of a cache, which is made where nothing was kept yet."""
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, MHLACacheLayer):
        return layer
    if type(layer) is not DynamicLayer or layer.get_seq_length():
        raise ValueError(
            f"MHLA keeps its own state, but layer {index} of the cache is a {type(layer).__name__} with "
            f"{layer.get_seq_length()} tokens: leave cache_implementation out, or give a new DynamicCache"
        )
    cache.layers[index] = MHLACacheLayer()
    return cache.layers[index]


class CausalMHLAAttention(LlamaAttention):
    """Self-attention of Llama, with MHLA in place of softmax. Rotary positions turn the features."""

    def __init__(self, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.mhla = CausalMHLA(
            settings_of(config),
            heads=config.num_attention_heads,
            head_dim=self.head_dim,
            block_size=config.block_size,
            query_dim=config.hidden_size,
        )

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend, ``[B, N, D]`` to ``[B, N, D]``; the cache remembers the tokens."""
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (k, v))
        cos, sin = (table[:, None, :, : self.head_dim // 2] for table in position_embeddings)
        inputs = {"hidden_states": hidden_states, "rotary_emb": (cos, sin)}
        q, k = _in_pairs(q), _in_pairs(k)
        if cache is None:
            out = self.mhla(q, k, v, **inputs)
        else:
            out = _layer_of(cache, self.layer_idx).attend(self.mhla, q, k, v, **inputs)
        return self.o_proj(out), None


def _in_pairs(x: Tensor) -> Tensor:
    """Channels ``[..., d]`` in the order of the operator's rotary pairs; Llama turns i with i + d / 2."""
    return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)


class LanguageMHLA(PretrainedMHLA):
    """Base of the language models.

    Args:
        config: see :class:`MHLALlamaConfig`.

    Raises:
        ValueError: for settings that do not fit, and rotary positions that scale the scores of softmax.
    """

    def __init__(self, config: Any, *args: Any, **settings: Any) -> None:
        chosen = settings_of(config)
        super().__init__(config, *args, **settings)  # type: ignore[call-arg]
        model = cast(Any, self if isinstance(self, LlamaModel) else self.model)  # type: ignore[attr-defined]
        if model.rotary_emb.attention_scaling != 1:
            raise ValueError(
                f"rope_parameters {config.rope_parameters} scale the scores of softmax, which MHLA has none "
                "of: take rope_type default, linear, dynamic or llama3"
            )
        for index in range(len(model.layers)) if chosen.layers is None else chosen.layers:
            model.layers[index].self_attn = CausalMHLAAttention(config, index)
        model.register_forward_pre_hook(_refuse_padding, with_kwargs=True)
        self.post_init()  # type: ignore[attr-defined] # the new projections start as all others do


def _refuse_padding(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse tokens whose blocks would not begin where their sequence does."""
    mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
    if mask is not None:
        if mask.ndim != 2:
            raise ValueError(f"attention_mask must be [B, N] or left out, got {tuple(mask.shape)}")
        counts = mask.bool()
        caches = (kwargs.get("cache"), kwargs.get("past_key_values"), *args[3:4])
        cached = any(cache is not None for cache in caches)
        _require(
            counts.all() if cached else (counts[:, :-1] | ~counts[:, 1:]).all(),
            "with padding before or between tokens the blocks of a sequence would begin elsewhere than "
            "without it: pad on the right in training, and generate from prompts of one length at a time",
        )
    places = args[2] if len(args) > 2 else kwargs.get("position_ids")
    if places is not None:
        _require(
            (places.diff(dim=-1) == 1).all(),
            "position_ids must count up by 1: several sequences packed into one are not told apart",
        )


def _require(holds: Tensor, message: str) -> None:
    """Check a bool of a tensor; inside a graph when it runs: a RuntimeError, on a GPU one of the device."""
    if torch.compiler.is_compiling():
        torch._assert_async(holds, message)
    elif not holds:
        raise ValueError(message)


globals().update(make_models("language", LanguageMHLA))

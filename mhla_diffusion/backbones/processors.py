"""Attention processors: project with the attention layer's weights, attend with MHLA, project out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from diffusers import ParallelConfig
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import MHLA
from ..ops.features import RotaryEmbedding

# With fewer there is little memory to save, and calling everything twice shows.
_MANY_TOKENS = 1024


class MHLAAttnProcessor(MHLA):
    """MHLA as a processor for diffusers' ``Attention`` and Wan's.

    ``attn.set_processor(MHLAAttnProcessor(config, heads=..., head_dim=..., grid=...))``; whoever calls the
    layer passes the grid of its tokens along: ``attn(x, grid=(H, W))``. For cross-attention set
    ``key_blocks`` in the config and pass ``key_grid`` here; a call without one takes the keys for a sequence,
    ``(N_k,)``. See :class:`mhla_diffusion.MHLA` for the arguments.

    In training, where there are norms or a gate and 1,024 tokens or more, only what the projections give is
    kept for the backward, which computes the rest again.
    """

    # Set by diffusers' enable_parallelism: tokens are then spread over ranks.
    _parallel_config: ParallelConfig | None = None

    # The parameters are used in forward and the layers of attn here: offloading hooks sit on forward, so that
    # a parameter used here would be on another device (or meta) when it is needed.
    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: RotaryEmbedding | None = None,
        *,
        grid: tuple[int, ...] | None = None,
        key_grid: tuple[int, ...] | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Attention over ``[B, N, D]``; see :meth:`mhla_diffusion.MHLA.forward` for the last arguments.

        ``rotary_emb`` may also be as Wan has it: ``[1, N, 1, d]``, with each angle twice.

        Raises:
            ValueError: without a grid, for an additive attention mask, which linear attention has no form of,
                and for keys that the processor was not built for.
        """
        self._check_call(grid, encoder_hidden_states, attention_mask)
        assert grid is not None
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        if encoder_hidden_states is not None and key_grid is None:
            key_grid = (encoder_hidden_states.shape[1],)
        config = self._parallel_config and self._parallel_config.context_parallel_config
        attend = functools.partial(
            super().__call__, grid=grid, key_grid=key_grid, key_mask=key_mask,
            rotary_emb=None if rotary_emb is None else rotary_pairs(rotary_emb, attn),
            group=config._flattened_mesh.get_group() if config else None,
        )  # fmt: skip

        def between_projections(q: Tensor, k: Tensor, v: Tensor, hidden_states: Tensor) -> Tensor:
            q, k = split_heads(q, attn.norm_q, attn.heads), split_heads(k, attn.norm_k, attn.heads)
            return attend(q, k, split_heads(v, None, attn.heads), hidden_states=hidden_states)

        projected = *_project(attn, hidden_states, source), hidden_states
        extras = any((attn.norm_q, self.norm_q, self.norm, self.gate, self.feature_q))
        if extras and hidden_states.shape[1] >= _MANY_TOKENS and _is_differentiated():
            # Norms and gate keep more than the operator does, and cost less than a projection: the backward
            # computes what it needs of them again. No check of shapes: those of parameters change between the
            # passes under DeepSpeed's ZeRO-3.
            out = checkpoint(between_projections, *projected, use_reentrant=False, determinism_check="none")
        else:
            out = between_projections(*projected)
        out = attn.to_out[1](attn.to_out[0](out))
        if getattr(attn, "residual_connection", False):
            out = out + hidden_states
        return out / getattr(attn, "rescale_output_factor", 1.0)

    def _check_call(
        self, grid: tuple[int, ...] | None, encoder_hidden_states: Tensor | None, mask: Tensor | None
    ) -> None:
        if grid is None:
            raise ValueError(
                "MHLA needs the grid of its tokens: call the attention layer with grid=(H, W), or use a "
                "model that passes it, such as MHLADiTTransformer2DModel"
            )
        if mask is not None:
            raise ValueError(
                "linear attention takes no additive mask; pass key_mask=[B, N_k] (bool) to leave tokens out"
            )
        if (encoder_hidden_states is None) != (self.key_blocks is None):
            raise ValueError(
                "cross-attention needs key_blocks in the MHLAConfig and encoder_hidden_states, "
                f"self-attention neither; got key_blocks {self.key_blocks} and "
                f"{'no ' if encoder_hidden_states is None else ''}encoder_hidden_states"
            )


def _is_differentiated() -> bool:
    """Whether a graph is kept that torch.compile, which weighs memory against time itself, does not see."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _project(attn: Attention, hidden_states: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values ``[B, N, D]``, from one layer where ``fuse_qkv_projections`` made it."""
    if getattr(attn, "fused_projections", False) and source is hidden_states:
        q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        return q, k, v
    return attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)


def split_heads(x: Tensor, norm: nn.Module | None, heads: int) -> Tensor:
    """``[B, N, D]`` to ``[B, H, N, d]``; the norm is over each head, or (Wan) over all together."""
    weight = getattr(norm, "weight", None)
    if norm is not None and weight is not None and weight.shape[-1] == x.shape[-1]:
        return norm(x).unflatten(-1, (heads, -1)).transpose(1, 2)
    x = x.unflatten(-1, (heads, -1)).transpose(1, 2)
    return x if norm is None else norm(x)


def rotary_pairs(rotary_emb: RotaryEmbedding, attn: Any) -> RotaryEmbedding:
    """Cosines and sines ``[..., N, d / 2]``, also of Wan's ``[1, N, 1, d]`` and LTX's ``[B, N, H d]``."""
    cos, sin = rotary_emb
    if cos.ndim == 3 and cos.shape[-1] == attn.inner_dim:  # for each head its own
        cos, sin = (table.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for table in (cos, sin))
        return cos[..., 0::2], sin[..., 1::2]
    if cos.ndim == 4 and cos.shape[2] == 1:
        return cos[:, :, 0, 0::2], sin[:, :, 0, 1::2]
    return cos, sin


# diffusers skips attention by the class of the processor. Here too the layer then returns its input.
_skipped = AttentionProcessorRegistry.get(AttnProcessor2_0).skip_processor_output_fn
AttentionProcessorRegistry.register(MHLAAttnProcessor, AttentionProcessorMetadata(_skipped))

"""Attention processors: project with the attention layer's weights, attend with MHLA, project out."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import ParallelConfig
from diffusers.hooks._helpers import AttentionProcessorMetadata, AttentionProcessorRegistry
from diffusers.hooks.layer_skip import AttentionScoreSkipFunctionMode
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..attention import MHLA
from ..config import POWER_MAP, WINDOW_ONLY
from ..ops.features import RotaryEmbedding
from .positions import shared_pairs

# With fewer there is little memory to save, and calling everything twice shows.
_MANY_TOKENS = 1024


class MHLAAttnProcessor(MHLA):
    """MHLA as a processor for diffusers' ``Attention`` and Wan's.

    ``attn.set_processor(MHLAAttnProcessor(config, heads=..., head_dim=..., grid=...))``; whoever calls the
    layer passes the grid of its tokens along: ``attn(x, grid=(H, W))``. For cross-attention set
    ``key_blocks`` in the config and pass ``key_grid`` here; a call without one takes the keys for a sequence,
    ``(N_k,)``. See :class:`mhla_diffusion.MHLA` for the arguments.

    Where the layer projects a text, too (``add_q_proj``), attention over both is joint and the result a pair,
    that of the text last. Set ``extra_block`` in the config: the text is of extra tokens, and so is what the
    other stream holds behind the tokens of the grid.

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
        extra: tuple[int, int] | None = None,
        key_grid: tuple[int, ...] | None = None,
        key_mask: Tensor | None = None,
        image_rotary_emb: RotaryEmbedding | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attention over ``[B, N, D]``; see :meth:`mhla_diffusion.MHLA.forward` for what is not said here.

        Args:
            rotary_emb: as any layer of diffusers has it, see :func:`.positions.rotary_pairs`.
            image_rotary_emb: in joint attention: of the image and the text, complex ``[N, d / 2]``.
            encoder_hidden_states_mask: in joint attention: bool ``[B, N]``, true where a token of the text
                counts.

        Returns:
            ``[B, N, D]``, or ``[B, N, H, d]`` of layers that leave its projection to others.

        Raises:
            ValueError: without a grid, for an additive attention mask, which linear attention has no form of,
                and for keys that the processor was not built for.
        """
        text = encoder_hidden_states if is_joint(attn) else None
        keys = None if is_joint(attn) else encoder_hidden_states
        self._check_call(grid, keys, attention_mask)
        assert grid is not None
        config = self._parallel_config and self._parallel_config.context_parallel_config
        group = config._flattened_mesh.get_group() if config else None
        if keys is not None and key_grid is None:
            key_grid = (keys.shape[1],)
        if text is not None:
            extra = text.shape[1], _tokens_beyond(grid, hidden_states, group)
            rotary_emb, key_mask = image_rotary_emb, joint_mask(encoder_hidden_states_mask, hidden_states)
        attend = functools.partial(
            super().__call__, grid=grid, extra=extra, key_grid=key_grid, key_mask=key_mask, group=group,
            rotary_emb=None if rotary_emb is None else shared_pairs(rotary_emb, attn),
        )  # fmt: skip

        def between_projections(*projected: Tensor) -> Tensor:
            q, k, v, x = (projected[i::4] for i in range(4))
            gated = x[0] if self.gate is None or text is None else torch.cat(x[::-1], 1)
            q_heads, k_heads = join_heads(attn, q, "norm_q"), join_heads(attn, k, "norm_k")
            return attend(q_heads, k_heads, join_heads(attn, v), hidden_states=gated)

        projected = _project(attn, hidden_states, hidden_states if keys is None else keys, text)
        powers = self.config.feature_map == POWER_MAP
        extras = powers or any((attn.norm_q, self.norm_q, self.norm, self.gate, self.feature_q))
        cheap = self.config.window != WINDOW_ONLY  # softmax over many tokens costs more than a projection
        if extras and cheap and _is_differentiated() and _holds_many_tokens(grid, hidden_states, group):
            # Norms, gate and features made here keep more than the operator does, and cost less than a
            # projection: the backward computes what it needs of them again. No check of shapes: those of
            # parameters change between the passes under DeepSpeed's ZeRO-3.
            out = checkpoint(between_projections, *projected, use_reentrant=False, determinism_check="none")
        else:
            out = between_projections(*projected)
        return _project_out(attn, out, hidden_states, text)

    def _check_call(
        self, grid: tuple[int, ...] | None, encoder_hidden_states: Tensor | None, mask: Tensor | None
    ) -> None:
        if grid is None:
            raise ValueError(
                "MHLA needs the grid of its tokens: call the attention layer with grid=(H, W), or use a "
                "model that passes it, such as MHLADiTTransformer2DModel"
            )
        if _skips_scores():
            raise ValueError(
                "skip_attention_scores (of perturbed-attention guidance) takes the weights of softmax out, "
                "which MHLA has none of, and would change nothing: skip whole layers (skip_attention), or "
                "leave the layers that are perturbed softmax (mhla_config.layers)"
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


def _skips_scores() -> bool:
    """Whether diffusers puts values in the place of softmax attention, by a mode of torch's functions."""
    if torch.compiler.is_compiling():
        return False
    modes = torch.overrides._get_current_function_mode_stack()
    return any(isinstance(mode, AttentionScoreSkipFunctionMode) for mode in modes)


def _holds_many_tokens(grid: tuple[int, ...], hidden_states: Tensor, group: dist.ProcessGroup | None) -> bool:
    """Whether each rank holds many: they have to agree, as what is computed again exchanges again."""
    share = hidden_states.shape[1] if group is None else math.prod(grid) // dist.get_world_size(group)
    return share >= _MANY_TOKENS


def _is_differentiated() -> bool:
    """Whether a graph is kept that torch.compile, which weighs memory against time itself, does not see."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _project(attn: Any, hidden_states: Tensor, source: Tensor, text: Tensor | None) -> list[Tensor]:
    """Queries, keys and values ``[B, N, D]`` and what they are made of; in joint attention the text's too.

    From one layer where ``fuse_qkv_projections`` made it.
    """
    if getattr(attn, "fused_projections", False) and source is hidden_states:
        projected = [*attn.to_qkv(hidden_states).chunk(3, dim=-1), hidden_states]
    else:
        projected = [attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source), hidden_states]
    if text is not None:
        projected += [attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text), text]
    return projected


def _project_out(
    attn: Any, out: Tensor, hidden_states: Tensor, text: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    """What the layer returns: the tokens, or in joint attention those of the image and those of the text."""
    if text is not None:
        of_text, out = out[:, : text.shape[1]], out[:, text.shape[1] :]
        return attn.to_out[1](attn.to_out[0](out)), attn.to_add_out(of_text)
    if isinstance(attn.to_out, nn.Identity):
        return out.unflatten(-1, (attn.heads, -1))  # whoever called projects it
    out = attn.to_out[1](attn.to_out[0](out))
    if getattr(attn, "residual_connection", False):
        out = out + hidden_states
    return out / getattr(attn, "rescale_output_factor", 1.0)


def is_joint(attn: Any) -> bool:
    """Return True for a layer that attends over an image and a text at once, as of SD3 and Qwen-Image."""
    return getattr(attn, "add_q_proj", None) is not None


def join_heads(attn: Any, streams: Sequence[Tensor], norm: str = "") -> Tensor:
    """``[B, N, D]`` of an image and, in joint attention, of a text to ``[B, H, N, d]``, the text first.

    Args:
        attn: the layer.
        streams: what it projected.
        norm: the name of its norm, ``"norm_q"`` or ``"norm_k"``, which texts have as ``"norm_added_q"``.
    """
    split = rotary_heads if norm else split_heads
    heads = [split(streams[0], attn, getattr(attn, norm) if norm else None)]
    if len(streams) == 1:
        return heads[0]
    added = getattr(attn, norm.replace("norm", "norm_added")) if norm else None
    heads.insert(0, split(streams[1], attn, added))
    return torch.cat([x.transpose(1, 2) for x in heads], 1).transpose(1, 2)


def joint_mask(mask: Tensor | None, hidden_states: Tensor) -> Tensor | None:
    """Mask ``[B, N]`` of the tokens of a text, and after it of an image, which all count."""
    return None if mask is None else F.pad(mask.bool(), (0, hidden_states.shape[1]), value=True)


def _tokens_beyond(grid: tuple[int, ...], hidden_states: Tensor, group: dist.ProcessGroup | None) -> int:
    """How many tokens follow those of the grid: of other images."""
    tokens, found = math.prod(grid), hidden_states.shape[1]
    if group is None:
        return max(0, found - tokens)
    share, longer = divmod(tokens, dist.get_world_size(group))
    if found != share + (dist.get_rank(group) < longer):
        raise ValueError(
            f"over ranks an image has the tokens of its grid {grid} alone, but this rank holds {found} of "
            f"{tokens}: leave other images (of an edit) out, or do without context parallelism"
        )
    return 0


def split_heads(x: Tensor, attn: Any, norm: nn.Module | None = None) -> Tensor:
    """``[B, N, D]`` to ``[B, H, N, d]``; the norm is over each head, or (Wan) over all together.

    Heads of keys and values that queries share are repeated.
    """
    norm = norm or nn.Identity()
    weight = getattr(norm, "weight", None)
    over_all = weight is not None and weight.shape[-1] == x.shape[-1]
    x = (norm(x) if over_all else x).unflatten(-1, (-1, attn.inner_dim // attn.heads))
    x = (x if over_all else norm(x)).transpose(1, 2)
    shared = attn.heads // x.shape[1]
    return x if shared == 1 else x.repeat_interleave(shared, dim=1)


def rotary_heads(x: Tensor, attn: Any, norm: nn.Module | None) -> Tensor:
    """Split queries or keys into heads whose channels ``2i`` and ``2i + 1`` turn together.

    In some models channel i turns with the one half a head further, or half of a third of a head. The order
    of channels is all the same to products of queries and keys.
    """
    x, groups = split_heads(x, attn, norm), getattr(attn, "rotary_halves", 0)
    return x.unflatten(-1, (groups, 2, -1)).transpose(-1, -2).flatten(-3) if groups else x


# diffusers skips attention by the class of the processor. Here too the layer then returns its input.
_skipped = AttentionProcessorRegistry.get(AttnProcessor2_0).skip_processor_output_fn
AttentionProcessorRegistry.register(MHLAAttnProcessor, AttentionProcessorMetadata(_skipped))

"""Video transformers of diffusers with MHLA inside."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import SanaVideoTransformer3DModel, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_sana_video import SanaVideoTransformerBlock
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from diffusers.utils import apply_lora_scale
from torch import Tensor, nn

from ..attention import MHLA, MHLAConfig
from .mixin import MHLAModelMixin, as_config, check_blocks, layer_attention


class _WanGridBlock(WanTransformerBlock):
    """A block that passes the grid of its tokens on to linear self-attention."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        grid: tuple[int, int, int] | None = None,
    ) -> Tensor:
        # temb: [B, 6, D], or [B, N, 6, D] where each token has a time of its own (Wan2.2 TI2V).
        modulation = self.scale_shift_table + temb.float()
        shift, scale, gate, ff_shift, ff_scale, ff_gate = (
            x.squeeze(-2) if temb.ndim == 4 else x for x in modulation.chunk(6, dim=-2)
        )
        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        linear = {"grid": grid} if isinstance(self.attn1.processor, MHLA) else {}
        attended = self.attn1(normed, None, None, rotary_emb, **linear)
        hidden_states = (hidden_states.float() + attended * gate).type_as(hidden_states)

        normed = self.norm2(hidden_states.float()).type_as(hidden_states)
        hidden_states = hidden_states + self.attn2(normed, encoder_hidden_states, None, None)

        normed = (self.norm3(hidden_states.float()) * (1 + ff_scale) + ff_shift).type_as(hidden_states)
        return (hidden_states.float() + self.ffn(normed).float() * ff_gate).type_as(hidden_states)


class MHLAWanTransformer3DModel(MHLAModelMixin, WanTransformer3DModel):
    """Wan (text-to-video and image-to-video) with MHLA, plain linear or softmax attention in each layer.

    Takes every argument of :class:`diffusers.WanTransformer3DModel` and three more. Its registered config
    rebuilds it, so ``save_pretrained`` and ``from_pretrained`` restore the same function. Rotary positions
    turn the numerators alone; Wan's norm of queries and keys, over all heads together, stays. Cross-attention
    to text and images stays softmax.

    Latents may have any number of frames, height and width that the patches divide: blocks follow the grid,
    ragged ones included.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict; the defaults when None.
        sample_grid: tokens along frames, height and width that the model is made for. Only a number of blocks
            in all depends on it. By default that of 81 frames of 480 x 832 pixels.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    _stock_class = "WanTransformer3DModel"
    _no_split_modules = ["_WanGridBlock"]  # noqa: RUF012
    _repeated_blocks = ["_WanGridBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        attention: str | Sequence[str] = "mhla",
        mhla_config: MHLAConfig | dict[str, Any] | None = None,
        sample_grid: tuple[int, int, int] = (21, 30, 52),
    ) -> None:
        mhla_config = as_config(mhla_config)
        grid = tuple(sample_grid)
        if "mhla" in layer_attention(attention, mhla_config.layers, num_layers):
            check_blocks(mhla_config, grid)
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        for block in self.blocks:
            block.__class__ = _WanGridBlock
        self._build_attention(
            [block.attn1 for block in self.blocks], attention, mhla_config,
            heads=num_attention_heads, head_dim=attention_head_dim, grid=grid,
        )  # fmt: skip
        self._reset_parameters()
        self.register_to_config(sample_grid=list(grid))

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict for noisy latents.

        Args:
            hidden_states: ``[B, C, F, H, W]``, F, H and W multiples of the patch.
            timestep: ``[B]``, or one for each token ``[B, N]``; 0 to 1000.
            encoder_hidden_states: of the text, ``[B, 512, text_dim]``.
            encoder_hidden_states_image: of the image, for image-to-video.
            return_dict: whether to return a ``Transformer2DModelOutput`` instead of a tuple.
            attention_kwargs: ``{"scale": ...}`` for LoRA.

        Returns:
            ``sample``, ``[B, out_channels, F, H, W]``.

        Raises:
            ValueError: when F, H or W is not a multiple of the patch size.
        """
        patch = tuple(self.config.patch_size)
        # Plain integers under torch.compile too, whose default makes sizes symbolic from the second grid on.
        sizes = tuple(map(operator.index, hidden_states.shape[2:]))
        if any(size % p for size, p in zip(sizes, patch, strict=True)):
            raise ValueError(f"frames, height and width must be multiples of the patch {patch}, got {sizes}")
        grid = tuple(size // p for size, p in zip(sizes, patch, strict=True))
        rotary_emb = self.rope(hidden_states)
        hidden_states = self.patch_embedding(hidden_states).flatten(2).transpose(1, 2).contiguous()
        temb, modulation, encoder_hidden_states = self._embed_conditions(
            timestep, encoder_hidden_states, encoder_hidden_states_image
        )
        for block in self.blocks:
            arguments = (hidden_states, encoder_hidden_states, modulation, rotary_emb, grid)
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, *arguments)
            else:
                hidden_states = block(*arguments)
        shift, scale = (self.scale_shift_table.to(temb.device) + temb[..., None, :]).chunk(2, dim=-2)
        if temb.ndim == 3:
            shift, scale = shift.squeeze(-2), scale.squeeze(-2)
        shift, scale = shift.to(hidden_states.device), scale.to(hidden_states.device)
        hidden_states = (self.norm_out(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        hidden_states = self.proj_out(hidden_states)
        # [B, f h w, p q r C] -> [B, C, F, H, W]
        hidden_states = hidden_states.unflatten(1, grid).unflatten(-1, (*patch, -1))
        output = torch.einsum("bfhwpqrc->bcfphqwr", hidden_states).reshape(len(hidden_states), -1, *sizes)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _reset_parameters(self) -> None:
        """Xavier, as Wan's authors start, since diffusers has no start of its own.

        One deviation: their embedding of text starts at 0.02, ours at Xavier. What reads it learns in
        proportion to it, so that short runs hear the text sooner. The processors keep the start that their
        config names.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".processor" not in name:
                if ".time_embedder." in name:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        nn.init.zeros_(self.proj_out.weight)

    def _embed_conditions(
        self, timestep: Tensor, text: Tensor, image: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The time ``[B, (N,) D]``, the modulation of the blocks ``[B, (N,) 6, D]``, and the context."""
        tokens = timestep.shape[1] if timestep.ndim == 2 else None
        temb, modulation, text, image = self.condition_embedder(
            timestep.flatten(), text, image, timestep_seq_len=tokens
        )
        return temb, modulation.unflatten(-1, (6, -1)), text if image is None else torch.cat((image, text), 1)


class _SanaGridBlock(SanaVideoTransformerBlock):
    """A block that passes the grid of its tokens on to MHLA."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None,
        timestep: Tensor,
        frames: int,
        height: int,
        width: int,
        rotary_emb: tuple[Tensor, Tensor],
    ) -> Tensor:
        grid = (frames, height, width)
        # timestep: the modulation, [B, 1, 6 D], or [B, N, 6 D] where each token has a time of its own.
        modulation = self.scale_shift_table + timestep.unflatten(-1, (6, -1))
        shift, scale, gate, ff_shift, ff_scale, ff_gate = modulation.unbind(dim=2)

        normed = (self.norm1(hidden_states) * (1 + scale) + shift).type_as(hidden_states)
        mhla = {"grid": grid} if isinstance(self.attn1.processor, MHLA) else {}
        hidden_states = hidden_states + gate * self.attn1(normed, rotary_emb=rotary_emb, **mhla)

        hidden_states = hidden_states + self.attn2(
            hidden_states, encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
        )

        normed = (self.norm2(hidden_states) * (1 + ff_scale) + ff_shift).unflatten(1, grid)
        return hidden_states + ff_gate * self.ff(normed).flatten(1, 3)


class MHLASanaVideoTransformer3DModel(MHLAModelMixin, SanaVideoTransformer3DModel):
    """SanaVideo with MHLA in place of its linear attention.

    Takes every argument of :class:`diffusers.SanaVideoTransformer3DModel` and three more. Its registered
    config rebuilds it. SanaVideo's own attention is MHLA with one block, so that MHLA with its mixing at the
    start 1 / M is the stock model. Cross-attention to text stays softmax.

    Args:
        attention: ``"mhla"`` or ``"linear"`` (SanaVideo's own), for all layers that ``mhla_config.layers``
            names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict; the defaults when None.
        sample_grid: as for :class:`MHLAWanTransformer3DModel`.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    _stock_class = "SanaVideoTransformer3DModel"
    _stock_attention = "linear"
    _no_split_modules = ["_SanaGridBlock", "SanaModulatedNorm"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        in_channels: int = 16,
        out_channels: int | None = 16,
        num_attention_heads: int = 20,
        attention_head_dim: int = 112,
        num_layers: int = 20,
        num_cross_attention_heads: int | None = 20,
        cross_attention_head_dim: int | None = 112,
        cross_attention_dim: int | None = 2240,
        caption_channels: int = 2304,
        mlp_ratio: float = 2.5,
        dropout: float = 0.0,
        attention_bias: bool = False,
        sample_size: int = 30,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        norm_elementwise_affine: bool = False,
        norm_eps: float = 1e-6,
        interpolation_scale: int | None = None,
        guidance_embeds: bool = False,
        guidance_embeds_scale: float = 0.1,
        qk_norm: str | None = "rms_norm_across_heads",
        rope_max_seq_len: int = 1024,
        attention: str | Sequence[str] = "mhla",
        mhla_config: MHLAConfig | dict[str, Any] | None = None,
        sample_grid: tuple[int, int, int] = (21, 30, 52),
    ) -> None:
        mhla_config = as_config(mhla_config)
        grid = tuple(sample_grid)
        if "mhla" in layer_attention(attention, mhla_config.layers, num_layers, stock=self._stock_attention):
            check_blocks(mhla_config, grid)
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_layers=num_layers,
            num_cross_attention_heads=num_cross_attention_heads,
            cross_attention_head_dim=cross_attention_head_dim,
            cross_attention_dim=cross_attention_dim,
            caption_channels=caption_channels,
            mlp_ratio=mlp_ratio,
            dropout=dropout,
            attention_bias=attention_bias,
            sample_size=sample_size,
            patch_size=patch_size,
            norm_elementwise_affine=norm_elementwise_affine,
            norm_eps=norm_eps,
            interpolation_scale=interpolation_scale,
            guidance_embeds=guidance_embeds,
            guidance_embeds_scale=guidance_embeds_scale,
            qk_norm=qk_norm,
            rope_max_seq_len=rope_max_seq_len,
        )
        for block in self.transformer_blocks:
            block.__class__ = _SanaGridBlock
        self._build_attention(
            [block.attn1 for block in self.transformer_blocks], attention, mhla_config,
            heads=num_attention_heads, head_dim=attention_head_dim, grid=grid,
        )  # fmt: skip
        self.register_to_config(sample_grid=list(grid))


# The names under which diffusers records the classes in model_index.json, free of our file layout.
MHLASanaVideoTransformer3DModel.__module__ = "mhla_diffusion"
MHLAWanTransformer3DModel.__module__ = "mhla_diffusion"

"""Kandinsky 5: videos and images of texts and images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Attention
from torch import Tensor, nn

from ..attention import MHLA
from .grid import Arguments, Grid, token_grid
from .layer_plan import AttentionChoice, ConfigChoice
from .model import MHLAModelMixin
from .stock import after

_TEXT_TOKENS = 256  # to which the pipelines cut every prompt
_SPARSE = "sparse_params"


class _Attention(Kandinsky5Attention):
    """Kandinsky's layer, of which :class:`MHLAAttnProcessor` finds the parts by their common names."""

    heads = property(lambda self: self.num_heads)
    inner_dim = property(lambda self: self.to_query.out_features)
    to_q = property(lambda self: self.to_query)
    to_k = property(lambda self: self.to_key)
    to_v = property(lambda self: self.to_value)
    norm_q = property(lambda self: self.query_norm)
    norm_k = property(lambda self: self.key_norm)
    to_out = property(lambda self: (self.out_layer, nn.Identity()))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *,
        sparse_params: dict[str, Any] | None = None,
        rotary_emb: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        sparse = sparse_params if sparse_params and "sta_mask" in sparse_params else None
        if not isinstance(self.processor, MHLA):
            return super().forward(hidden_states, encoder_hidden_states, sparse, rotary_emb, **kwargs)
        if sparse is not None or (sparse_params or {}).get("to_fractal"):
            raise ValueError("linear attention has no sparse form, nor its order: leave sparse_params out")
        return self.processor(self, hidden_states, rotary_emb=rotary_emb, **kwargs)


class MHLAKandinsky5Transformer3DModel(MHLAModelMixin, Kandinsky5Transformer3DModel):
    """Kandinsky 5 with MHLA, plain linear or softmax attention in each layer that sees pictures.

    Takes every argument of :class:`diffusers.Kandinsky5Transformer3DModel` and three more. Its registered
    config rebuilds it. Rotary positions turn the numerators alone, and queries and keys of a softmax window;
    the norms of queries and keys stay. Layers of the text and cross-attention to it stay softmax. Latents
    are ``[B, F, H, W, C]``.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.
        sample_grid: tokens along frames, height and width that the model is made for; by default that of 121
            frames of 512 x 768 pixels.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do. Also for
            sparse attention (``attention_type="nabla"``), which has tokens in another order.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "Kandinsky5-Lite-2B": {
            "in_visual_dim": 16, "out_visual_dim": 16, "model_dim": 1792, "ff_dim": 7168, "visual_cond": True,
            "axes_dims": [16, 24, 24],
        }
    }  # fmt: skip
    block_list = "visual_transformer_blocks"
    attention_name = "self_attention"
    one_by_one = True
    vae_stride = (4, 8, 8)

    @after(Kandinsky5Transformer3DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
        sample_grid: tuple[int, int, int] = (31, 32, 48),
    ) -> None:
        plan = self.plan_layers(attention, mhla_config, stock["num_visual_blocks"], sample_grid)
        if stock["attention_type"] != "regular" and set(plan.kinds) != {"softmax"}:
            raise ValueError(
                f"attention_type is {stock['attention_type']!r}: sparse attention has tokens in an order of "
                "its own; set attention_type to 'regular' in config.json, or attention='softmax'"
            )
        self.build(stock, plan)
        self.register_forward_pre_hook(_send_grid, with_kwargs=True)
        self.register_to_config(sample_grid=list(sample_grid))

    @classmethod
    def with_depth(cls, arguments: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        return {**arguments, "num_visual_blocks": num_layers}

    @property
    def self_attention(self) -> list[Any]:
        layers = super().self_attention
        for layer in layers:
            if type(layer) is Kandinsky5Attention:
                layer.__class__ = _Attention
        return layers

    def fuse_qkv_projections(self) -> None:
        """Refuse, where the stock model fails with the name of a layer.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "the projections of a Kandinsky5 cannot be fused: diffusers knows to_q, and not to_query"
        )

    @property
    def sample_channels(self) -> int:
        return self.config.in_visual_dim

    @property
    def predicted_channels(self) -> int:
        return self.config.out_visual_dim

    @property
    def text_shapes(self) -> tuple[tuple[int | None, int], ...]:
        return (None, self.config.in_text_dim), (1, self.config.in_text_dim2)

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Return arguments of the forward as the pipeline that makes videos of texts gives them.

        Raises:
            ValueError: for texts of several lengths, of which the model takes no mask.
        """
        given = {**self._positions(samples), **super().denoising_arguments(samples, timestep, conditions)}
        latents = samples.movedim(1, -1)
        if self.config.visual_cond:  # of which nothing is known
            latents = torch.cat([latents, torch.zeros_like(latents), torch.zeros_like(latents[..., :1])], -1)
        given["hidden_states"] = latents
        if given.pop("encoder_attention_mask_2", None) is not None:
            given = self.without_mask(given)
            length = given["encoder_hidden_states"].shape[1]
            given["text_rope_pos"] = torch.arange(length, device=samples.device)
            given["pooled_projections"] = given.pop("encoder_hidden_states_2").flatten(1)
        return given

    def prediction(self, output: Tensor, samples: Tensor) -> Tensor:
        """Return the velocity ``[B, C, F, H, W]`` of the output, whose channels are last."""
        return output.movedim(-1, 1)

    def _positions(self, samples: Tensor) -> dict[str, Any]:
        """Positions of latents ``[B, C, F, H, W]``, and how much they are apart at their height and width."""
        from diffusers import Kandinsky5T2VPipeline

        grid = token_grid(samples.shape[2:], self.latents_per_token)
        height, width = (
            side * stride for side, stride in zip(samples.shape[3:], self.vae_stride[1:], strict=True)
        )
        return {
            "visual_rope_pos": [torch.arange(tokens, device=samples.device) for tokens in grid],
            "scale_factor": Kandinsky5T2VPipeline._get_scale_factor(None, height, width),
        }

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        sizes = [tokens * patch for tokens, patch in zip(grid, self.latents_per_token, strict=True)]
        channels = config.in_visual_dim * (2 if config.visual_cond else 1) + bool(config.visual_cond)
        text = (batch_size, _TEXT_TOKENS, config.in_text_dim)
        return {
            "hidden_states": torch.randn(batch_size, *sizes, channels, generator=generator),
            "encoder_hidden_states": torch.randn(*text, generator=generator),
            "timestep": 1000 * torch.rand(batch_size, generator=generator),
            "pooled_projections": torch.randn(batch_size, config.in_text_dim2, generator=generator),
            "visual_rope_pos": tuple(torch.arange(tokens) for tokens in grid),
            "text_rope_pos": torch.arange(_TEXT_TOKENS),
        }


def _send_grid(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments:
    """Put the grid into the parameters of sparse attention, which blocks are handed as they are."""
    position = 7
    given = args[position] if len(args) > position else kwargs.get(_SPARSE)
    latents = args[0] if args else kwargs["hidden_states"]
    grid = token_grid(latents.shape[1:4], model.latents_per_token)
    added = {"to_fractal": False, **(given or {}), "grid": latents.new_empty(*grid, 0)}
    if len(args) > position:
        return (*args[:position], added, *args[position + 1 :]), kwargs
    return args, {**kwargs, _SPARSE: added}

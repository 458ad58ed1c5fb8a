"""HunyuanDiT: images of texts in Chinese and English."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import HunyuanDiT2DModel
from diffusers.models.embeddings import get_2d_rotary_pos_embed
from torch import Tensor

from .families import SquareSampleMixin, square_grid
from .grid import Grid, in_tables, token_grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

_NAMES = {
    "encoder_attention_mask": "text_embedding_mask", "encoder_hidden_states_2": "encoder_hidden_states_t5",
    "encoder_attention_mask_2": "text_embedding_mask_t5",
}  # fmt: skip
# In pixels: the size that positions are of, and the one that the pipeline says pictures had at first.
_BASE, _ORIGINAL_SIZE = 512, (1024, 1024)


class MHLAHunyuanDiT2DModel(SquareSampleMixin, HunyuanDiT2DModel):
    """HunyuanDiT with MHLA, plain linear or softmax attention in each layer, on latents of any shape.

    Takes every argument of :class:`diffusers.HunyuanDiT2DModel` and two more. Its registered config rebuilds
    it. Rotary positions turn the numerators alone, and queries and keys of a softmax window; the norms of
    queries and keys and the long skip connections stay. Cross-attention to text stays softmax.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    vae_stride = (8, 8)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "HunyuanDiT-v1.2": {
            "in_channels": 4, "patch_size": 2, "sample_size": 128, "hidden_size": 1408, "num_layers": 40,
            "mlp_ratio": 4.3637, "use_style_cond_and_image_meta_size": False,
        }
    }  # fmt: skip
    time_in_dtype = True
    block_list = "blocks"
    uncalled = ("pooler",)
    argument_names = {"image_rotary_emb": "rotary_emb"}  # noqa: RUF012
    _repeated_blocks = ["HunyuanDiTBlock"]  # noqa: RUF012

    @after(HunyuanDiT2DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
    ) -> None:
        plan = self.plan_layers(attention, mhla_config, stock["num_layers"], square_grid(stock))
        self.build(stock, plan)
        self.send_grid("image_rotary_emb", in_tables)

    @classmethod
    def with_depth(cls, arguments: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        if num_layers % 2 and num_layers > 1:
            raise ValueError(
                f"HunyuanDiT has 1 layer or an even number, as the first are handed on to the last, got "
                f"{num_layers}"
            )
        return {**arguments, "num_layers": num_layers}

    @property
    def predicted_channels(self) -> int:
        return self.out_channels

    @property
    def text_shapes(self) -> tuple[tuple[int, int], ...]:
        config = self.config
        second = (config.text_len_t5, config.cross_attention_dim_t5)
        return (config.text_len, config.cross_attention_dim), second

    def denoising_arguments(
        self, samples: Tensor, timestep: Tensor, conditions: Mapping[str, Any]
    ) -> dict[str, Any]:
        named = {_NAMES.get(name, name): value for name, value in conditions.items()}
        return super().denoising_arguments(samples, timestep, {**self._size_arguments(samples), **named})

    def _size_arguments(self, samples: Tensor) -> dict[str, Any]:
        """Positions and sizes as the pipeline gives them by default, for latents ``[B, C, H, W]``."""
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid

        grid = token_grid(samples.shape[2:], self.latents_per_token)
        region = get_resize_crop_region_for_grid(grid, _BASE // self.vae_stride[0] // self.config.patch_size)
        head_dim, device = self.config.attention_head_dim, samples.device
        given = {"image_rotary_emb": get_2d_rotary_pos_embed(head_dim, region, grid, device=device)}
        if self.config.use_style_cond_and_image_meta_size:  # of version 1.1 and before
            pixels = [side * stride for side, stride in zip(samples.shape[2:], self.vae_stride, strict=True)]
            size = torch.tensor([*_ORIGINAL_SIZE, *pixels, 0, 0], dtype=samples.dtype, device=device)
            given["image_meta_size"] = size.repeat(len(samples), 1)
            given["style"] = torch.zeros(len(samples), dtype=torch.long, device=device)
        return given

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        config = self.config
        sizes = [tokens * config.patch_size for tokens in grid]
        inputs: dict[str, Any] = {
            "hidden_states": torch.randn(batch_size, config.in_channels, *sizes, generator=generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator).float(),
            "image_rotary_emb": get_2d_rotary_pos_embed(config.attention_head_dim, ((0, 0), grid), grid),
        }
        for suffix, (tokens, width) in zip(("", "_t5"), self.text_shapes, strict=True):
            text = torch.randn(batch_size, tokens, width, generator=generator)
            # Half of it is filled up, which is what the model has an embedding for.
            mask = (torch.arange(tokens) < tokens // 2).long().expand(batch_size, -1)
            inputs |= {f"encoder_hidden_states{suffix}": text, f"text_embedding_mask{suffix}": mask}
        if config.use_style_cond_and_image_meta_size:
            pixels = [size * stride for size, stride in zip(sizes, self.vae_stride, strict=True)]
            inputs["image_meta_size"] = torch.tensor([[*pixels, *pixels, 0, 0]] * batch_size).float()
            inputs["style"] = torch.zeros(batch_size, dtype=torch.long)
        return inputs

"""A tiny model of every backbone. A new one gets an entry in CASES, and with it every test of this folder.

Weights are nowhere zero, so that every part of a model shows in its output.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mhla_diffusion import (
    MHLAAllegroTransformer3DModel,
    MHLAAnyFlowTransformer3DModel,
    MHLAChronoEditTransformer3DModel,
    MHLACosmosTransformer3DModel,
    MHLADiTTransformer2DModel,
    MHLAHunyuanDiT2DModel,
    MHLAKandinsky5Transformer3DModel,
    MHLALatteTransformer3DModel,
    MHLALTXVideoTransformer3DModel,
    MHLALuminaNextDiT2DModel,
    MHLAPixArtTransformer2DModel,
    MHLAQwenImageTransformer2DModel,
    MHLASanaTransformer2DModel,
    MHLASanaVideoTransformer3DModel,
    MHLASkyReelsV2Transformer3DModel,
    MHLAWanAnimateTransformer3DModel,
    MHLAWanTransformer3DModel,
    MHLAWanVACETransformer3DModel,
)

Grid = tuple[int, ...]

# Every part that a linear layer can have.
EVERY_PART: dict[str, Any] = {
    "gate": True, "output_norm": True, "qk_norm": True, "qk_conv": True, "cpe": "zero",
    "local": "auto",
}  # fmt: skip

LEARNED: dict[str, Any] = {
    "feature_map": "hedgehog", "center_keys": True, "local": "shared", "local_margin": 1,
    "mixing_relative": True, "mixing_content": True,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A backbone, the arguments of a tiny one, and grids to call it on.

    Args:
        model: our class.
        settings: arguments of the stock class.
        grids: the first is the one that the model is made for; the others are wide, tall and ragged.
        blocks: 4, along each axis.
        own: further arguments of our class.
        projections: of queries and values.
        keeps_float32: whether the stock class runs in another dtype only with what it keeps in float32.
    """

    model: type[Any]
    settings: dict[str, Any]
    grids: tuple[Grid, ...]
    blocks: Grid
    own: dict[str, Any] = field(default_factory=dict)
    projections: tuple[str, str] = ("to_q", "to_v")
    keeps_float32: bool = False

    @property
    def name(self) -> str:
        return re.split("Transformer|2DModel", self.model.__name__.removeprefix("MHLA"))[0]

    @property
    def layers(self) -> str:
        return self.model.block_list

    @property
    def stock_kind(self) -> str:
        return self.model.stock_attention

    def attention(self, block: Any) -> Any:
        """The self-attention of a block."""
        return getattr(block, self.model.attention_name)

    def stock(self, **settings: Any) -> Any:
        model = self.model.stock(**self._arguments(settings))
        randomize(model)
        return model.eval()

    def config(self, **mhla: Any) -> dict[str, Any]:
        return {"blocks": list(self.blocks), **mhla}

    def make(self, *, mhla: dict[str, Any] | None = None, **settings: Any) -> Any:
        """Our model in eval mode; ``mhla`` are settings beside the blocks."""
        ours = {**self.own, "mhla_config": self.config(**(mhla or {}))}
        model = self.model(**{**ours, **self._arguments(settings)})
        randomize(model)
        return model.eval()

    def cast(self, model: Any, dtype: torch.dtype) -> None:
        """Cast a model, in place."""
        model.to(dtype)
        kept = set(self.model._keep_in_fp32_modules if self.keeps_float32 else ())
        for name, module in model.named_modules():
            if kept & set(name.split(".")):
                module.float()

    def _arguments(self, settings: dict[str, Any]) -> dict[str, Any]:
        arguments = {**self.settings, **settings}
        layers = settings.get("num_layers")
        if layers is None:
            return arguments
        del arguments["num_layers"]
        return self.model.with_depth(arguments, layers)

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Arguments of :meth:`make` for each kind of layer."""
        return {
            "mhla": {"mhla": EVERY_PART},
            "softmax logits": {"mhla": {"constraint": "softmax", "mixing_per_head": True}},
            # Tokens that lie on no grid have no offset.
            "learned features and a window": {
                "mhla": {**LEARNED, "mixing_relative": not self.model.extra_tokens}
            },
            "linear": {"attention": "linear", "mhla": {"gate": self.stock_kind == "softmax"}},
            "hybrid": {"attention": [self.stock_kind, "mhla"]},
            "stock": {"attention": self.stock_kind},
        }

    def inputs(
        self, model: Any, grid: Grid | None = None, *, dtype: torch.dtype = torch.float32, batch_size: int = 2
    ) -> dict[str, Any]:
        """Arguments of the forward, the same for the same grid."""
        grid = grid or self.grids[0]
        generator = torch.Generator().manual_seed(sum(grid))
        inputs = (
            self.model.example_inputs(model, grid, batch_size=batch_size, generator=generator)
            if isinstance(model, self.model)
            else self.make().example_inputs(grid, batch_size=batch_size, generator=generator)
        )
        return {name: self._cast(name, value, dtype) for name, value in inputs.items()}

    def _cast(self, name: str, value: Any, dtype: torch.dtype) -> Any:
        if not (isinstance(value, Tensor) and value.is_floating_point()):
            return value
        if "timestep" not in name:
            return value.to(dtype)
        # Rounded the same way for every dtype, so that outputs can be compared.
        return value.half().bfloat16().to(dtype) if self.model.time_in_dtype else value


def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("processor.mixing"):
            nn.init.uniform_(parameter, 0.1, 0.9)
        else:
            nn.init.normal_(parameter, std=0.2)


def sample(model: Any, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs, return_dict=False)
    return output if isinstance(output, Tensor) else output[0]  # Kandinsky's is no tuple


IMAGE_GRIDS: tuple[Grid, ...] = ((4, 4), (2, 8), (8, 2), (3, 5))
VIDEO_GRIDS: tuple[Grid, ...] = ((3, 4, 4), (2, 2, 8), (4, 6, 2), (3, 3, 5))
VIDEO: dict[str, Any] = {"grids": VIDEO_GRIDS, "blocks": (1, 2, 2), "own": {"sample_grid": (3, 4, 4)}}
WAN: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 4, "num_layers": 2,
    "text_dim": 10, "freq_dim": 16, "ffn_dim": 40,
}  # fmt: skip
SANA: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 3, "num_layers": 2,
    "num_cross_attention_heads": 2, "cross_attention_head_dim": 12, "cross_attention_dim": 24,
    "caption_channels": 10,
}  # fmt: skip

CASES = {
    case.name: case
    for case in (
        Case(
            MHLADiTTransformer2DModel,
            {
                "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "out_channels": 6,
                "num_layers": 2, "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5,
            },
            grids=IMAGE_GRIDS,
            blocks=(2, 2),
        ),
        Case(
            MHLAPixArtTransformer2DModel,
            {
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 6,
                "num_layers": 2, "sample_size": 8, "cross_attention_dim": 24, "caption_channels": 10,
            },
            grids=IMAGE_GRIDS,
            blocks=(2, 2),
        ),
        Case(
            MHLAQwenImageTransformer2DModel,
            {
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 12, "out_channels": 3,
                "num_layers": 2, "joint_attention_dim": 10, "axes_dims_rope": (4, 4, 4),
            },
            grids=IMAGE_GRIDS,
            blocks=(2, 2),
            own={"sample_grid": (4, 4)},
        ),
        Case(MHLASanaTransformer2DModel, {**SANA, "sample_size": 4}, grids=IMAGE_GRIDS, blocks=(2, 2)),
        Case(MHLAWanTransformer3DModel, WAN, **VIDEO),
        Case(MHLASkyReelsV2Transformer3DModel, WAN, **VIDEO),
        Case(MHLAChronoEditTransformer3DModel, WAN, **VIDEO),
        Case(MHLAAnyFlowTransformer3DModel, {**WAN, "in_channels": 4}, **VIDEO),
        Case(
            MHLAWanAnimateTransformer3DModel,
            {
                **WAN, "in_channels": 10, "latent_channels": 3, "image_dim": None,
                "inject_face_latents_blocks": 1, "motion_encoder_size": 8, "motion_style_dim": 8,
                "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8,
                "face_encoder_num_heads": 2, "motion_encoder_channel_sizes": {"4": 4, "8": 4},
            },
            **VIDEO,
        ),
        Case(
            MHLAWanVACETransformer3DModel,
            {**WAN, "vace_layers": [0], "vace_in_channels": 5},
            **VIDEO,
        ),
        Case(MHLASanaVideoTransformer3DModel, SANA, **VIDEO),
        Case(
            MHLALatteTransformer3DModel,
            {
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 6,
                "num_layers": 2, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 24,
                "caption_channels": 10, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
                "attention_bias": True, "activation_fn": "gelu-approximate", "video_length": 3,
            },
            grids=IMAGE_GRIDS,
            blocks=(2, 2),
        ),
        Case(
            MHLALuminaNextDiT2DModel,
            {
                "num_attention_heads": 2, "num_kv_heads": 1, "hidden_size": 24, "in_channels": 3,
                "num_layers": 2, "sample_size": 8, "multiple_of": 8, "cross_attention_dim": 10,
            },
            grids=IMAGE_GRIDS,
            blocks=(2, 2),
        ),
        Case(
            MHLAHunyuanDiT2DModel,
            {
                "num_attention_heads": 2, "attention_head_dim": 12, "hidden_size": 24, "in_channels": 3,
                "num_layers": 2, "sample_size": 8, "patch_size": 2, "cross_attention_dim": 10,
                "cross_attention_dim_t5": 16, "pooled_projection_dim": 8, "text_len": 4, "text_len_t5": 6,
            },
            grids=IMAGE_GRIDS,
            blocks=(2, 2),
        ),
        Case(
            MHLACosmosTransformer3DModel,
            {
                "num_attention_heads": 2, "attention_head_dim": 24, "in_channels": 3, "out_channels": 4,
                "num_layers": 2, "text_embed_dim": 10, "adaln_lora_dim": 8, "max_size": (8, 40, 40),
            },
            **VIDEO,
        ),
        Case(
            MHLAKandinsky5Transformer3DModel,
            {
                "in_visual_dim": 3, "out_visual_dim": 3, "in_text_dim": 10, "in_text_dim2": 6, "time_dim": 8,
                "model_dim": 24, "ff_dim": 40, "num_text_blocks": 1, "num_visual_blocks": 2,
                "axes_dims": [4, 4, 4],
            },
            **VIDEO,
            projections=("to_query", "to_value"),
            keeps_float32=True,
        ),
        Case(
            MHLAAllegroTransformer3DModel,
            {
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 3,
                "num_layers": 2, "cross_attention_dim": 24, "caption_channels": 10, "sample_frames": 3,
                "sample_height": 8, "sample_width": 8,
            },
            grids=VIDEO_GRIDS,
            blocks=(1, 2, 2),
        ),
        Case(
            MHLALTXVideoTransformer3DModel,
            {
                "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 3, "out_channels": 3,
                "num_layers": 2, "cross_attention_dim": 24, "caption_channels": 10,
            },
            **VIDEO,
        ),
    )
}  # fmt: skip

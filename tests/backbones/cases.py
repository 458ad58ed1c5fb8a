"""A tiny model of every backbone. A new one gets an entry in CASES, and with it every test of this folder.

Weights are nowhere zero, so that every part of a model shows in its output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mhla_diffusion import (
    MHLAChronoEditTransformer3DModel,
    MHLADiTTransformer2DModel,
    MHLALTXVideoTransformer3DModel,
    MHLAPixArtTransformer2DModel,
    MHLAQwenImageTransformer2DModel,
    MHLASanaTransformer2DModel,
    MHLASanaVideoTransformer3DModel,
    MHLASkyReelsV2Transformer3DModel,
    MHLAWanTransformer3DModel,
    MHLAWanVACETransformer3DModel,
)

Grid = tuple[int, ...]

# Every part that a linear layer can have.
EVERY_PART: dict[str, Any] = {"gate": True, "output_norm": True, "qk_norm": True, "cpe": "zero"}

LEARNED: dict[str, Any] = {
    "feature_map": "hedgehog", "center_keys": True, "local": "shared", "mixing_relative": True,
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
        layers: name of the list of blocks.
    """

    model: type[Any]
    settings: dict[str, Any]
    grids: tuple[Grid, ...]
    blocks: Grid
    own: dict[str, Any] = field(default_factory=dict)
    layers: str = "transformer_blocks"

    @property
    def name(self) -> str:
        return self.model.__name__.removeprefix("MHLA").partition("Transformer")[0]

    @property
    def stock_kind(self) -> str:
        return self.model.stock_attention

    def attention(self, block: Any) -> Any:
        """The self-attention of a block."""
        return getattr(block, self.model.attention_name)

    def stock(self, **settings: Any) -> Any:
        model = self.model.stock(**{**self.settings, **settings})
        randomize(model)
        return model.eval()

    def config(self, **mhla: Any) -> dict[str, Any]:
        return {"blocks": list(self.blocks), **mhla}

    def make(self, *, mhla: dict[str, Any] | None = None, **settings: Any) -> Any:
        """Our model in eval mode; ``mhla`` are settings beside the blocks."""
        arguments = {**self.settings, **self.own, "mhla_config": self.config(**(mhla or {})), **settings}
        model = self.model(**arguments)
        randomize(model)
        return model.eval()

    def kinds(self) -> dict[str, dict[str, Any]]:
        """Arguments of :meth:`make` for each kind of layer."""
        return {
            "mhla": {"mhla": EVERY_PART},
            "softmax logits": {"mhla": {"constraint": "softmax", "mixing_per_head": True}},
            "learned features and a window": {"mhla": LEARNED},
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
        return {
            name: value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point() and name != "timestep"
            else value
            for name, value in inputs.items()
        }


def randomize(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if name.endswith("processor.mixing"):
            nn.init.uniform_(parameter, 0.1, 0.9)
        else:
            nn.init.normal_(parameter, std=0.2)


def sample(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs, return_dict=False)[0]


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
        Case(MHLAWanTransformer3DModel, WAN, **VIDEO, layers="blocks"),
        Case(MHLASkyReelsV2Transformer3DModel, WAN, **VIDEO, layers="blocks"),
        Case(MHLAChronoEditTransformer3DModel, WAN, **VIDEO, layers="blocks"),
        Case(
            MHLAWanVACETransformer3DModel,
            {**WAN, "vace_layers": [0], "vace_in_channels": 5},
            **VIDEO,
            layers="blocks",
        ),
        Case(MHLASanaVideoTransformer3DModel, SANA, **VIDEO),
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

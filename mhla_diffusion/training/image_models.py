"""Transformers of images: which are trained, their shape in a config, and whether they fit a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..backbones import (
    MHLADiTTransformer2DModel,
    MHLAPixArtTransformer2DModel,
    MHLASanaTransformer2DModel,
)
from ..config import MHLAConfig
from .config import require_shape_or_init_from
from .objectives import Objective
from .run import new_or_loaded, require_patches
from .stock import IMAGES, require_fit, trained_class
from .text import CaptionEncoder

NEW_IMAGES: dict[str, Any] = {
    "dit": MHLADiTTransformer2DModel,
    "pixart": MHLAPixArtTransformer2DModel,
    "sana": MHLASanaTransformer2DModel,
}


@dataclass(frozen=True)
class ModelConfig:
    """Transformer: either ``init_from``, or a shape for a new one.

    Args:
        init_from: folder or hub id of an MHLA pipeline or transformer to go on training, such as
            mhla convert writes; of Lumina-Next, HunyuanDiT and Qwen-Image too, which have no shape here.
        backbone: of a new one: ``"dit"`` (default), of classes; ``"pixart"`` or ``"sana"``, of texts.
        sample_size: side of the image or latent.
        patch_size: side of a token.
        in_channels: 1 or 3 for pixels, the autoencoder's for latents.
        num_layers, num_attention_heads, attention_head_dim: of the transformer.
        num_embeds_ada_norm: of dit, number of classes; the null class is one more.
        size_conditions: of pixart, tell it the resolution and the aspect ratio, as alpha at 1024 pixels; its
            own default if not given.
        dropout: of the feed-forward layers; 0 by default.
        attention: ``"mhla"`` (default), ``"linear"`` or, but for sana, ``"softmax"``, for all layers or as a
            list.
        mhla: see :class:`MHLAConfig`; its defaults if not given.

    Raises:
        ValueError: when the shape is not complete, is given beside ``init_from``, or is another backbone's.
    """

    init_from: str | None = None
    backbone: Literal["dit", "pixart", "sana"] | None = None
    sample_size: int | None = None
    patch_size: int | None = None
    in_channels: int | None = None
    num_layers: int | None = None
    num_attention_heads: int | None = None
    attention_head_dim: int | None = None
    num_embeds_ada_norm: int | None = None
    size_conditions: bool | None = None
    dropout: float | None = None
    attention: str | tuple[str, ...] | None = None
    mhla: MHLAConfig | None = None

    def __post_init__(self) -> None:
        name = self.backbone or "dit"
        others = {"num_embeds_ada_norm": "dit", "size_conditions": "pixart"}
        optional = ["backbone", "size_conditions", "dropout", "attention", "mhla"]
        require_shape_or_init_from(self, optional + ["num_embeds_ada_norm"] * (name != "dit"))
        for field, taker in others.items():
            if self.init_from is None and getattr(self, field) is not None and name != taker:
                raise ValueError(f"model.{field} is for model.backbone {taker} alone, got {name}; remove it")

    @property
    def model_class(self) -> Any:
        """Class of the model.

        Raises:
            ValueError: when ``init_from`` holds another model.
        """
        if self.init_from is None:
            return NEW_IMAGES[self.backbone or "dit"]
        return trained_class(self.init_from, [*NEW_IMAGES.values(), *IMAGES], "images")


def takes_texts(model_class: Any) -> bool:
    """Tell models of texts from those of classes."""
    return model_class is not MHLADiTTransformer2DModel


def build_model(config: ModelConfig, objective: Objective, *, encoders: Sequence[CaptionEncoder] = ()) -> Any:
    """Build a new transformer, or load the one that ``init_from`` names, in fp32.

    Args:
        config: of the model.
        objective: of the run.
        encoders: of its texts; none for a model of classes.

    Raises:
        ValueError: when a loaded model does not have the output channels that the objective needs, or takes
            text of another width.
    """
    arguments: dict[str, Any] = {"out_channels": objective.out_channels(config.in_channels or 0)}
    if config.init_from is None and encoders:
        arguments |= _text_arguments(config, encoders[0].width)
    model = new_or_loaded(config.model_class, config, without=("backbone", "size_conditions"), **arguments)
    require_fit(model, objective, encoders, config.init_from)
    return model


def _text_arguments(config: ModelConfig, text_dim: int) -> dict[str, Any]:
    """Arguments of a new model of texts: its cross-attention is as wide as itself."""
    heads, head_dim = config.num_attention_heads or 0, config.attention_head_dim or 0
    arguments: dict[str, Any] = {"caption_channels": text_dim, "cross_attention_dim": heads * head_dim}
    if config.backbone == "sana":
        return arguments | {"num_cross_attention_heads": heads, "cross_attention_head_dim": head_dim}
    if config.size_conditions and heads * head_dim % 3:
        raise ValueError(
            "model.size_conditions needs a width, num_attention_heads x attention_head_dim, that 3 divides, "
            f"got {heads} x {head_dim}"
        )
    return arguments | {"use_additional_conditions": config.size_conditions}


def require_sizes(model: Any, sizes: Sequence[tuple[int, ...]]) -> None:
    """Check that a model takes samples of these heights and widths.

    Raises:
        ValueError: when a patch does not divide one.
    """
    require_patches((model.config.patch_size,) * 2, sizes)

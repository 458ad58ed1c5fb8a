"""Stock models into MHLA models."""

from __future__ import annotations

from typing import Any

from diffusers import ModelMixin
from transformers import PreTrainedModel

from ..domains.pretrained import convert
from .layer_plan import AttentionChoice, ConfigChoice, with_window_of
from .rebuild import rebuild, require_plain_weights
from .registry import backbone_of, stock_names


def convert_to_mhla(
    model: ModelMixin | PreTrainedModel,
    config: ConfigChoice = None,
    *,
    attention: AttentionChoice = "mhla",
    output_loading_info: bool = False,
) -> Any:
    """Put MHLA into the layers of a stock model that ``config.layers`` names (all by default).

    Returns another model that has the same weights, in their dtypes and on their device: they are taken over,
    not copied, so that a large model is converted in the memory that it has. Whoever goes on with both
    converts ``copy.deepcopy(model)``. The mixing matrices and what else the config asks for are new and at
    their start. The result is not the same function: it is a start for fine-tuning.

    Args:
        model: of a class that has an MHLA form, or an MHLA model to be given another config. Then mixing
            matrices carry over too, resized to the new blocks, and so do the convolutions, norms and gates
            that both configs ask for; a config that says nothing of a softmax window keeps the model's. Of
            transformers: a stock ViT, DeiT, DINOv2 or Llama.
        config: an :class:`MHLAConfig` or its dict, as stored (without ``local`` it has no window), or one for
            each layer (not for transformers).
        attention: of all layers that ``config.layers`` names or, as a list, of each layer. For transformers
            ``"mhla"`` or ``"linear"``.
        output_loading_info: also return ``{"new": [...], "dropped": [...]}``, names of weights.

    Returns:
        The MHLA model, or the model and the names.

    Raises:
        ValueError: for a model that there is no MHLA form of or whose weights are not there to be taken
            (offloaded, fused, with adapters, cast layer by layer), or a config that does not fit it.
    """
    if isinstance(model, PreTrainedModel):
        require_plain_weights(model)
        converted, info = convert(model, config, attention=attention)
        return (converted, info) if output_loading_info else converted
    target = backbone_of(model)
    if target is None:
        inside = " (of a pipeline: give pipe.transformer)" if hasattr(model, "transformer") else ""
        raise ValueError(
            f"no MHLA form of {type(model).__name__}{inside}; those that have one: {stock_names()}"
        )
    config = with_window_of(model.config, config)
    converted, info = rebuild(model, target, attention=attention, mhla_config=config)
    return (converted, info) if output_loading_info else converted

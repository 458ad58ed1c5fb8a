"""Vision transformers of transformers with MHLA: ViT, DeiT and DINOv2 on any grid of patches.

MHLA is an attention function of transformers, ``"mhla"``: layers and models are the stock ones, whose
attention layers hold a module :class:`mhla_diffusion.MHLA` beside their projections.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
from transformers.modeling_utils import AttentionInterface

from ..attention import MHLA
from .pretrained import PretrainedMHLA, make_models, settings_of


class VisionMHLA(PretrainedMHLA):
    """Base of the vision transformers.

    The class token, and what else stands before the patches, is a block of its own (``extra_block`` of the
    config, always true but for ``blocks=1``, plain linear attention). Pictures may have any size: position
    embeddings are interpolated as the stock model does, and the blocks follow the grid.

    Args:
        config: see :class:`MHLAViTConfig`; its ``image_size`` is the grid that the model starts with.

    Raises:
        ValueError: for settings that do not fit, and for another ``attn_implementation``.
    """

    def __init__(self, config: Any, *args: Any, **settings: Any) -> None:
        chosen = settings_of(config)
        chosen = settings_of(config, extra_block=chosen.blocks not in (1, (1, 1)))
        if chosen.extra_block and chosen.normalizer == "official":
            raise ValueError(
                'normalizer="official" needs equal blocks, and the class token is a block of its own here: '
                'take "paper", or blocks=1'
            )
        super().__init__(config, *args, **settings)  # type: ignore[call-arg]
        heads, width = config.num_attention_heads, config.hidden_size
        kind = self._can_record_outputs["attentions"]  # type: ignore[attr-defined]
        layers = [module for module in self.modules() if isinstance(module, kind)]  # type: ignore[attr-defined]
        grid = _grid(_pair(config.image_size), config)
        for index in range(len(layers)) if chosen.layers is None else chosen.layers:
            layers[index].mhla = MHLA(
                chosen, heads=heads, head_dim=width // heads, grid=grid, query_dim=width
            )
            layers[index].register_forward_pre_hook(_prepare_layer, with_kwargs=True)
        self.register_forward_pre_hook(_send_grid, with_kwargs=True)  # type: ignore[attr-defined]

    def get_correct_attn_implementation(self, requested: str | None, is_init_check: bool = False) -> str:
        """Return ``"mhla"``; layers without MHLA are those of ``"sdpa"``."""
        if requested not in (None, "mhla", "sdpa"):
            raise ValueError(
                f"attn_implementation is mhla here (sdpa in layers that mhla_config.layers leaves out), got "
                f"{requested!r}: leave it out"
            )
        return "mhla"


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    grid: tuple[int, int] | None = None,
    gated: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention function of transformers: ``[B, H, N, d]`` to ``[B, N, H, d]``; the mask is ``[B, N]``."""
    mask = None if attention_mask is None else attention_mask.bool()
    if not hasattr(module, "mhla"):
        sdpa = AttentionInterface()["sdpa"]
        return sdpa(module, query, key, value, None if mask is None else mask[:, None, None], **settings)
    if grid is None:
        raise ValueError(
            "MHLA needs the grid of the patches: call the model, or pass grid=(rows, columns) to its parts"
        )
    extra = (query.shape[2] - math.prod(grid), 0)
    out = module.mhla(query, key, value, grid=grid, extra=extra, hidden_states=gated, key_mask=mask)
    return out.unflatten(-1, (query.shape[1], -1)), None


AttentionInterface.register("mhla", _attend)
AttentionMaskInterface.register("mhla", flash_attention_mask)


def _prepare_layer(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Hand the hidden states on to the gate, which the attention function is not given."""
    if layer.config._attn_implementation != "mhla":
        raise ValueError(
            f"a part of this model was set to {layer.config._attn_implementation!r}, which would leave MHLA "
            "out: set_attn_implementation('mhla') brings it back"
        )
    if layer.mhla.gate is not None:
        kwargs = {**kwargs, "gated": args[0] if args else kwargs["hidden_states"]}
    return args, kwargs


def _send_grid(
    model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add the grid of a picture to what the layers are given, and have position embeddings fit it."""
    pixels = args[0] if args else kwargs.get("pixel_values")
    if pixels is None:
        return args, kwargs
    size = tuple(pixels.shape[-2:])
    kwargs = {**kwargs, "grid": _grid(size, model.config)}
    if size != _pair(model.config.image_size) and _interpolates_when_asked(model):
        kwargs.setdefault("interpolate_pos_encoding", True)
    return args, kwargs


def _interpolates_when_asked(model: Any) -> bool:
    return "interpolate_pos_encoding" in inspect.signature(model.forward).parameters


def _grid(size: tuple[int, int], config: Any) -> tuple[int, int]:
    patch = _pair(config.patch_size)
    return size[0] // patch[0], size[1] // patch[1]


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


globals().update(make_models("vision", VisionMHLA))

"""What the models with MHLA have in common: which layer has which attention, loading, parallelism."""

from __future__ import annotations

import dataclasses
import logging
import os
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

from diffusers import ModelMixin, TensorParallelConfig

from ..attention import MHLA, MHLAConfig
from ..hub import hub_arguments
from ..ops import recommended_layout
from .processors import MHLAAttnProcessor
from .rebuild import rebuild

logger = logging.getLogger(__name__)

ATTENTIONS = ("mhla", "linear", "softmax")


class MHLAModelMixin(ModelMixin):
    """Stands before a diffusers model class whose config has ``attention`` and ``mhla_config``.

    ``layer_attention`` says which attention each layer has; :meth:`_build_attention` sets it.

    ``_stock_attention`` is the attention of the stock class: ``"softmax"``, or ``"linear"``.
    """

    _stock_class: ClassVar[str]
    _stock_attention: ClassVar[str] = "softmax"
    layer_attention: list[str]

    def _build_attention(
        self,
        attentions: Sequence[Any],
        attention: str | Sequence[str],
        mhla_config: MHLAConfig,
        *,
        heads: int,
        head_dim: int,
        grid: tuple[int, ...],
    ) -> None:
        """Put MHLA into the layers that ``attention`` and ``mhla_config.layers`` name, and register both."""
        stock = self._stock_attention
        self.layer_attention = layer_attention(attention, mhla_config.layers, len(attentions), stock=stock)
        for layer, kind in zip(attentions, self.layer_attention, strict=True):
            if kind != stock:
                config = mhla_config if kind == "mhla" else dataclasses.replace(mhla_config, blocks=1)
                layer.set_processor(MHLAAttnProcessor(config, heads=heads, head_dim=head_dim, grid=grid))
        self.register_to_config(
            attention=attention if isinstance(attention, str) else list(attention),
            mhla_config=mhla_config.to_dict(),
        )

    @property
    def mixing_blocks(self) -> tuple[int, ...]:
        """Blocks along each axis, or ones where no layer mixes."""
        modules = [module for module in self.modules() if isinstance(module, MHLA)]
        mixing = [module.blocks for module in modules if module.mixing is not None]
        return next(iter(mixing or [module.blocks for module in modules]), (1, 1))

    def enable_parallelism(self, *, config: Any, cp_plan: dict[str, Any] | None = None) -> None:
        """As :meth:`diffusers.ModelMixin.enable_parallelism`, for linear attention in all layers.

        With a :class:`diffusers.ContextParallelConfig` each rank holds a share of the tokens. Whatever its
        degrees are called, ranks exchange key/value summaries only, see
        :func:`mhla_diffusion.ops.mhla_parallel`. Token numbers that the ranks do not divide need
        ``ulysses_anything=True``.

        Raises:
            ValueError: for layers with softmax attention, a convolution on v, or the normalizer
                ``"official"``, which need the tokens of other ranks.
        """
        if getattr(config, "context_parallel_config", config) and not isinstance(
            config, TensorParallelConfig
        ):
            self._check_context_parallel()
        super().enable_parallelism(config=config, cp_plan=cp_plan)

    def _check_context_parallel(self) -> None:
        mhla = [module for module in self.modules() if isinstance(module, MHLA)]
        if len(mhla) < len(self.layer_attention) or any(
            module.cpe is not None or module.config.normalizer == "official" for module in mhla
        ):
            raise ValueError(
                "context parallelism needs linear attention in every layer, without cpe and with normalizer "
                f"'paper' or 'none'; this model has {', '.join(self.layer_attention)} and "
                f"mhla_config {self.config.mhla_config}"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """As :meth:`diffusers.ModelMixin.from_pretrained`, and never with a weight that was not in the file.

        ``mhla_config=`` with other blocks than the file has resizes the mixing matrices
        (:func:`mhla_diffusion.ops.resize_mixing`); ``sample_size=`` changes the grid, and blocks grow or
        shrink with it. Either is logged.

        Raises:
            ValueError: when the checkpoint lacks weights of this model, as a stock DiT checkpoint does: those
                are converted, not loaded.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        place = {"subfolder": kwargs.get("subfolder"), **hub_arguments(kwargs)}
        stored = cls.load_config(pretrained_model_name_or_path, **place)
        resized = _other_blocks(stored.get("mhla_config"), kwargs.get("mhla_config"))
        wanted = kwargs.pop("mhla_config") if resized else None
        try:
            model, info = super().from_pretrained(
                pretrained_model_name_or_path, output_loading_info=True, **kwargs
            )
        except (RuntimeError, ValueError) as error:
            if ".processor.mixing" in str(error):
                raise ValueError(
                    f"{pretrained_model_name_or_path} holds mixing matrices for another number of blocks "
                    "than its config.json says; put the right blocks there, or pass others as mhla_config= "
                    f"to have them resized. ({error})"
                ) from error
            raise
        missing = sorted(info["missing_keys"])
        if resized and not missing:
            blocks = model.mixing_blocks
            model, changed = rebuild(model, cls, mhla_config=wanted)
            logger.warning("mixing matrices resized, blocks %s to %s", blocks, model.mixing_blocks)
            missing = changed["new"]
        if missing:
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {cls.__name__}, first "
                f"{missing[0]}. If it is a stock model, load it with diffusers.{cls._stock_class} and call "
                "mhla_diffusion.convert_to_mhla(model, config), or run scripts/convert.py"
            )
        for name in ("sample_size", "sample_grid"):
            now, then = getattr(model.config, name, None), stored.get(name)
            if then is not None and now != then:
                blocks = model.mixing_blocks
                logger.warning("%s %s in place of %s: the blocks stay %s", name, now, then, blocks)
        return (model, info) if output_loading_info else model


def as_config(mhla_config: MHLAConfig | dict[str, Any] | None) -> MHLAConfig:
    """A config from what a model's argument may be."""
    if mhla_config is None:
        return MHLAConfig()
    return mhla_config if isinstance(mhla_config, MHLAConfig) else MHLAConfig.from_dict(dict(mhla_config))


def _other_blocks(stored: dict[str, Any] | None, wanted: MHLAConfig | dict[str, Any] | None) -> bool:
    if stored is None or wanted is None:
        return False
    return as_config(stored).blocks != as_config(wanted).blocks


def layer_attention(
    attention: str | Sequence[str], layers: tuple[int, ...] | None, num_layers: int, *, stock: str = "softmax"
) -> list[str]:
    """The attention of each layer: ``attention``, and ``stock`` where ``layers`` does not name it.

    Raises:
        ValueError: for an unknown attention, a list of the wrong length, a layer that does not exist, or a
            list together with ``layers``.
    """
    kinds = [attention] * num_layers if isinstance(attention, str) else list(attention)
    known = ATTENTIONS if stock == "softmax" else ("mhla", stock)
    if unknown := sorted(set(kinds) - set(known)):
        raise ValueError(f"attention must be one of {', '.join(known)}, got {', '.join(map(repr, unknown))}")
    if len(kinds) != num_layers:
        raise ValueError(f"attention names {len(kinds)} layers, but the model has {num_layers}")
    if layers is None:
        return kinds
    if not isinstance(attention, str):
        raise ValueError("give attention as a list or mhla_config.layers, not both")
    if outside := [i for i in layers if i >= num_layers]:
        raise ValueError(
            f"mhla_config.layers names layer {outside[0]}, but the layers are 0 to {num_layers - 1}"
        )
    return [kind if i in layers else stock for i, kind in enumerate(kinds)]


def check_blocks(config: MHLAConfig, grid: tuple[int, ...]) -> None:
    """Warn of blocks whose mixing costs more than it should."""
    layout = config.layout(grid)
    if layout.num_blocks**2 > layout.num_tokens:
        warnings.warn(
            f"{layout.num_blocks} blocks on {layout.num_tokens} tokens: mixing costs M^2 = "
            f"{layout.num_blocks**2} > N and is over a third of the attention's work; blocks="
            f"{recommended_layout(grid).blocks} keeps it at 20 % or less on the grid {grid}",
            stacklevel=4,
        )

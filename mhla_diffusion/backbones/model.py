"""What the models with MHLA have in common: attention put into layers, loading, saving, parallelism.

A backbone is one file with one class: see :class:`MHLAModelMixin`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from diffusers import ModelMixin, TensorParallelConfig

from ..attention import MHLA
from ..config import MHLAConfig
from ..hub import hub_arguments
from .adapters import AdapterMixin
from .denoising import DenoisingMixin
from .grid import Grid, receive_grid
from .layer_plan import (
    AttentionChoice,
    ConfigChoice,
    LayerPlan,
    as_configs,
    check_blocks,
    layer_settings,
    with_window_of,
)
from .layers import KeepsMHLA, keep_mhla, mhla_of
from .processors import MHLAAttnProcessor
from .quantised import require_finite_parts
from .rebuild import rebuild, require_plain_weights
from .registry import BACKBONES
from .weight_files import require_first, without_index

logger = logging.getLogger(__name__)

# What configs call the size that a model is made for.
SIZES = ("sample_size", "sample_grid", "sample_frames", "sample_height", "sample_width")


class MHLAModelMixin(DenoisingMixin, ModelMixin, AdapterMixin):
    """Stands before a diffusers model class: ``class MHLAX(MHLAModelMixin, X)`` is the MHLA form of X.

    Such a class enters the registry by itself. Its ``__init__``, decorated with :func:`.stock.after`, plans
    its layers (:meth:`plan_layers`), lets the stock class make everything, and sets them
    (:meth:`set_attention`); it says how the grid reaches the layers (:mod:`.grid`).

    Attributes:
        layer_attention: the attention of each layer.
        stock: the stock class.
        stock_attention: its attention: ``"softmax"``, or ``"linear"``.
        block_list: name of its list of blocks.
        attention_name: of self-attention in a block.
        uncalled: names of modules that read the weights of their linear layers in place of calling these, so
            that adapters beside them would do nothing.
        argument_names: what our processor calls the arguments of a self-attention layer, see
            :func:`.grid.receive_grid`.
        rotary_halves: parts of a head whose halves turn together; 0 where neighbouring channels do.
        old_norm_type: the stock class's ``norm_type`` when all were Transformer2DModel, if it was one.
        extra_tokens: how many tokens beside those of the grid take part in it, such as those of a text, where
            nothing else is said; they are a block of their own (``extra_block`` of the config).
        vae_stride: pixels of a latent along each axis, with the autoencoder that the stock model comes with.
        presets: names of published sizes, for planning, and the arguments of each.
    """

    stock: ClassVar[type[Any]]
    stock_attention: ClassVar[str] = "softmax"
    block_list: ClassVar[str] = "transformer_blocks"
    argument_names: ClassVar[Mapping[str, str | None]] = {}
    rotary_halves: ClassVar[int] = 0
    old_norm_type: ClassVar[str] = ""
    attention_name: ClassVar[str] = "attn1"
    uncalled: ClassVar[tuple[str, ...]] = ()
    extra_tokens: int = 0
    vae_stride: ClassVar[tuple[int, ...]]
    presets: ClassVar[dict[str, dict[str, Any]]] = {}
    layer_attention: list[str]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        stock = next((base for base in cls.__bases__ if not issubclass(base, MHLAModelMixin)), None)
        if stock is not None:
            cls.stock = stock
            BACKBONES[stock] = cls
            # The name under which diffusers records the class in model_index.json, free of our file layout.
            cls.__module__ = "mhla_diffusion"

    @property
    def default_grid(self) -> Grid:
        """Tokens along each axis that the model is made for."""
        return tuple(self.config.sample_grid)

    @property
    def latents_per_token(self) -> Grid:
        """Latents, or pixels, along each axis of a token."""
        patch, time = self.config.patch_size, self.config.get("patch_size_t")
        if isinstance(time, int):
            return (time, patch, patch)
        return (patch,) * len(self.default_grid) if isinstance(patch, int) else tuple(patch)

    @property
    def grids_of_sample(self) -> int:
        """Grids in a sample that self-attention goes over one by one, such as frames."""
        return 1

    @property
    def self_attention(self) -> list[Any]:
        """Self-attention layers that may have MHLA, without those of :meth:`branch_kinds`."""
        return [getattr(block, self.attention_name) for block in getattr(self, self.block_list)]

    @classmethod
    def with_depth(cls, arguments: Mapping[str, Any], num_layers: int) -> dict[str, Any]:
        """Return arguments of the same model with so many layers.

        Raises:
            ValueError: for a number that the model cannot have.
        """
        return {**arguments, "num_layers": num_layers}

    @classmethod
    def plan_layers(
        cls, attention: AttentionChoice, mhla_config: ConfigChoice, num_layers: int, grid: Sequence[int]
    ) -> LayerPlan:
        """Check which attention each layer is to have.

        Raises:
            ValueError: for what does not fit together; the message says what and what to do.
        """
        axes, sizes = len(cls.vae_stride), tuple(grid) if isinstance(grid, Sequence) else ()
        if len(sizes) != axes or any(not isinstance(n, int) or n < 1 for n in sizes):
            raise ValueError(
                f"the grid of {cls.__name__} (sample_grid, where that is given) must be {axes} integers >= "
                f"1, one for each axis, got {grid!r}"
            )
        kinds, configs = layer_settings(attention, mhla_config, num_layers, stock=cls.stock_attention)
        if cls.extra_tokens:
            configs = [dataclasses.replace(config, extra_block=True) for config in configs]
        for config in dict.fromkeys(c for kind, c in zip(kinds, configs, strict=True) if kind == "mhla"):
            check_blocks(config, sizes)
        return LayerPlan(attention, kinds, configs, sizes, not isinstance(mhla_config, (list, tuple)))

    def build(self, stock: dict[str, Any], plan: LayerPlan) -> None:
        """Have the stock class make everything, and set the self-attention of its layers as planned."""
        self.stock.__init__(self, **stock)
        self.set_attention(plan)

    def branch_kinds(self, kinds: Sequence[str]) -> list[str]:
        """Return the attention of self-attention layers beside the main ones, which have ``kinds``."""
        return []

    def set_attention(self, plan: LayerPlan) -> None:
        """Put MHLA into self-attention layers as planned, and register what was asked for."""
        self.layer_attention = plan.kinds
        for number, layer in enumerate(self.self_attention):
            self.set_layer(layer, number, plan)
        self.register_to_config(
            attention=plan.attention if isinstance(plan.attention, str) else list(plan.attention),
            mhla_config=plan.registered,
        )

    def set_layer(self, layer: Any, number: int, plan: LayerPlan) -> None:
        """Put the attention of layer ``number`` into one self-attention layer."""
        kind, config = plan.kinds[number], plan.configs[number]
        layer.layer_number = number  # for who goes over the layers, whatever they are called
        if kind != self.stock_attention:
            if kind == "linear":
                config = config.linear()
            processor = MHLAAttnProcessor(
                config, heads=layer.heads, head_dim=layer.inner_dim // layer.heads, grid=plan.grid,
                query_dim=layer.to_q.in_features,
            )  # fmt: skip
            layer.set_processor(processor)
            keep_mhla(layer)
        layer.rotary_halves = self.rotary_halves
        receive_grid(layer, self.argument_names)

    def set_attn_processor(self, processor: Any) -> None:
        """Set the processor of every attention layer but those with MHLA; of all layers by a dict of names.

        Otherwise what diffusers does with one processor for all, as in ``fuse_qkv_projections``, would take
        the MHLA layers and their weights away.
        """
        if not isinstance(processor, dict):
            processor = {
                name: known if mhla_of(known) is not None else processor
                for name, known in self.attn_processors.items()
            }
        super().set_attn_processor(processor)

    # Pipelines look at the signature for what they may hand on.
    @functools.wraps(ModelMixin.save_pretrained, assigned=())
    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as :meth:`diffusers.ModelMixin.save_pretrained` does, never what does not load again.

        Raises:
            ValueError: when a layer has lost its MHLA, or weights lie in adapters, and for a folder from
                which others would be loaded.
        """
        stock = inspect.signature(ModelMixin.save_pretrained)
        given = stock.bind(self, save_directory, *args, **kwargs)
        given.apply_defaults()
        form = {name: given.arguments[name] for name in ("variant", "safe_serialization")}
        require_first(Path(save_directory), **form)
        require_plain_weights(self, fused=True)
        for name, module in self.named_modules():
            if isinstance(module, KeepsMHLA) and not isinstance(module.processor, MHLA):
                found = type(module.processor).__name__
                raise ValueError(
                    f"{name} has a {found} in place of MHLA, whose weights are gone: save before "
                    "set_attn_processor or set_processor is called, or load the model again"
                )
        main = given.arguments["is_main_process"]
        with without_index(Path(save_directory), **form) if main else contextlib.nullcontext():
            super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_single_file(
        cls, pretrained_model_link_or_path_or_dict: Any, *, mhla_config: ConfigChoice = None, **kwargs: Any
    ) -> Any:
        """Load a stock model from one file, and convert it.

        Takes what the stock class's method takes.

        Raises:
            ValueError: without ``mhla_config``, and for a file that lacks weights of the stock model.
        """
        if mhla_config is None:
            raise ValueError(
                "single files hold stock models: give mhla_config= to have it converted; one with MHLA is a "
                f"folder for {cls.__name__}.from_pretrained"
            )
        try:
            # What a file lacks then is on the meta device; otherwise it would be there, at random.
            model = cls.stock.from_single_file(
                pretrained_model_link_or_path_or_dict, **{**kwargs, "low_cpu_mem_usage": True}
            )
            lacking = [name for name, weight in model.named_parameters() if weight.is_meta]
        except NotImplementedError as error:  # diffusers casts meta tensors
            lacking = [str(error)]
        if lacking:
            raise ValueError(f"the file lacks weights of {cls.stock.__name__}: {lacking[0]}")
        return rebuild(model, cls, attention="mhla", mhla_config=mhla_config)[0]

    @property
    def mixing_blocks(self) -> tuple[int, ...]:
        """Blocks along each axis, or ones where no layer mixes."""
        modules = [module for module in self.modules() if isinstance(module, MHLA)]
        mixing = [module.blocks for module in modules if module.mixing is not None]
        return next(iter(mixing or [module.blocks for module in modules]), (1, 1))

    def enable_parallelism(self, *, config: Any, cp_plan: dict[str, Any] | None = None) -> None:
        """Spread tokens over ranks, for linear attention in all layers.

        Takes what :meth:`diffusers.ModelMixin.enable_parallelism` takes.

        With a :class:`diffusers.ContextParallelConfig` each rank holds a share of the tokens. Whatever its
        degrees are called, ranks exchange key/value summaries only, see
        :func:`mhla_diffusion.ops.mhla_parallel`; or, where a softmax window, convolutions, content, centred
        keys or the normalizer ``"official"`` need the tokens of other ranks, tokens for heads
        (Ulysses). Token numbers that the ranks do not divide need ``ulysses_anything=True``.

        Raises:
            ValueError: for layers with stock attention, ranks that do not divide the heads where tokens are
                exchanged, and a model that diffusers has no plan for, nor is given one.
        """
        spread = getattr(config, "context_parallel_config", config)
        if spread and not isinstance(config, TensorParallelConfig):
            self._check_context_parallel((spread.ulysses_degree or 1) * (spread.ring_degree or 1))
            if cp_plan is None and self._cp_plan is None:
                planned = [model.__name__ for model in BACKBONES.values() if model._cp_plan is not None]
                raise ValueError(
                    f"diffusers has no plan of how the tokens of {self.stock.__name__} are spread: give one "
                    f"as cp_plan=; those with a plan are {', '.join(planned)}"
                )
        super().enable_parallelism(config=config, cp_plan=cp_plan)

    def _check_context_parallel(self, ranks: int) -> None:
        if self.stock_attention in self.layer_attention:
            raise ValueError(
                "context parallelism needs linear attention or MHLA in every layer; this model has "
                f"{', '.join(self.layer_attention)}"
            )
        modules = [module for module in self.modules() if isinstance(module, MHLA)]
        heads = [mhla.heads for mhla in modules if mhla.config.needs_all_tokens and mhla.heads % ranks]
        if heads:
            raise ValueError(
                f"{ranks} ranks do not divide {heads[0]} heads, as they have to where windows, "
                "convolutions, mixing_content, center_keys or the normalizer 'official' need all tokens: "
                f"take another number, or a model without these; mhla_config is {self.config.mhla_config}"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load as :meth:`diffusers.ModelMixin.from_pretrained` does, never with a weight that no file holds.

        ``mhla_config=`` with other blocks than the file has resizes the mixing matrices
        (:func:`mhla_diffusion.ops.resize_mixing`); ``sample_size=`` changes the grid, and blocks grow or
        shrink with it. Either is logged. A config that says nothing of a softmax window keeps the file's.

        Raises:
            ValueError: when the checkpoint lacks weights of this model, as a stock DiT checkpoint does: those
                are converted, not loaded; and when quantisation on loading makes weights of MHLA NaN.
        """
        if os.path.isfile(pretrained_model_name_or_path):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a file: give the folder that it is in, or, of a stock "
                "model, take from_single_file"
            )
        output_loading_info = kwargs.pop("output_loading_info", False)
        place = {"subfolder": kwargs.get("subfolder"), **hub_arguments(kwargs)}
        stored = cls.load_config(pretrained_model_name_or_path, **place)
        changed_form = kwargs.get("mhla_config") is not None and stored.get("mhla_config") is not None
        if kwargs.get("mhla_config") is not None:
            kwargs["mhla_config"] = with_window_of(stored, kwargs["mhla_config"])
        other = cls._other_mixing(stored.get("mhla_config"), kwargs.get("mhla_config"))
        wanted = kwargs.pop("mhla_config") if other else None
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
        if other and not missing:
            blocks = model.mixing_blocks
            model, changed = rebuild(model, cls, mhla_config=wanted)
            if model.mixing_blocks != blocks:
                logger.warning("mixing matrices resized, blocks %s to %s", blocks, model.mixing_blocks)
            missing = changed["new"]
        if missing:
            stock = f"If it is a stock model, load it with diffusers.{cls.stock.__name__}"
            remedy = "Load it without mhla_config" if changed_form else stock
            raise ValueError(
                f"{pretrained_model_name_or_path} lacks {len(missing)} weights of {cls.__name__}, first "
                f"{missing[0]}. {remedy} and call mhla_diffusion.convert_to_mhla(model, config), or run mhla "
                "convert"
            )
        if getattr(model, "hf_quantizer", None) is not None:
            require_finite_parts(model)
        for name in SIZES:
            now, then = getattr(model.config, name, None), stored.get(name)
            if then is not None and now != then:
                blocks = model.mixing_blocks
                logger.warning("%s %s in place of %s: the blocks stay %s", name, now, then, blocks)
        return (model, info) if output_loading_info else model

    @classmethod
    def _other_mixing(cls, stored: ConfigChoice, wanted: ConfigChoice) -> bool:
        """Tell from two choices of configs that the weights of mixing, or of windows, say other things."""
        if stored is None or wanted is None:
            return False

        def said(config: MHLAConfig) -> tuple[Any, ...]:
            extra = config.extra_block or cls.extra_tokens > 0
            shape = config.blocks, extra, config.mixing_per_head, config.mixing_relative
            return (*shape, config.constraint, config.window)

        before, after = ([said(config) for config in as_configs(choice)] for choice in (stored, wanted))
        return before != after and not (len(after) == 1 and set(before) == set(after))

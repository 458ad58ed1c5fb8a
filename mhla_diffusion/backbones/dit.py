"""DiT: images of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from .families import SquareSampleMixin, square_grid
from .grid import Grid, token_grid
from .layer_plan import AttentionChoice, ConfigChoice
from .stock import after

# Stock DiTTransformer2DModel would ignore the fields it does not know and run softmax on these weights. It
# does refuse an unknown norm_type, and quotes it: so the refusal says what to do.
_NORM_TYPE = "ada_norm_zero"
_MARKED_NORM_TYPE = (
    "ada_norm_zero, with linear attention: load it with mhla_diffusion.MHLADiTTransformer2DModel"
)


class _FirstBlock(BasicTransformerBlock):
    """The block whose embedding DiT's output layer reads too: called without tokens, it returns that alone.

    It has to be a call: offloading and FSDP bring the weights of a block where they are needed when its
    forward is called, and not when a part of it is.
    """

    def forward(self, hidden_states: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states is None:
            return self.norm1.emb(**kwargs)
        return super().forward(hidden_states, *args, **kwargs)


TransformerBlockRegistry.register(_FirstBlock, TransformerBlockMetadata(return_hidden_states_index=0))


class MHLADiTTransformer2DModel(SquareSampleMixin, DiTTransformer2DModel):
    """DiT with MHLA, plain linear or softmax attention in each layer, on grids of any shape.

    Takes every argument of :class:`diffusers.DiTTransformer2DModel` and two more. Its registered config
    rebuilds it, so ``save_pretrained`` and ``from_pretrained`` restore the same function.

    Differences from the stock class, which hold for softmax layers too:

    - latents may have any height and width that are multiples of the patch (stock DiT is square-only);
    - labels are not dropped inside the model: stock DiT draws them anew in every layer, so that half of the
      layers may see a label that the others do not. Training code replaces labels by the null class,
      ``num_embeds_ada_norm``;
    - new models start much as DiT's authors start them (zero modulation, zero output), not with torch's
      defaults;
    - group offloading works, by leaf and by block.

    ``torch.compile(model, fullgraph=True)`` and ``model.compile(fullgraph=True)`` work. Each grid is compiled
    once, at its first use, and for that grid alone.

    Args:
        attention: ``"mhla"``, ``"linear"`` (MHLA with one block) or ``"softmax"``, for all layers that
            ``mhla_config.layers`` names or, as a list, for each layer.
        mhla_config: an :class:`~mhla_diffusion.MHLAConfig` or its dict, or one for each layer; the
            defaults when None.

    Raises:
        ValueError: for settings that do not fit together; the message says which and what to do.
    """

    old_norm_type = _NORM_TYPE
    vae_stride = (8, 8)
    # The 8 output channels are 4, and their variances.
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        f"DiT-{name}/2": {
            "num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim,
            "out_channels": 8,
        }
        for name, layers, heads, head_dim in (
            ("S", 12, 6, 64), ("B", 12, 12, 64), ("L", 24, 16, 64), ("XL", 28, 16, 72),
        )
    }  # fmt: skip
    _no_split_modules = _repeated_blocks = ["BasicTransformerBlock", "_FirstBlock"]  # noqa: RUF012
    _supports_group_offloading = True
    # Tokens are spread over the ranks in front of the first block and gathered behind the last layer.
    _cp_plan: ClassVar[dict[str, Any]] = {
        "transformer_blocks.0": {"hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)},
        "proj_out_2": ContextParallelOutput(gather_dim=1, expected_dims=3),
    }

    @after(DiTTransformer2DModel)
    def __init__(
        self,
        stock: dict[str, Any],
        *,
        attention: AttentionChoice = "mhla",
        mhla_config: ConfigChoice = None,
    ) -> None:
        plan = self.plan_layers(attention, mhla_config, stock["num_layers"], square_grid(stock))
        if stock["norm_type"] == _MARKED_NORM_TYPE:
            stock["norm_type"] = _NORM_TYPE
        self.build(stock, plan)
        self.transformer_blocks[0].__class__ = _FirstBlock
        for block in self.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0
        self._reset_parameters()
        all_softmax = set(plan.kinds) == {"softmax"}
        self.register_to_config(norm_type=_NORM_TYPE if all_softmax else _MARKED_NORM_TYPE)

    def example_inputs(
        self, grid: Grid, *, batch_size: int = 1, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        sizes = [tokens * self.patch_size for tokens in grid]
        classes = self.config.num_embeds_ada_norm
        return {
            "hidden_states": torch.randn(batch_size, self.config.in_channels, *sizes, generator=generator),
            "timestep": torch.randint(1000, (batch_size,), generator=generator),
            "class_labels": torch.randint(classes, (batch_size,), generator=generator),
        }

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Predict for noisy latents.

        Args:
            hidden_states: ``[B, C, H, W]``, H and W multiples of the patch size.
            timestep: ``[B]``, 0 to 1000.
            class_labels: ``[B]``, 0 to ``num_embeds_ada_norm``, which is the null class.
            cross_attention_kwargs: passed on to the attention processors.
            return_dict: whether to return a ``Transformer2DModelOutput`` instead of a tuple.

        Returns:
            ``sample``, ``[B, out_channels, H, W]``.

        Raises:
            ValueError: when H or W is not a multiple of the patch size, or a grid cannot hold the blocks.
        """
        p = self.patch_size
        grid = token_grid(hidden_states.shape[2:], (p, p))
        kwargs = {**(cross_attention_kwargs or {}), "grid": grid}
        hidden_states = self.pos_embed(hidden_states)
        conditioning = self.transformer_blocks[0](
            None, timestep=timestep, class_labels=class_labels, hidden_dtype=hidden_states.dtype
        )
        if conditioning is None:  # diffusers' LayerSkipConfig: the block is skipped, its embedding is not
            conditioning = self.transformer_blocks[0].norm1.emb(
                timestep, class_labels, hidden_dtype=hidden_states.dtype
            )
        for block in self.transformer_blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(
                    block, hidden_states, None, None, None, timestep, kwargs, class_labels
                )
            else:
                hidden_states = block(
                    hidden_states, timestep=timestep, cross_attention_kwargs=kwargs, class_labels=class_labels
                )
        shift, scale = self.proj_out_1(F.silu(conditioning)).chunk(2, dim=1)
        hidden_states = self.norm_out(hidden_states) * (1 + scale[:, None]) + shift[:, None]
        hidden_states = self.proj_out_2(hidden_states)
        # [B, h w, p p C] -> [B, C, H, W]
        hidden_states = hidden_states.unflatten(1, grid).unflatten(-1, (p, p, self.out_channels))
        output = torch.einsum("nhwpqc->nchpwq", hidden_states).flatten(4, 5).flatten(2, 3)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # A cast leaves the table of positions in float32, as from_pretrained does: one function either way.
        positions = self.pos_embed.pos_embed
        super()._apply(fn, recurse)
        if self.pos_embed.pos_embed.dtype != positions.dtype:
            self.pos_embed.pos_embed = positions.to(self.pos_embed.pos_embed.device)
        return self

    def _reset_parameters(self) -> None:
        """The start of DiT's authors: Xavier, and blocks that begin as the identity.

        A deviation: their embeddings of class and time start at 0.02, ours at torch's 1 (class) and Xavier
        (time). What is zero at the start, the modulation, learns in proportion to them, so that short runs
        hear the class sooner. The processors keep the start that their config names.
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear) and ".processor" not in name:
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, PatchEmbed):
                nn.init.xavier_uniform_(module.proj.weight.flatten(1))
                nn.init.zeros_(module.proj.bias)
        for block in self.transformer_blocks:
            nn.init.zeros_(block.norm1.linear.weight)
        for output in (self.proj_out_1, self.proj_out_2):
            nn.init.zeros_(output.weight)

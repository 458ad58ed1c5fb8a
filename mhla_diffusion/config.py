"""MHLAConfig: the settings of an MHLA layer, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .ops import FEATURE_MAPS, LOCAL_FORMS, MIXING_STARTS, NORMALIZERS, BlockLayout, Margin

CONSTRAINTS = ("clamp", "softmax", "none")
CPE_STARTS = (None, "zero", "identity")

# Feature maps in front of the operator, with two features for each channel.
WIDE_MAPS = ("crelu", "hedgehog")
POWER_MAP = "power"

# Form of ``local`` with nothing beside it.
WINDOW_ONLY = "only"

# The window of new models, wherever a layer can have one, and its margin in sides of a block.
AUTO_WINDOW = "auto"
_AUTO_MARGIN = 0.25
LOCAL_CHOICES = (None, *LOCAL_FORMS, WINDOW_ONLY, AUTO_WINDOW)

# What a window is made of, as where there is none.
NO_WINDOW: dict[str, Any] = {"local": None, "local_margin": 0, "routed_blocks": 0, "exact_routing": False}

# Settings that came later than stored configs: written where they are used, so that those stay the same.
_LATER = {"later": True}


@dataclass(frozen=True)
class MHLAConfig:
    """Settings of an MHLA layer.

    Args:
        blocks: number of blocks in all (divided over the grid as evenly as it goes), or along each axis.
            The paper uses 16 for images. Keep M^2 <= N, or mixing costs more than attention.
        extra_block: one more block, of tokens that lie on no grid (a class token, registers, text in joint
            attention): a row and a column of the mixing matrix, whose start is that of
            :func:`mhla_diffusion.ops.extend_mixing`. Without it they can join plain linear attention alone.
        key_blocks: for cross-attention: the number of blocks of the keys, or along each axis of their grid.
        feature_map: ``"relu"``, ``"elu"`` or ``"softmax"``, see :func:`mhla_diffusion.ops.mhla`; or
            ``"hedgehog"``, learned for each head, see :class:`mhla_diffusion.hedgehog.Hedgehog`, or
            ``"crelu"``, as wide as that without learning, ``[relu(x), relu(-x)]``; or ``"power"``, relu(x)^3
            with the norm of relu(x) (Han et al. 2023, arXiv 2308.00442).
        normalizer: ``"paper"``, ``"official"`` (checkpoints of the public reference code) or ``"none"``.
        mixing_init: the start of the mixing matrix, see :func:`mhla_diffusion.ops.initial_mixing`.
        constraint: ``"clamp"`` holds the mixing matrix in [0, 1] after every optimizer step (the paper);
            ``"softmax"`` learns logits, each row sums to 1; ``"none"``. What peft adds to the matrix
            (``target_parameters``) is not clamped, a copy that it trains (``modules_to_save``) is.
        mixing_per_head: one mixing matrix per head instead of one for all.
        mixing_relative: weights by the offset of blocks, see :func:`mhla_diffusion.ops.relative_mixing`.
        mixing_content: weights by the content of blocks as well, with a learned strength for each head that
            starts at 0, see :func:`mhla_diffusion.ops.content_mixing`.
        local: softmax attention inside the own block, beside MHLA: ``"shared"`` with one denominator, or
            ``"gate"`` with a learned gate for each head, see :func:`mhla_diffusion.ops.mhla_local`. Or
            ``"only"``: nothing beside it, so that tokens do not see other blocks; with ``blocks=1`` that is
            softmax attention, which so gets the convolution, the norms and the gate. ``"auto"``, a deviation
            from the paper, is ``"shared"`` with a margin of a quarter of a block in self-attention over
            several blocks with the normalizer ``"paper"``, and no window elsewhere. None is the paper's form.
        local_margin: tokens around the own block that this softmax sees as well, along each axis of the grid
            or for all of them: integers, or shares of the side of a block between 0 and 1, to the nearest
            token. With 0 the borders of blocks may show in samples; ``"auto"`` has 0.25 in place of 0.
        routed_blocks: further blocks that the softmax of each query sees, which it chooses for itself by
            mean and covariance of their keys, see :func:`mhla_diffusion.ops.choose_blocks`. For ``local``.
        exact_routing: let them choose by all scores instead: O(N^2 d) in place of O(N M d^2), so less work
            where blocks have fewer tokens than heads have channels, and more elsewhere.
        center_keys: take the mean over the tokens from the keys, before the feature map. Pretrained keys
            share one, which softmax does not see.
        cpe: start of the depthwise 3x3 convolution on v that is added to the output: ``"zero"`` (for
            fine-tuning), ``"identity"`` (for training from scratch), None for no convolution.
        qk_conv: a depthwise 3x3 convolution on queries and one on keys, each added to what it reads, before
            ``qk_norm`` and behind norms of a stock layer. Start at zero, so that adding them changes no
            function. An extension of the paper.
        qk_norm: RMSNorm over each head's d of queries and keys, before the feature map.
        gate: multiply the output with ``SiLU(Linear(x))``. Starts open (a factor of 1), so that adding it
            changes no function. A deviation: the paper does not say how it starts.
        output_norm: RMSNorm over each head's d, before the gate.
        eps: added by the relu feature map.
        layers: which layers of a model get linear attention, the others keep softmax; None for all.

    Raises:
        ValueError: for a value that is not allowed; the message names those that are.
    """

    blocks: int | tuple[int, ...] = 16
    key_blocks: int | tuple[int, ...] | None = None
    feature_map: str = "relu"
    normalizer: str = "paper"
    mixing_init: str = "locality"
    constraint: str = "clamp"
    mixing_per_head: bool = False
    mixing_relative: bool = field(default=False, metadata=_LATER)
    mixing_content: bool = field(default=False, metadata=_LATER)
    local: str | None = field(default=AUTO_WINDOW, metadata=_LATER)
    local_margin: Margin = field(default=0, metadata=_LATER)
    routed_blocks: int = field(default=0, metadata=_LATER)
    exact_routing: bool = field(default=False, metadata=_LATER)
    center_keys: bool = field(default=False, metadata=_LATER)
    cpe: str | None = None
    qk_conv: bool = field(default=False, metadata=_LATER)
    qk_norm: bool = False
    gate: bool = False
    output_norm: bool = False
    eps: float = 1e-6
    layers: tuple[int, ...] | None = None
    extra_block: bool = field(default=False, metadata=_LATER)

    def __post_init__(self) -> None:
        for name in ("blocks", "key_blocks", "local_margin", "layers"):
            if isinstance(getattr(self, name), (list, tuple, range)):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("blocks", "key_blocks"):
            value = getattr(self, name)
            if value is None and name == "key_blocks":
                continue
            counts = _axes(value)
            if not counts or not all(_is_int(count) and count >= 1 for count in counts):
                raise ValueError(f"{name} must be an integer >= 1 or one per axis, got {value!r}")
        allowed: dict[str, tuple[Any, ...]] = {
            "feature_map": (*FEATURE_MAPS, *WIDE_MAPS, POWER_MAP),
            "local": LOCAL_CHOICES,
            "normalizer": NORMALIZERS,
            "mixing_init": MIXING_STARTS,
            "constraint": CONSTRAINTS,
            "cpe": CPE_STARTS,
        } | {
            field.name: (False, True) for field in dataclasses.fields(self) if isinstance(field.default, bool)
        }
        for name, values in allowed.items():
            value = getattr(self, name)
            # What is only equal, such as a NumPy boolean, may not be what JSON can hold.
            if not any(type(value) is type(one) and value == one for one in values):
                raise ValueError(f"{name} must be one of {', '.join(map(repr, values))}, got {value!r}")
        self._check_local()
        if type(self.eps) not in (int, float) or not 0 < self.eps < 1:
            raise ValueError(
                "eps must be a number between 0 and 1 (the paper's code has 1e-6, which YAML takes for text: "
                f"write 1.0e-6), got {self.eps!r}"
            )
        layers = self.layers
        if layers is not None and not (
            isinstance(layers, tuple) and all(_is_int(i) and i >= 0 for i in layers)
        ):
            raise ValueError(f"layers must be None or a list of layer numbers from 0, got {layers!r}")

    def _check_local(self) -> None:
        if not _is_int(self.routed_blocks) or self.routed_blocks < 0:
            raise ValueError(f"routed_blocks must be an integer >= 0, got {self.routed_blocks!r}")
        if self.exact_routing and not self.routed_blocks:
            raise ValueError("exact_routing is how routed_blocks are chosen: set these, or leave it out")
        margins = self.local_margin if isinstance(self.local_margin, tuple) else (self.local_margin,)
        if not margins or not all(_is_margin(margin) for margin in margins):
            raise ValueError(
                "local_margin must be an integer >= 0 (tokens) or a number between 0 and 1 (of the side of "
                f"a block), or one per axis, got {self.local_margin!r}"
            )
        for name, wider in (("local_margin", any(margins)), ("routed_blocks", self.routed_blocks)):
            if wider and (self.window is None or self._is_one_block):
                raise ValueError(
                    f"{name}={getattr(self, name)} is what the softmax window sees beside its own block: set "
                    f"local to one of {', '.join(map(repr, LOCAL_CHOICES[1:]))} and take several blocks, the "
                    f"normalizer 'paper' and no key_blocks, got local {self.local!r}, blocks {self.blocks}, "
                    f"normalizer {self.normalizer!r} and key_blocks {self.key_blocks}"
                )
        for name in ("local", "mixing_relative", "extra_block"):
            if getattr(self, name) not in (None, False, AUTO_WINDOW) and self.key_blocks is not None:
                raise ValueError(f"{name} is for self-attention: leave it out, or key_blocks")
        if self.local == WINDOW_ONLY:
            if self.feature_map == "hedgehog" or self.extra_block:
                raise ValueError(
                    f"local {self.local!r} has no features and no block of extra tokens: leave feature_map "
                    f"{self.feature_map!r} and extra_block={self.extra_block} out"
                )
        elif self.local in LOCAL_FORMS and (self.normalizer != "paper" or self._is_one_block):
            raise ValueError(
                f"local {self.local!r} needs normalizer 'paper' and several blocks (with one it is softmax "
                f"attention), got normalizer {self.normalizer!r} and blocks {self.blocks}"
            )

    @property
    def window(self) -> str | None:
        """Form of the softmax window, ``"shared"``, ``"gate"`` or ``"only"``; None where there is none."""
        if self.local != AUTO_WINDOW:
            return self.local
        possible = not self._is_one_block and self.normalizer == "paper" and self.key_blocks is None
        return "shared" if possible else None

    @property
    def has_mixing(self) -> bool:
        """Return True where there are several summaries to mix, and more than a window reads them."""
        several = not self._is_one_block if self.key_blocks is None else math.prod(_axes(self.key_blocks)) > 1
        return (several or self.extra_block) and self.window != WINDOW_ONLY

    @property
    def needs_all_tokens(self) -> bool:
        """Return True where more than summaries is read of the tokens of other ranks."""
        content = self.center_keys or (self.mixing_content and self.has_mixing)
        convolved = self.cpe is not None or self.qk_conv
        return convolved or content or self.window is not None or self.normalizer == "official"

    @property
    def _is_one_block(self) -> bool:
        return math.prod(_axes(self.blocks)) == 1

    @property
    def margin(self) -> Margin:
        """Margin of the window, as ``local_margin``."""
        chosen = self.local_margin if isinstance(self.local_margin, tuple) else (self.local_margin,)
        by_default = self.local == AUTO_WINDOW and self.window is not None and not any(chosen)
        return _AUTO_MARGIN if by_default else self.local_margin

    @classmethod
    def paper(cls, **settings: Any) -> MHLAConfig:
        """Return the form of the paper (arXiv 2601.07832): ReLU features, one clamped matrix, no window.

        Args:
            settings: others in place of it, or beside it: the paper's DiT has ``cpe="identity", gate=True``.
        """
        form = {
            "blocks": 16, "feature_map": "relu", "normalizer": "paper", "mixing_init": "locality",
            "constraint": "clamp", "mixing_per_head": False, "mixing_relative": False, "local": None,
            "mixing_content": False, "local_margin": 0, "routed_blocks": 0, "exact_routing": False,
            "center_keys": False, "qk_conv": False,
        }  # fmt: skip
        return cls.from_dict({**form, **settings})

    def without_window(self) -> MHLAConfig:
        """Return the settings without a softmax window and what it sees beside its block."""
        return dataclasses.replace(self, **NO_WINDOW)

    def linear(self) -> MHLAConfig:
        """Return the settings as plain linear attention, over one block: without window and block of others.

        With ``local="only"`` that is softmax attention, see there.
        """
        local = WINDOW_ONLY if self.local == WINDOW_ONLY else None
        return dataclasses.replace(self.without_window(), blocks=1, extra_block=False, local=local)

    def __repr__(self) -> str:
        """Name what is not the default, and the blocks: a line that gives the config again."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        shown = [f"{k}={v!r}" for k, v in values.items() if k == "blocks" or v != defaults[k]]
        return f"MHLAConfig({', '.join(shown)})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values (lists, not tuples), as they stand in a model's config.json."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if not self._is_left_out(f)}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def _is_left_out(self, setting: dataclasses.Field[Any]) -> bool:
        without = None if setting.name == "local" else setting.default
        return "later" in setting.metadata and getattr(self, setting.name) == without

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MHLAConfig:
        """Make a config of plain values, the inverse of :meth:`to_dict`.

        Without ``local`` there is no window, as in what was stored before there were any.

        Raises:
            ValueError: for what is no dict, and an unknown key, naming the known ones.
        """
        if not isinstance(values, Mapping):
            raise ValueError(
                "MHLA settings are an MHLAConfig, a dict of its settings such as {'blocks': 16}, or None for "
                f"the defaults, got {values!r}"
            )
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(map(str, set(values) - set(known))):
            raise ValueError(
                f"unknown MHLA setting {', '.join(unknown)}; the known ones are {', '.join(known)}"
            )
        return cls(**{"local": None, **values})

    def layout(self, grid: tuple[int, ...]) -> BlockLayout:
        """Return the blocks on a grid.

        Raises:
            ValueError: when the grid cannot hold them, or has other axes than ``local_margin``.
        """
        if isinstance(self.local_margin, tuple) and len(self.local_margin) != len(grid):
            raise ValueError(
                f"local_margin {self.local_margin} must be one number or {len(grid)}, one for each axis of "
                f"the grid {grid}"
            )
        return _layout(grid, self.blocks)

    def key_layout(self, grid: tuple[int, ...] | None) -> BlockLayout | None:
        """Return the blocks on the grid of the keys, for cross-attention; else None.

        Raises:
            ValueError: when the grid cannot hold them, or one of the grid and ``key_blocks`` is missing.
        """
        if (grid is None) != (self.key_blocks is None):
            raise ValueError(
                f"cross-attention takes key_blocks and the grid of the keys, self-attention neither; got "
                f"key_blocks {self.key_blocks} and key_grid {grid}"
            )
        return None if grid is None or self.key_blocks is None else _layout(grid, self.key_blocks)


OneConfig = MHLAConfig | Mapping[str, Any] | None


def as_config(mhla_config: OneConfig) -> MHLAConfig:
    """Return the config of what a model's argument may be: a config, its dict, or None for the defaults.

    Raises:
        ValueError: for anything else, and what a config refuses.
    """
    if mhla_config is None:
        return MHLAConfig()
    return mhla_config if isinstance(mhla_config, MHLAConfig) else MHLAConfig.from_dict(mhla_config)


def with_window(config: MHLAConfig, old: MHLAConfig, said: object = None) -> MHLAConfig:
    """Return a config with the softmax window of another, where it says nothing of one and can have it.

    Args:
        config: that is to be; ``local="auto"`` says nothing.
        old: of the model that is given it.
        said: what the config was made of; a dict without ``local`` says nothing either.
    """
    silent = "local" not in said if isinstance(said, Mapping) else config.local == AUTO_WINDOW
    possible = dataclasses.replace(config, local=AUTO_WINDOW).window is not None
    if not silent or not possible or config.local_margin or config.routed_blocks:
        return config
    return dataclasses.replace(config, **{name: getattr(old, name) for name in NO_WINDOW})


def _axes(blocks: int | tuple[int, ...]) -> tuple[int, ...]:
    return blocks if isinstance(blocks, tuple) else (blocks,)


def _layout(grid: tuple[int, ...], blocks: int | tuple[int, ...]) -> BlockLayout:
    if isinstance(blocks, tuple):
        return BlockLayout(grid, blocks)
    return BlockLayout.with_num_blocks(grid, blocks)


def _is_margin(value: object) -> bool:
    return (_is_int(value) and value >= 0) or (isinstance(value, float) and 0 < value < 1)  # type: ignore[operator]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)

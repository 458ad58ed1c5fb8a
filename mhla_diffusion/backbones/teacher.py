"""Teacher: the model that is converted, and what goes into and out of each of its self-attention layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..config import MHLAConfig
from .convert import convert_to_mhla
from .quantised import dequantised
from .registry import backbone_of, load_transformer

# Numbers of a tensor that go into the fingerprint: to hash all of a large model takes minutes.
_PROBES = 256
# Name of what tells a layer which tokens are the text's.
_MASK = "encoder_hidden_states_mask"


@dataclass
class LayerCall:
    """Call of a self-attention layer.

    In joint attention a text is a second stream, in and out.

    Args:
        hidden_states: ``[B, N, D]``.
        args, kwargs: what else it got: grid, rotary tables, a text.
        output: ``[B, N, D]``, behind its output projection; of the text too in joint attention.
    """

    hidden_states: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None

    @property
    def inputs(self) -> Tensor:
        """Tokens of all streams, ``[B, T + N, D]``, the text first; zero where it is filled up."""
        text = self.kwargs.get("encoder_hidden_states")
        if text is None:
            return self.hidden_states
        return _streams((self.hidden_states, text), self.kwargs.get(_MASK))

    @property
    def outputs(self) -> Tensor:
        """Outputs for all streams, as :attr:`inputs` has them."""
        return _streams(self.output, self.kwargs.get(_MASK))

    def replay(self, layer: nn.Module, inputs: Tensor) -> Tensor:
        """Return the outputs of a layer for other :attr:`inputs`, all else as in this call, of one sample.

        Texts have the lengths that the inputs say.
        """
        text = self.kwargs.get("encoder_hidden_states")
        if text is None:
            return layer(inputs, *self.args, **self.kwargs)
        length = text.shape[1]
        kwargs, mask = {**self.kwargs, "encoder_hidden_states": inputs[:, :length]}, None
        if _MASK in kwargs:
            mask = inputs[:, :length].any(-1)
            kwargs[_MASK] = mask if kwargs[_MASK] is None else mask.to(kwargs[_MASK].dtype)
        return _streams(layer(inputs[:, length:], *self.args, **kwargs), mask)


def _streams(output: Any, mask: Tensor | None) -> Tensor:
    """One tensor of a layer's outputs, which gives that of the text second; zero where that is masked."""
    if not isinstance(output, tuple):
        return output
    streams, text = output
    return torch.cat((text if mask is None else text * mask.bool()[..., None], streams), 1)


def load_teacher(
    model: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", **place: Any
) -> Any:
    """Load our form of a stored model, with its stock attention in every layer, frozen.

    Args:
        model: folder or hub id of a transformer that has an MHLA form, stock or ours, or of its pipeline.
        dtype: of its weights.
        device: where it goes.
        place: component, revision, ... as for :func:`load_transformer`.

    Raises:
        ValueError: when some of its layers have MHLA already.
    """
    return as_teacher(load_transformer(model, dtype=dtype, **place), name=model).to(device)


def as_teacher(model: Any, *, name: str = "the teacher") -> Any:
    """Return our form of a model with its stock attention in every layer, frozen and in eval mode.

    Raises:
        ValueError: for a model without an MHLA form, or of which layers have MHLA already.
    """
    ours = backbone_of(model)
    if ours is None or not isinstance(model, ours):
        model = convert_to_mhla(model, MHLAConfig(layers=()))
    linear = [number for number, kind in enumerate(model.layer_attention) if kind != model.stock_attention]
    if linear:
        raise ValueError(
            f"{name} has {model.layer_attention[linear[0]]} in layers {', '.join(map(str, linear))} already: "
            f"a teacher has {model.stock_attention} attention in all; take the model that it was made of"
        )
    return model.requires_grad_(False).eval()


def attention_layers(model: nn.Module) -> dict[str, Any]:
    """Return the self-attention layers of one of our models, branches included, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "layer_number")}


def fingerprint(model: Any) -> str:
    """Hash the class, the stock config and a probe of every weight."""
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    for ours in ("attention", "mhla_config", "norm_type", "quantization_config"):
        config.pop(ours, None)
    digest = hashlib.sha256(json.dumps([type(model).__name__, config], default=str, sort_keys=True).encode())
    for name, weight in model.named_parameters():
        flat = dequantised(weight.detach()).flatten()
        probe = flat[:: max(1, len(flat) // _PROBES)].float().cpu().numpy()
        digest.update(f"{name} {list(weight.shape)}".encode() + probe.tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def recording(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, LayerCall]]:
    """Note the calls of layers, inside the with block; the last call of each counts."""
    calls: dict[str, LayerCall] = {}

    def before(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            hidden_states = args[0] if args else kwargs["hidden_states"]
            calls[name] = LayerCall(hidden_states, args[1:], rest)

        return note

    def behind(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls[name].output = output

        return note

    handles = []
    for name in names:
        layer = model.get_submodule(name)
        # Before the layer takes the grid off its arguments.
        handles.append(layer.register_forward_pre_hook(before(name), with_kwargs=True, prepend=True))
        handles.append(layer.register_forward_hook(behind(name)))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def place(model: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a call where a model is and in its dtype.

    Rotary tables keep theirs, and times do unless the model takes them in its own.
    """
    return {name: _placed(model, name, value) for name, value in inputs.items()}


def _placed(model: Any, name: str, value: Any) -> Any:
    if isinstance(value, dict):  # as PixArt's added_cond_kwargs
        return place(model, value)
    keeps = "timestep" in name and not getattr(model, "time_in_dtype", False)
    if isinstance(value, Tensor) and value.is_floating_point() and not keeps:
        return value.to(model.device, model.dtype)
    return send_to_device(value, model.device)


def predict(model: Any, inputs: dict[str, Any]) -> Tensor:
    """Return what a model predicts for a call, in float32."""
    output = model(**inputs, return_dict=False)
    return (output if isinstance(output, Tensor) else output[0]).float()  # Kandinsky's is no tuple


@torch.no_grad()
def layer_calls(model: Any, inputs: dict[str, Any], names: Sequence[str]) -> dict[str, LayerCall]:
    """Return the calls of layers in a call of the model."""
    with recording(model, names) as calls:
        predict(model, inputs)
    return calls

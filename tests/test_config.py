"""Settings of MHLA, as they are stored, printed and refused."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy
import pytest

from mhla_diffusion import MHLA, MHLAConfig
from mhla_diffusion.config import with_window

FULL = MHLAConfig(
    blocks=(2, 3), feature_map="hedgehog", mixing_init="uniform", constraint="softmax", mixing_per_head=True,
    mixing_relative=True, mixing_content=True, local="gate", center_keys=True, cpe="zero", gate=True,
    output_norm=True, layers=(0, 2),
)  # fmt: skip


def through_json(config: MHLAConfig) -> MHLAConfig:
    return MHLAConfig.from_dict(json.loads(json.dumps(config.to_dict())))


def test_config_survives_json() -> None:
    assert through_json(FULL) == FULL
    assert through_json(MHLAConfig()) == MHLAConfig()
    assert FULL.to_dict()["blocks"] == [2, 3]


def test_config_prints_what_was_chosen() -> None:
    assert repr(MHLAConfig()) == "MHLAConfig(blocks=16)"
    assert repr(MHLAConfig(blocks=(2, 3), gate=True)) == "MHLAConfig(blocks=(2, 3), gate=True)"
    assert eval(repr(FULL)) == FULL


def test_settings_that_came_later_are_written_where_they_are_used() -> None:
    assert {"local", "center_keys", "mixing_relative", "mixing_content"}.isdisjoint(
        MHLAConfig.paper().to_dict()
    )
    assert MHLAConfig(local="gate").to_dict()["local"] == "gate"


def test_new_models_have_a_window_and_stored_ones_what_they_had() -> None:
    assert (MHLAConfig().window, MHLAConfig().margin) == ("shared", 0.25)
    assert MHLAConfig().to_dict()["local"] == "auto"
    assert MHLAConfig.from_dict({}).window is None
    assert MHLAConfig.from_dict({}) == MHLAConfig.paper() != MHLAConfig()
    assert MHLAConfig.from_dict({"local": "shared"}).margin == 0
    assert MHLAConfig(local_margin=2).margin == 2
    assert MHLAConfig(local="shared").margin == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"blocks": 1},
        {"blocks": (1, 1)},
        {"normalizer": "official"},
        {"normalizer": "none"},
        {"key_blocks": 4},
    ],
    ids=str,
)
def test_what_can_have_no_window_has_none_by_default(settings: dict[str, Any]) -> None:
    config = MHLAConfig(**settings)
    assert (config.window, config.margin) == (None, 0)
    assert MHLAConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ValueError, match=r"local_margin=2 is what the softmax window sees"):
        MHLAConfig(**settings, local_margin=2)


def test_linear_attention_keeps_what_it_can_have() -> None:
    routed: dict[str, Any] = {"routed_blocks": 2, "exact_routing": True}
    config = MHLAConfig(cpe="zero", extra_block=True, local="gate", local_margin=1, **routed)
    assert config.linear() == MHLAConfig.paper(blocks=1, cpe="zero")
    assert MHLAConfig(local="only", gate=True).linear() == MHLAConfig(blocks=1, local="only", gate=True)


def test_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        FULL.gate = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block": 4}, r"unknown MHLA setting block; the known ones are blocks, key_blocks, feature_map"),
        ({"blocks": 0}, r"blocks must be an integer >= 1"),
        ({"blocks": (2, 0)}, r"blocks must be an integer >= 1"),
        ({"blocks": "16"}, r"blocks must be an integer >= 1.*'16'"),
        (
            {"feature_map": "exp"},
            r"feature_map must be one of 'relu', 'elu', 'softmax', 'crelu', 'hedgehog', 'power', got 'exp'",
        ),
        ({"normalizer": "paper "}, r"normalizer must be one of"),
        ({"mixing_init": "random"}, r"mixing_init must be one of"),
        ({"constraint": "sigmoid"}, r"constraint must be one of"),
        ({"cpe": "random"}, r"cpe must be one of None, 'zero', 'identity'"),
        ({"local": "sum"}, r"local must be one of None, 'shared', 'gate', 'only', 'auto', got 'sum'"),
        (
            {"local": "gate", "local_margin": 1.5},
            r"local_margin must be an integer >= 0 \(tokens\) or a number",
        ),
        ({"local": "gate", "local_margin": (1, -1)}, r"local_margin must be .* got \(1, -1\)"),
        ({"local": "gate", "local_margin": True}, r"local_margin must be .* got True"),
        ({"local": "gate", "blocks": 1}, r"local 'gate' needs normalizer 'paper' and several blocks"),
        ({"local": "gate", "normalizer": "none"}, r"got normalizer 'none' and blocks 16"),
        ({"local": "gate", "key_blocks": 2}, r"local is for self-attention"),
        ({"mixing_relative": True, "key_blocks": 2}, r"mixing_relative is for self-attention"),
        ({"center_keys": 1.5}, r"center_keys must be one of False, True"),
        ({"gate": "yes"}, r"gate must be one of False, True"),
        ({"gate": 1}, r"gate must be one of False, True, got 1"),
        ({"gate": numpy.True_}, r"gate must be one of False, True, got .*True"),
        ({"local": "gate", "blocks": (1, 1)}, r"local 'gate' needs normalizer 'paper' and several blocks"),
        ({"local_margin": 0.25, "key_blocks": 2}, r"local_margin=0.25 is what .* and no key_blocks"),
        ({"eps": 0.0}, r"eps must be a number between 0 and 1"),
        ({"eps": "1e-6"}, r"eps must be a number .* write 1.0e-6\), got '1e-6'"),
        ({"eps": None}, r"eps must be a number between 0 and 1"),
        ({"eps": numpy.float32(1e-6)}, r"eps must be a number between 0 and 1"),
        ({"layers": (0, -1)}, r"layers must be None or a list of layer numbers"),
        ({"layers": 3}, r"layers must be None or a list of layer numbers from 0, got 3"),
        ({"layers": {0, 1}}, r"layers must be None or a list of layer numbers from 0, got {0, 1}"),
        ({"layers": "01"}, r"layers must be None or a list of layer numbers from 0, got '01'"),
    ],
)
def test_config_refuses_what_is_not_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MHLAConfig.from_dict(values)


def test_layers_of_a_range_are_kept_as_they_are_stored() -> None:
    config = MHLAConfig(layers=range(1, 3))
    assert config == MHLAConfig(layers=(1, 2)) == through_json(config)


@pytest.mark.parametrize("value", [16, "16", MHLAConfig, [("blocks", 4)]], ids=str)
def test_what_is_no_config_is_refused(value: Any) -> None:
    for make in (MHLAConfig.from_dict, lambda value: MHLA(value, heads=1, head_dim=4, grid=(4, 4))):
        with pytest.raises(ValueError, match=r"MHLA settings are an MHLAConfig, a dict .* got"):
            make(value)


def test_a_module_takes_what_a_model_takes() -> None:
    sizes: dict[str, Any] = {"heads": 1, "head_dim": 4, "grid": (8, 8)}
    assert MHLA({"blocks": 4}, **sizes).config == MHLAConfig.paper(blocks=4)
    assert MHLA(None, **sizes).config == MHLAConfig()
    assert MHLA({"blocks": 4}, **{**sizes, "grid": numpy.array((8, 8))}).blocks == (2, 2)
    for wrong in ({"heads": 0}, {"head_dim": -1}, {"heads": 2.0}):
        with pytest.raises(ValueError, match="heads and head_dim must be integers >= 1"):
            MHLA(None, **{**sizes, **wrong})
    for grid in (None, 64, (8.5, 8), (None, 8), "88"):
        with pytest.raises(ValueError, match="grid must be one integer for each axis"):
            MHLA({"blocks": 4}, **{**sizes, "grid": grid})


def test_what_was_asked_of_the_window_is_not_overwritten() -> None:
    old = MHLAConfig(blocks=4, local="gate", local_margin=1)
    for asked in (MHLAConfig(blocks=4, local_margin=2), MHLAConfig(blocks=4, routed_blocks=1)):
        assert with_window(asked, old) == asked
    assert with_window(MHLAConfig(blocks=4), old) == old

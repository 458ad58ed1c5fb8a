"""The table of docs/backbones.md against the installed diffusers and our registry."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from diffusers import ModelMixin
from diffusers.models import transformers, unets

from mhla_diffusion.backbones import BACKBONES

from .pages import read


def models() -> dict[str, type[Any]]:
    """Transformers and UNets of diffusers by their names."""
    found = {name: getattr(room, name) for room in (transformers, unets) for name in dir(room)}
    return {
        name: model
        for name, model in found.items()
        if inspect.isclass(model) and issubclass(model, ModelMixin)
    }


def table() -> dict[str, tuple[str, str]]:
    """Rows by the model of diffusers: ours or -, and the reason."""
    rows = re.findall(r"^\| `(\w+)` \| `?([\w-]+)`? \|(.*)\|$", read("docs/backbones.md"), re.MULTILINE)
    assert len(rows) == len({name for name, _, _ in rows}), "a model has two rows"
    return {name: (ours, reason.strip()) for name, ours, reason in rows}


@pytest.mark.parametrize("name", models())
def test_every_transformer_has_a_row_that_is_so(name: str) -> None:
    assert name in table(), f"{name} of diffusers has no row in docs/backbones.md: ours, or why not"
    ours, reason = table()[name]
    backbone = BACKBONES.get(models()[name])
    assert ours == ("-" if backbone is None else backbone.__name__)
    assert bool(reason) == (backbone is None), "a model that is not there has a reason, and no other"


def test_no_row_is_of_a_model_that_is_not_there() -> None:
    """Nor is a backbone made of a class that diffusers does not list."""
    assert set(table()) == set(models())
    assert {stock.__name__ for stock in BACKBONES} <= set(models())


def test_rows_stand_in_the_order_of_the_alphabet_and_their_words_are_explained() -> None:
    assert [*table()] == sorted(table(), key=str.lower)
    page = read("docs/backbones.md")
    explained = set(
        re.findall(r"`([^`]+)`", page.partition("stands in the way elsewhere")[2].partition("\n## ")[0])
    )
    reasons = " ".join(reason for _, reason in table().values())
    assert {word for word in re.findall(r"`([^`]+)`", reasons) if word[:4] != "MHLA"} <= explained

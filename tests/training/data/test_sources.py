"""A source is one class: its name, its keys, its help and its errors follow from it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mhla_diffusion.training import DataConfig, VideoDataConfig, parse_config
from mhla_diffusion.training.config import as_dict
from mhla_diffusion.training.data.sources import Source, SourceConfig


@dataclass(frozen=True)
class Spots:
    number: int = 3


@dataclass(frozen=True, kw_only=True)
class CatSource(Source):
    """Kind of source.

    Args:
        tails: of each cat.
    """

    tails: int = 1


@dataclass(frozen=True)
class StreetCats(CatSource):
    """Cats of a street.

    Args:
        path: of the street.
    """

    path: str

    def open(self) -> str:
        return f"{self.tails} in {self.path}"


@dataclass(frozen=True)
class WildLeopards(CatSource):
    """Leopards.

    Args:
        spots: on each.
    """

    spots: Spots = field(default_factory=Spots)

    def __post_init__(self) -> None:
        if self.spots.number < self.tails:
            raise ValueError("too few spots")

    def open(self) -> str:
        return f"{self.spots.number} spots"


class CatConfig(SourceConfig, kind=CatSource):
    """Cats."""


@dataclass(frozen=True)
class Run:
    data: CatConfig


def parse(*arguments: str) -> CatConfig:
    return parse_config(Run, arguments)[0].data


def test_a_class_is_a_source_with_flat_keys(tmp_path: Path) -> None:
    config = parse("--data.source", "street", "--data.path", "x", "--data.tails", "2")
    assert config.open() == "2 in x"
    assert as_dict(config) == {"source": "street", "path": "x", "tails": 2, "spots": {"number": 3}}
    (tmp_path / "run.yaml").write_text("data: {source: wild_leopards, spots: {number: 7}}")
    config = parse("--config", str(tmp_path / "run.yaml"), "--data.spots.number", "8")
    assert config == CatConfig("wild_leopards", spots=Spots(8))
    assert config.open() == "8 spots"
    assert (config.title, CatConfig("street", "x").title) == ("wild_leopards", "x")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--data.source=house", "house"),
        ("--data.source=street", r"data\.source street needs data\.path, got None"),
        ("--data.source=wild_leopards --data.path=x", r"data\.path is for data\.source street alone; remove"),
        ("--data.source=street --data.path=x --data.spots.number=4", r"data\.spots is for .* wild_leopards"),
        ("--data.source=wild_leopards --data.tails=4", "too few spots"),
        ("--data.source=street --data.paht=x", r"unknown key data\.paht, did you mean data\.path\?"),
    ],
)
def test_what_a_source_does_not_take_is_refused_by_name(arguments: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(*arguments.split())


def test_a_source_that_there_is_none_of_is_refused_from_python_too() -> None:
    with pytest.raises(ValueError, match=r"data.source must be street or wild_leopards, got 'house'"):
        CatConfig("house")


def test_the_help_says_what_every_key_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "street (Cats of a street.); wild_leopards (Leopards.)" in text
    assert "--data.tails TAILS of each cat." in text
    assert "of the street. (of street)" in text


def test_the_names_of_the_sources_are_those_of_saved_configs() -> None:
    images, videos = (set(config.kind.by_name()) for config in (DataConfig, VideoDataConfig))
    assert images >= {"folder", "huggingface", "npz", "latents", "mnist"}
    assert videos >= {"folder", "latents", "moving_mnist", "films"}

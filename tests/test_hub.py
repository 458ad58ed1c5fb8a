"""Where stored pipelines and their parts lie, and what is said when they cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mhla_diffusion import hub

PLACE: dict[str, Any] = {
    "cache_dir": "cache", "force_download": True, "local_files_only": False, "revision": "v2",
    "token": "secret",
}  # fmt: skip


def write_index(folder: Path, **index: Any) -> str:
    """Write the index of a pipeline."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "APipeline", **index}))
    return str(folder)


def test_a_subfolder_alone_is_downloaded_from_the_place_that_is_given(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(path: str, **kwargs: Any) -> str:
        called.append((path, kwargs))
        return str(tmp_path)

    called: list[Any] = []
    monkeypatch.setattr(hub, "snapshot_download", download)
    (tmp_path / "small").mkdir()
    given = {**PLACE, "proxies": {"http": "proxy"}, "torch_dtype": "auto"}
    assert hub.locate_subfolder("someone/pets", "small", given) == str(tmp_path / "small")
    # Which knows no proxies; "small*" would bring smaller/ too.
    assert called == [("someone/pets", {"allow_patterns": "small/*", **PLACE})]


def test_arguments_of_the_hub_are_picked_out() -> None:
    place = {**PLACE, "proxies": {"http": "proxy"}}
    assert hub.hub_arguments({**place, "torch_dtype": "auto", "subfolder": "small"}) == place


@pytest.mark.parametrize(
    ("parts", "pixels"),
    [
        ({"transformer": ["diffusers", "A"]}, True),
        ({"transformer": ["diffusers", "A"], "vae": [None, None]}, True),
        ({"transformer": ["diffusers", "A"], "vae": ["diffusers", "B"]}, False),
        ({"transformer": ["diffusers", "A"], "vqvae": ["diffusers", "B"]}, False),
        ({"sample_size": 8}, False),
    ],
    ids=str,
)
def test_a_pipeline_without_an_autoencoder_works_on_pixels(
    tmp_path: Path, parts: dict[str, Any], pixels: bool
) -> None:
    assert hub.holds_pixels(write_index(tmp_path, **parts)) == pixels


def test_a_model_alone_is_not_said_to_work_on_pixels(tmp_path: Path) -> None:
    assert not hub.holds_pixels(str(tmp_path))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ImportError("no peft"), ImportError("no peft")),
        (OSError("full"), OSError("full")),
        (MemoryError("much"), MemoryError("much")),
        (ValueError("a/model has no weights"), ValueError("a/model has no weights")),
        (ValueError("bad value"), ValueError("a/model cannot be loaded: bad value")),
        (KeyError("a/model"), ValueError("a/model cannot be loaded: KeyError: 'a/model'")),
    ],
    ids=repr,
)
def test_what_cannot_be_loaded_is_named_once(error: Exception, expected: Exception) -> None:
    with pytest.raises(type(expected)) as raised, hub.load_errors("a/model"):
        raise error
    assert (type(raised.value), str(raised.value)) == (type(expected), str(expected))


def test_a_folder_without_a_config_is_not_taken_for_a_name_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no file named config\.json") as raised:
        hub.load_config(str(tmp_path))
    assert "is no folder here" not in str(raised.value)
    with pytest.raises(OSError, match="someone/pets is no folder here, and could not be read from the hub"):
        hub.load_config("someone/pets", cache_dir=tmp_path, local_files_only=True)


def test_times_of_experts_are_those_of_the_innermost_pipeline(tmp_path: Path) -> None:
    experts = {"transformer_2": ["diffusers", "A"]}
    outer = write_index(tmp_path, **experts, boundary_ratio=0.9)
    inner = write_index(tmp_path / "pipeline", **experts, boundary_ratio=0.5)
    (tmp_path / "transformer_2").mkdir()
    assert hub.expert_times(f"{outer}/transformer_2") == (0.0, 0.9)
    assert hub.expert_times(inner) == (0.5, 1.0)

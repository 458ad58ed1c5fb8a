"""What the command line accepts, and what it says of what it does not."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mhla_diffusion.help import plain_message, with_home
from mhla_diffusion.training import ImageTrainingConfig, VideoTrainingConfig, parse_config
from mhla_diffusion.training.config import as_dict, forbidden_changes, write_config

CONFIGS = Path(__file__).parents[2] / "configs"


def parse(*arguments: str) -> ImageTrainingConfig:
    config, _ = parse_config(ImageTrainingConfig, list(arguments))
    return config


def test_yaml_and_overrides(write_settings: Callable[[], Path]) -> None:
    config, resume = parse_config(
        ImageTrainingConfig,
        [
            f"--config={write_settings()}",
            "--trainer.optimizer.learning_rate=3e-4",
            "--model.mhla.gate",
            "false",
            "--sampling.class_labels",
            "[1, 0]",
            "--resume",
            "latest",
        ],
    )
    assert config.trainer.optimizer.learning_rate == 3e-4
    assert config.model.mhla is not None
    assert not config.model.mhla.gate
    assert config.model.mhla.cpe == "zero"
    assert config.sampling.class_labels == (1, 0)
    assert config.trainer.batch_size == 8
    assert resume == "latest"


def test_a_written_config_reads_back_as_itself(write_settings: Callable[[], Path], tmp_path: Path) -> None:
    config = parse("--config", str(write_settings()))
    write_config(config, tmp_path / "written.yaml")
    assert parse("--config", str(tmp_path / "written.yaml")) == config


@pytest.mark.parametrize(
    ("section", "key", "message"),
    [
        (
            "trainer",
            "max_step",
            r"unknown key trainer\.max_step, did you mean trainer\.max_steps\? Known there:",
        ),
        ("trainer.optimizer", "lr", r"unknown key trainer\.optimizer\.lr.*trainer\.optimizer\.learning_rate"),
        ("model.mhla", "block", r"unknown key model\.mhla\.block, did you mean model\.mhla\.blocks\?"),
        ("", "outputdir", r"unknown key outputdir, did you mean output_dir\?"),
    ],
)
def test_unknown_keys_in_the_file_and_on_the_command_line(
    settings: dict[str, Any], write_settings: Callable[[], Path], section: str, key: str, message: str
) -> None:
    dotted = f"{section}.{key}" if section else key
    with pytest.raises(ValueError, match=message):
        parse("--config", str(write_settings()), f"--{dotted}", "3")
    place = settings
    for name in section.split(".") if section else []:
        place = place[name]
    place[key] = 3
    with pytest.raises(ValueError, match=message):
        parse("--config", str(write_settings()))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--trainer.max_steps=0", "max_steps must be 1 or more, got 0"),
        ("--trainer.max_steps=many", "many"),
        ("--trainer.mixed_precision=bf17", "bf17"),
        ("--trainer.ema_decay=1.0", r"ema_decay must be in \[0, 1\), got 1.0"),
        ("--trainer.optimizer.learning_rate=.inf", "learning_rate must be positive and finite, got inf"),
        ("--trainer.optimizer.mixing_rate=.inf", "mixing_rate must be 0 or more, and finite, got inf"),
        ("--objective.shift=.inf", r"objective\.shift must be positive and finite, got inf"),
        ("--trainer.skip_steps=[0]", r"skip_steps must be counted from 1, got \(0,\)"),
        ("--trainer.max_grad_norm=0", "max_grad_norm must be positive"),
        ("--trainer.optimizer.schedule=constant", "the schedule constant has no warmup"),
        ("--trainer.trackers=[wandb]", "wandb is not installed"),
        ("--class_dropout=1", r"class_dropout must be in \[0, 1\)"),
        ("--model.num_layers=null", r"a new model needs model\.num_layers"),
        ("--model.init_from=somewhere", r"model\.init_from brings its own shape; remove model\.sample_size"),
        ("--model.mhla.cpe=one", "cpe"),
        ("--objective.shift=-1", r"objective\.shift must be positive"),
        ("--sampling.class_labels=[]", "must name at least one class"),
        ("--sampling.guidance_scale=.nan", "sampling.guidance_scale must be a number, got nan"),
        ("--config=nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_values_that_are_not_allowed(write_settings: Callable[[], Path], override: str, message: str) -> None:
    if "wandb" in override:
        wandb_installed = pytest.importorskip("importlib.util").find_spec("wandb") is not None
        if wandb_installed:
            pytest.skip("wandb is installed")
    with pytest.raises(ValueError, match=message):
        parse("--config", str(write_settings()), override)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "--model.mhla.blocks=4x4",
            "model.mhla.blocks: expected int or tuple, got 4x4; a list is written [A, B], in quotes",
        ),
        ("--model.mhla.blocks=0", "blocks must be an integer >= 1 or one per axis, got 0"),
        ("--model.mhla.gate=perhaps", "model.mhla.gate: expected true or false, got perhaps"),
        ("--model.mhla=5", "model.mhla: expected keys and values or null, got 5"),
        ("--objective.name=foo", "objective.name: expected one of 'flow', 'ddpm', got foo"),
        (
            "--mhla.blocks=4",
            "unknown key mhla.blocks, did you mean model.mhla.blocks? --help lists all of them",
        ),
    ],
)
def test_a_value_of_another_type_is_answered_in_one_line(
    write_settings: Callable[[], Path], override: str, message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        parse("--config", str(write_settings()), override)


def test_messages_of_our_own_stay_whole() -> None:
    assert plain_message("two lines:\n  - of ours\n") == "two lines:\n  - of ours\n"


def test_a_word_in_place_of_a_list_is_answered_with_how_lists_are_written(
    write_settings: Callable[[], Path],
) -> None:
    with pytest.raises(ValueError, match=r"tuple, got a cat; a list is written \[A, B\], in quotes$"):
        parse("--config", str(write_settings()), "--sampling.prompts", "a cat")


def test_changes_that_a_resumed_run_may_make(write_settings: Callable[[], Path]) -> None:
    config = parse("--config", str(write_settings()))
    saved = as_dict(config)
    assert forbidden_changes(saved, config) == []
    trainer = dataclasses.replace(
        config.trainer, max_steps=99, log_every=2, checkpoint_every=5, keep_checkpoints=7, num_workers=1
    )
    sampling = dataclasses.replace(config.sampling, every=5, class_labels=(1,))
    allowed = dataclasses.replace(config, output_dir="elsewhere", trainer=trainer, sampling=sampling)
    assert forbidden_changes(saved, allowed) == []
    changed = dataclasses.replace(
        config,
        class_dropout=0.2,
        model=dataclasses.replace(config.model, mhla=None),
        trainer=dataclasses.replace(config.trainer, seed=1),
    )
    lines = forbidden_changes(saved, changed)
    assert "class_dropout: 0.1 -> 0.2" in lines
    assert "trainer.seed: 0 -> 1" in lines
    assert any(line.startswith("model.mhla") for line in lines)


def test_a_field_that_was_not_there_yet_had_its_default(write_settings: Callable[[], Path]) -> None:
    config = parse("--config", str(write_settings()))
    saved = as_dict(config)
    for section, key in (("data", "split"), ("trainer", "optimizer"), ("objective", "mode_scale")):
        del saved[section][key]
    lines = forbidden_changes(saved, config)
    assert [line for line in lines if not line.startswith("trainer.optimizer")] == []
    assert "trainer.optimizer.learning_rate: 0.0001 -> 0.01" in lines, "it was not the default"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_in_the_repository_is_valid(path: Path) -> None:
    config_class = ImageTrainingConfig if path.stem.startswith("image_") else VideoTrainingConfig
    config, _ = parse_config(config_class, ["--config", str(path)])
    assert Path(config.output_dir).name == path.stem
    teacher = path.stem in (
        "image_dit_fashion_midi", "image_dit_fashion_small", "image_dit_fashion_softmax",
        "video_wan_moving_mnist_midi", "video_wan_moving_mnist_softmax",
    )  # fmt: skip
    attention = as_dict(config)["model"]["attention"]
    assert config.model.init_from or attention == ("softmax" if teacher else "mhla")
    assert set(yaml.safe_load(path.read_text())) <= set(as_dict(config))
    if "as in the paper" in path.read_text():  # which has no softmax window
        mhla = as_dict(config)["model"]["mhla"]
        assert "--mhla.local null" in path.read_text() if config.model.init_from else mhla["local"] is None


@pytest.mark.parametrize("given", ["~/runs/a", "--output_dir=~/runs/a", "yaml"])
def test_a_tilde_is_the_home(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    values = {"output_dir": "~/runs/b", "model": {"init_from": "~/models/a"}, "data": {"source": "mnist"}}
    values["trainer"] = {"batch_size": 2, "max_steps": 1}
    if given == "yaml":
        values["output_dir"] = "~/runs/a"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    words = [] if given == "yaml" else ["--output_dir", given] if given.startswith("~") else [given]
    config, _ = parse_config(ImageTrainingConfig, ["--config=~/run.yaml", *words])
    assert config.output_dir == str(tmp_path / "runs" / "a")
    assert config.model.init_from == str(tmp_path / "models" / "a")


def test_a_tilde_in_the_middle_is_none() -> None:
    assert with_home("--prompts=a ~/b") == "--prompts=a ~/b"
    assert with_home("~ and more") == "~ and more"


def test_an_empty_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").touch()
    with pytest.raises(ValueError, match=r"empty.yaml must map keys to values, got nothing"):
        parse("--config", str(tmp_path / "empty.yaml"))

"""Every command of the pages is one that its program takes: parsed by the parser that the program has."""

from __future__ import annotations

import argparse
import configparser
import importlib.util
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.launch import launch_command_parser
from jsonargparse import ArgumentParser
from sphinx.cmd.build import get_parser as sphinx_parser
from torch.distributed.run import get_args_parser as torchrun_parser

from mhla_diffusion.commands.main import MHLA, evaluate, main

from .pages import PAGES, ROOT, Command, block_commands, blocks, inline_code, inline_commands

COMMANDS = [
    command for page in PAGES for command in dict.fromkeys(block_commands(page) + inline_commands(page))
]


class Parsed(BaseException):
    """The arguments were taken; nothing was run."""


@pytest.fixture
def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands end where their arguments are parsed and their configs made."""
    parse_args, parse_plain_args = ArgumentParser.parse_args, argparse.ArgumentParser.parse_args

    def parse(self: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        self.instantiate(parse_args(self, *args, **kwargs))
        raise Parsed

    def parse_plain(self: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        parse_plain_args(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_plain)
    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    monkeypatch.chdir(ROOT)


def check(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise when a program does not take its command line."""
    program, *words = command.words
    if program in ("accelerate", "torchrun"):
        program, *words = launched(program, words)
    elif program in ("python", ".venv/bin/python"):
        program, *words = words[words[0] == "-m" :]
    if program == "bash":
        subprocess.run(["bash", "-n", words[0]], check=True, cwd=ROOT)
    elif program == "pip":
        check_requirements(words)
    elif program == "pre-commit":
        assert words == ["install"]
        assert (ROOT / ".pre-commit-config.yaml").is_file()
    elif program == "sphinx":
        assert not sphinx_parser().parse_known_args(words)[1]
    elif program == "docs/drawing.py":
        assert words == ["docs/idea.svg"]  # compared in test_readme.py
    elif program.startswith(("mhla", "scripts/")):
        run_to_parser(program, words if command.whole else [*words, "--help"], monkeypatch)
    else:
        assert importlib.util.find_spec(program), "a module of another package"


def launched(program: str, words: list[str]) -> list[str]:
    """Return what ``accelerate launch`` or ``torchrun`` starts."""
    if program == "accelerate":
        assert words.pop(0) == "launch"
    parser = launch_command_parser() if program == "accelerate" else torchrun_parser()
    arguments, unknown = parser.parse_known_args(words)
    assert not unknown
    config_file = getattr(arguments, "config_file", None)
    assert config_file is None or (ROOT / config_file).is_file()
    return [arguments.training_script, *arguments.training_script_args]


def check_requirements(words: list[str]) -> None:
    assert words[0] == "install"
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    extras = re.findall(r"\w+", words[1].partition("[")[2])
    assert set(extras) <= set(config["options.extras_require"])


def run_to_parser(program: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [program, *words])
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))  # as python has it that runs a script
    try:
        if program in ("mhla", "mhla_diffusion"):
            main()
        elif program == "mhla-evaluate":
            evaluate()
        else:
            runpy.run_path(str(ROOT / program), run_name="__main__")
    except Parsed:
        return
    except SystemExit as end:
        if end.code or "--help" not in words:
            raise


@pytest.mark.parametrize("command", COMMANDS, ids=str)
@pytest.mark.usefixtures("parse_only")
def test_a_command_is_one_that_its_program_takes(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    check(command, monkeypatch)


@pytest.mark.parametrize(
    "words",
    [
        ("python", "scripts/plan.py", "--model", "DiT-S/2", "--heigth", "256", "--width", "256"),
        ("mhla", "trian-image", "--config", "configs/image_dit_mnist.yaml"),
        ("accelerate", "launch", "scripts/train_image.py", "--config", "configs/image_dit_mnist.yaml",
         "--trainer.max_step", "5"),
        ("accelerate", "launch", "--proceses", "2", "scripts/train_image.py"),
        ("accelerate", "launch", "--config_file", "nowhere.yaml", "scripts/train_image.py"),
        ("torchrun", "--nproc_per_nod", "2", "--", "scripts/train_image.py"),
        ("torchrun", "--nproc_per_node", "2", "--", "scripts/train_image.py", "--trainer.max_step", "5"),
        ("python", "-m", "mhla_difusion", "plan"),
        ("pip", "install", ".[trane]"),
        ("bash", "scripts/nowhere.sh"),
        ("make", "docs"),
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.usefixtures("parse_only")
def test_a_command_that_is_wrong_is_found(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((AssertionError, SystemExit, subprocess.CalledProcessError, FileNotFoundError)):
        check(Command("page", words), monkeypatch)


def test_options_in_the_text_are_those_of_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    known: set[str] = {"--num_cpu_threads_per_process", "--config_file", "--from"}

    def collect(self: ArgumentParser, *args: Any, **kwargs: Any) -> Any:
        known.update(option for action in self._actions for option in action.option_strings)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", collect)
    for name, command in MHLA.commands.items():
        for below in command.commands or [""]:
            run_to_parser("mhla", [name, below] if below else [name], monkeypatch)
    named = {word for page in PAGES for text in inline_code(page) for word in re.findall(r"^--[\w.]+", text)}
    assert len(named) > 5
    assert named <= known, named - known


def test_blocks_are_commands_python_or_what_a_command_prints() -> None:
    languages = {block.language for page in PAGES for block in blocks(page)}
    assert languages <= {"bash", "python", ""}
    assert len(COMMANDS) > 40
    assert all(Path(ROOT / page).is_file() for page in PAGES)

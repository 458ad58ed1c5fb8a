"""``mhla``: what commands there are, and which file runs them; help and mistakes import none of those."""

from __future__ import annotations

import difflib
import importlib
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from .. import __version__
from .end import CommandError, exit_code
from .pages import page_for


class Command(NamedTuple):
    """Command: a line about it, and the commands below it, in groups."""

    line: str
    below: dict[str, dict[str, Command]] = {}  # noqa: RUF012 (never changed)

    @property
    def commands(self) -> dict[str, Command]:
        return {name: command for group in self.below.values() for name, command in group.items()}


def _lines(**lines: str) -> dict[str, dict[str, Command]]:
    return {"commands": {name: Command(line) for name, line in lines.items()}}


# Each is ``main`` in the file of its name; those below reach it as its last argument.
MHLA = Command(
    "Diffusion transformers with Multi-Head Linear Attention.",
    {
        "see what it saves": {
            "plan": Command("FLOPs, bytes, the bound on the speed-up, and the blocks to take"),
            "benchmark": Command(
                "speed and memory of MHLA beside its alternatives on this machine",
                _lines(
                    operator="the operator beside softmax, plain linear attention and the public code's way",
                    model="a denoising and a training step of a DiT with each attention",
                    layer="a layer of Wan with MHLA and with softmax",
                    loading="clips read per second beside a plain loop",
                    evaluation="scoring of images beside clean-fid and torch-fidelity",
                    evaluation_video="scoring of clips beside cd-fvd",
                    frechet="the Frechet distance beside scipy's sqrtm",
                    conversion="memory and time of conversion beside those of the stock model",
                ),
            ),
        },
        "prepare model and data": {
            "convert": Command("turn a stock model, or a checkpoint of the public code, into an MHLA model"),
            "cache-latents": Command(
                "encode a data set once, for training on latents",
                _lines(image="encode images", video="encode clips and their captions"),
            ),
            "export": Command(
                "write a training source as files, to look at or score against",
                _lines(
                    images="PNG files in class folders or with captions", videos="MP4 files with captions.csv"
                ),
            ),
        },
        "convert a trained softmax model": {
            "linearize": Command("all of it: align, choose, distil, report; interrupted, it goes on"),
            "align": Command("train each layer alone, in every candidate form, to give the teacher's output"),
            "choose": Command("the form of each layer within a budget, and the student of them"),
            "experiment": Command(
                "what conversion loses, over seeds, with tables",
                _lines(conversion="train a teacher, convert it in every way, and compare"),
            ),
            "report": Command(
                "what was lost and won, on a page",
                _lines(conversion="a teacher, and its students plain, aligned and distilled"),
            ),
        },
        "train": {
            "train-image": Command("train a model of images, of classes or of texts"),
            "train-video": Command("train a text-to-video model"),
            "export-checkpoint": Command("write a checkpoint of a training as a pipeline"),
        },
        "use": {
            "demo": Command("a page in the browser: a pipeline and its teacher side by side, with times"),
            "card": Command("write the model card of a pipeline with its scores, a picture and its licence"),
            "generate": Command(
                "generate into a folder with a manifest; interrupted, it goes on",
                _lines(image="images of classes or texts", video="videos of texts"),
            ),
        },
        "judge": {
            "evaluate": Command(
                "score images or videos against real ones",
                _lines(
                    image="score generated images",
                    video="score generated videos",
                    stats="write the statistics of images, to be given as --real from then on",
                    compare="put reports side by side",
                    steps="score every checkpoint of a training",
                    vbench="copy generated videos into the layout that VBench reads",
                    prompts="write the prompts of a benchmark of text to image, for generate",
                    layout="copy generated images into the layout that such a benchmark reads",
                ),
            ),
            "compare-attention": Command("variants of attention on one task, over seeds, as a page"),
            "analyze": Command("rank, entropy and mixing of a model's attention, as a report"),
        },
    },
)


def paths() -> list[list[str]]:
    """List the commands that have no others below them, each as the words that lead to it."""
    found: list[list[str]] = []
    for name, command in MHLA.commands.items():
        found += [[name, below] for below in command.commands] or [[name]]
    return found


def main() -> None:
    """Run the arguments of this process as ``mhla``."""
    _exit([], "mhla")


def evaluate() -> None:
    """Run the arguments of this process as ``mhla evaluate``, under the name ``mhla-evaluate``."""
    _exit(["evaluate"], "mhla-evaluate")


def run(*words: str) -> None:
    """Run the arguments of this process after ``words``, as a script of scripts/."""
    _exit(words, Path(sys.argv[0]).name)


def _exit(words: Sequence[str], prog: str) -> None:
    code = exit_code(lambda: _find_and_run(words, sys.argv[1:], prog))
    if code:
        sys.exit(code)


def _find_and_run(words: Sequence[str], arguments: list[str], prog: str) -> int | None:
    """Go down from ``mhla``, first by ``words``, then by arguments, to the command that takes the rest."""
    command, path, words = MHLA, [], list(words)
    while command.below:
        if words:
            name = words.pop(0)
        elif not arguments or arguments[0] in ("-h", "--help"):
            print(_help(command, prog), file=sys.stdout if arguments else sys.stderr)
            return 0 if arguments else 2
        elif arguments[0] == "--version" and command is MHLA:
            print(f"mhla {__version__}")
            return 0
        else:
            name, *arguments = arguments
            _require_known(name, command, prog)
            prog = f"{prog} {name}"
        command = command.commands[name]
        path.append(name)
    if (page := page_for(path, arguments, prog)) is not None:
        print(page.rstrip())
        return 0
    module = importlib.import_module(f".{path[0].replace('-', '_')}", __package__)
    return module.main(arguments, prog, *path[1:])


def _require_known(name: str, command: Command, prog: str) -> None:
    if name not in command.commands:
        close = difflib.get_close_matches(name, command.commands, n=1)
        hint = f", did you mean {close[0]}?" if close else "."
        known = ", ".join(command.commands)
        raise CommandError(f"{prog} has no command {name!r}{hint} It has: {known}", code=2)


def _help(command: Command, prog: str) -> str:
    width = max(map(len, command.commands))
    lines = [f"usage: {prog} COMMAND ...", "", command.line]
    for title, group in command.below.items():
        lines += ["", f"{title}:"]
        for name, below in group.items():
            more = f" ({', '.join(below.commands)})" if below.below else ""
            text = textwrap.wrap(below.line + more, 96 - width)
            lines += [f"  {start:{width}}  {line}" for start, line in zip_longest([name], text, fillvalue="")]
    lines += ["", f"{prog} COMMAND --help says what a command takes."]
    if command is MHLA:
        lines += [
            "On several processes: accelerate launch -m mhla_diffusion COMMAND ...",
            "What a command needs beside the package is in the extras train, eval, video, benchmark and app:",
            'in a copy of the repository pip install ".[train]", and so on.',
        ]
    return "\n".join(lines)

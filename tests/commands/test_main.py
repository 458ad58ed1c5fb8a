"""``mhla`` and the scripts: what there is, what it costs to ask, and how all of them end."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch

from mhla_diffusion import MHLAConfig
from mhla_diffusion.commands.end import CommandError, exit_code
from mhla_diffusion.commands.main import MHLA, evaluate, main, paths
from mhla_diffusion.commands.pages import live_page, page_for
from mhla_diffusion.commands.parsing import with_list

ROOT = Path(__file__).parents[2]

COMMANDS = [" ".join(path) for path in paths()]
SCRIPTS = {
    "analyze": "analyze",
    "benchmark operator": "benchmark operator",
    "cache_latents image": "cache-latents image",
    "cache_latents video": "cache-latents video",
    "card": "card",
    "convert": "convert",
    "evaluate video": "evaluate video",
    "demo": "demo",
    "export_checkpoint": "export-checkpoint",
    "export_images": "export images",
    "export_videos": "export videos",
    "generate image": "generate image",
    "generate video": "generate video",
    "plan": "plan",
    "train_image": "train-image",
    "train_video": "train-video",
}


def call(monkeypatch: pytest.MonkeyPatch, *words: str, script: str | None = None) -> int:
    """Run ``mhla words``, or a script, in this process, and return the exit code."""
    path = ROOT / "scripts" / f"{script}.py"
    monkeypatch.setattr(sys, "argv", [str(path) if script else "mhla", *words])
    try:
        if script:
            runpy.run_path(str(path), run_name="__main__")
        else:
            main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    return 0


def test_help_and_mistakes_import_nothing_that_takes_time() -> None:
    program = """
import sys
from mhla_diffusion.commands.main import main
for words in (["--help"], ["--version"], ["evaluate", "--help"], ["benchmark"], ["plam"],
              ["train-image", "--help"], ["train-video", "--model.mhla.help"], ["generate", "image", "-h"]):
    sys.argv = ["mhla", *words]
    try:
        main()
    except SystemExit:
        pass
heavy = {"torch", "diffusers", "transformers", "numpy", "jsonargparse", "tqdm"} & set(sys.modules)
assert not heavy, heavy
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert all(f"\n  {name} " in run.stdout for name in MHLA.commands)
    assert max(map(len, run.stdout.splitlines())) <= 100


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_its_help(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *command.split(), "--help") == 0
    text = capsys.readouterr().out
    assert text.startswith(f"usage: mhla {command} ")
    assert text.count("  --") > 2
    assert ":`" not in text, "cross-references are for the manual"


def test_the_pages_of_help_say_what_the_parsers_take() -> None:
    """After a change of options or docstrings: python scripts/write_help.py."""
    stored = {" ".join(path): page_for(path, ["--help"], " ".join(["mhla", *path])) for path in paths()}
    assert None not in stored.values()

    def words(text: str) -> list[str]:  # types and layout are of jsonargparse and argparse
        return re.sub(r"\(type: [^()]*(\([^()]*\)[^()]*)*\)|[-\s]", "", text).split()

    for path in paths():
        assert words(stored[" ".join(path)] or "") == words(live_page(path)), path


def test_help_on_settings_below_a_name_shows_those_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "train-image", "--config", "nowhere.yaml", "--model.mhla.help") == 0
    text = capsys.readouterr().out
    assert text.startswith("options below --model.mhla:\n")
    assert "  --model.mhla.blocks BLOCKS\n" in text
    assert "The paper uses 16 for images." in text
    options = {*re.findall(r"^  (--\S+)", text, re.MULTILINE)} - {"--model.mhla.help"}
    assert len(options) == len(dataclasses.fields(MHLAConfig))
    assert call(monkeypatch, "convert", "--mhla.help") == 0
    assert "--mhla.blocks" in capsys.readouterr().out
    assert call(monkeypatch, "convert", "--mhl.help") == 2


@pytest.mark.parametrize(("script", "command"), SCRIPTS.items())
def test_a_script_is_its_command(
    script: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *words = script.split()
    assert call(monkeypatch, *words, "--help", script=name) == 0
    of_script = capsys.readouterr().out
    assert of_script.startswith(f"usage: {' '.join([f'{name}.py', *words])} ")
    assert call(monkeypatch, *command.split(), "--help") == 0
    of_command = capsys.readouterr().out
    usage = " ".join(["usage:", f"{name}.py", *words])
    named = of_command.replace(f"usage: mhla {command}", usage)
    assert of_script.split() == named.split()


@pytest.mark.parametrize(
    "words", ["a b --out c --overwrite=true", "--out c a b --overwrite=true", "--overwrite=true --out c a b"]
)
def test_a_list_stands_before_options_or_behind(words: str) -> None:
    found = with_list(words.split(), "reports")
    assert found[:2] == ["--reports", "['a', 'b']"]
    assert sorted(found[2:]) == ["--out", "--overwrite=true", "c"]
    assert with_list(["--help"], "reports") == ["--help"]


def test_a_setting_of_a_task_on_the_command_line_is_answered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """``--comparison.task.steps`` reaches the options as a named tuple."""
    config = tmp_path / "tiny.yaml"
    config.write_text("name: tiny\ntask: {steps: 1}\nvariants: [{name: linear, attention: linear}]\n")
    words = ["--comparison", str(config), "--out", str(tmp_path), "--comparison.task.steps", "2"]
    assert call(monkeypatch, "compare-attention", *words) == 1
    error = capsys.readouterr().err
    assert "task must map all of its settings to values" in error
    assert "--comparison.settings '{KEY: [VALUE]}'" in error


@pytest.mark.parametrize("words", ["--config {}", "--config={}", "--comparison {}"])
def test_a_comparison_may_be_given_as_the_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, words: str
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text("name: tiny\ntask: {kind: recall}\nvariants: [{name: linear, attention: linear}]\n")
    given = [*words.format(config).split(), "--out", str(tmp_path), "--results", str(tmp_path / "results")]
    assert call(monkeypatch, "compare-attention", *given, "--page", "true") == 0
    assert "0 of 3 runs are done" in (tmp_path / "results/tiny.md").read_text()


def test_a_config_of_all_options_stays_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = tmp_path / "all.yaml"
    config.write_text(
        "comparison:\n  name: tiny\n  task: {kind: recall}\n"
        "  variants: [{name: linear, attention: linear}]\n"
        f"out: {tmp_path}\nresults: {tmp_path / 'results'}\n"
    )
    assert call(monkeypatch, "compare-attention", "--config", str(config), "--page", "true") == 0
    assert (tmp_path / "results/tiny.md").is_file()


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (
            "variants: [{name: a, atention: linear}]",
            "'atention' is not accepted, did you mean attention? Known",
        ),
        (
            "variants: [{name: a, foo: 1}]",
            "'foo' is not accepted. Known there: name, attention, mhla, training;",
        ),
        (
            "seed: [1]",
            "option 'seed', did you mean seeds? Known there: name, variants, task",
        ),
    ],
)
def test_a_mistyped_key_of_a_comparison_is_told_from_those_it_has(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, told: str
) -> None:
    config = tmp_path / "tiny.yaml"
    rest = "" if line.startswith("variants") else "variants: [{name: a}]\n"
    config.write_text(f"name: tiny\ntask: {{steps: 1}}\n{line}\n{rest}")
    words = ["--comparison", str(config), "--out", str(tmp_path)]
    assert call(monkeypatch, "compare-attention", *words) == 2
    assert told in capsys.readouterr().err


def test_long_values_on_the_command_line_are_no_files(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    variants = [{"name": f"variant {number}", "attention": "linear"} for number in range(20)]
    given = ["--comparison.variants", json.dumps(variants), "--comparison.name", "x", "--out", str(tmp_path)]
    assert call(monkeypatch, "compare-attention", *given, "--page=true", f"--results={tmp_path}") == 0
    assert "0 of 60 runs" in (tmp_path / "x.md").read_text()


def test_every_script_is_compared() -> None:
    doors = {
        path.stem for path in ROOT.glob("scripts/*.py") if "commands.main import run" in path.read_text()
    }
    assert {script.split()[0] for script in SCRIPTS} == doors


def test_python_m_is_the_command() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "mhla_diffusion", "--version"], capture_output=True, text=True, cwd=ROOT
    )
    assert run.stdout == "mhla 0.1.0\n"


def test_mhla_evaluate_is_the_command_under_its_own_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["mhla-evaluate", "compare", "--help"])
    evaluate()
    assert capsys.readouterr().out.startswith("usage: mhla-evaluate compare ")


DIT = "--model DiT-S/2 --height 256 --width 256"


@pytest.mark.parametrize(
    ("command", "message", "code"),
    [
        ("trian-image", "mhla has no command 'trian-image', did you mean train-image? It has: plan, ", 2),
        ("train_image", "did you mean train-image?", 2),
        ("--config", "mhla has no command '--config'. It has: plan, ", 2),
        ("cache-latents audio", "mhla cache-latents has no command 'audio'. It has: image, video", 2),
        ("benchmark operater", "did you mean operator?", 2),
        (f"plan {DIT} --heigth 9", "--heigth 9, did you mean --height? see mhla plan --help", 2),
        (f"plan {DIT} 9", "unrecognized arguments: 9; see mhla plan --help", 2),
        ("generate video --model nowhere --out OUT --prompts [a]", "nowhere", 1),
        ("generate image --model nowhere --out OUT --num 1 --clases 0", "did you mean --classes?", 2),
        ("generate image --model nowhere --out OUT --grid OUT", "is a folder: give the name of a PNG", 1),
        ("generate image --model nowhere --out OUT --grid a.jpg", "its name must end in .png, got a.jpg", 1),
        ("evaluate stats --real nowhere --out OUT", "unrecognized arguments: --real nowhere; see mhla", 2),
        ("plan --model DiT-S/2", "the following arguments are required: height, width; see", 2),
        ("plan --model DiT-S/2 --height tall --width 9", "height: expected int, got tall; see", 2),
        (f"plan {DIT} --dtype int8", "int8", 2),
        ("plan --model DiT-S/2 --height 100000000 --width 100000000", "does not run on 6250000 x 6250000", 1),
        (f"plan {DIT} --config BROKEN", "mhla plan --help", 2),
        (f"plan {DIT} --config nowhere.yaml", "nowhere.yaml", 2),
        (f"plan {DIT} --frames 9", "an image model has no frames, got frames=9; leave it out", 1),
        ("plan --model nowhere/at/all --height 256 --width 256", "nowhere/at/all", 1),
        ("evaluate compare nowhere other --out OUT", "nowhere", 1),
        ("evaluate image --real nowhere --generated nowhere --out OUT", "nowhere", 1),
        ("evaluate image --real nowhere --generated nowhere --out OUT --metrik kid", "mean --metrics?", 2),
        ("evaluate vbench --generated nowhere --out OUT", "nowhere", 1),
        ("convert --model nowhere --out OUT", "nowhere", 1),
        ("convert --from official-wan-mhla --model WEIGHTS --out OUT", "a file is broken: ", 1),
        ("convert --from official-wan-mhla --model nowhere.safetensors --out OUT", "nowhere.safetensors", 1),
        ("convert --model nowhere --out OUT --mhla.blocks 0", "blocks must be an integer >= 1", 1),
        ("analyze --model nowhere --out OUT", "nowhere", 1),
        ("analyze --model FOLDER --out OUT", "folder holds a config of no class, which has no MHLA form", 1),
        (
            "benchmark operator --shapes [2k]",
            "shapes must be of 0.25k, 1k narrow, 1k, 4k, 16k, wan, 1M, got '2k'",
            1,
        ),
        ("benchmark operator --repeats 0", "repeats must be at least 1, got 0", 1),
        ("benchmark model --sizes [256,8]", "sizes[1] must be at least 16, got 8", 1),
        ("benchmark frechet --dimension 0", "dimension must be at least 8, got 0", 1),
        ("benchmark loading --path nowhere", "nowhere", 1),
        ("export images --data.source mnist --num 0 --out OUT", "num must be 1 to 5000", 1),
        ("export images --data.source mnist --out=", "out is empty: leave it out, or say what it is", 1),
        ("train-image --config MNIST --output_dir=", "output_dir is empty", 1),
        ('evaluate compare --reports ["",OUT] --out OUT', "reports is empty: leave it out", 1),
        ("generate image --model nowhere --out OUT --prompts=", "prompt '': the prompt is empty", 1),
        ("export videos --data.source folder --data.path nowhere --out OUT", "nowhere", 1),
        ("cache-latents image --vae nowhere --output_dir OUT --siz 8", "unknown key siz", 1),
        ("cache-latents image --vae nowhere --output_dir OUT --data.source mnist", "nowhere", 1),
        ("train-image --config nowhere.yaml", "File does not exist: ", 1),
        ("train-image --config", "argument --config: expected one argument", 1),
        ("train-image --config BROKEN", "broken.yaml, line 2 is not YAML: expected the node content", 1),
        ("train-image --config BINARY", "binary.yaml is not YAML: 'utf-8' codec can't decode byte 0xff", 1),
        ("train-image --config FOLDER", "Path is not a file", 1),
        ("train-image --config LIST", "list.yaml must map keys to values, got a list", 1),
        ("train-image --config MNIST --trainer.max_step 3", "did you mean trainer.max_steps?", 1),
        ("train-image --config MNIST --trainer.max_steps many", "expected int, got many", 1),
        ("train-image --config MNIST --trainer.max_steps 0", "max_steps must be 1 or more, got 0", 1),
        ("train-image --config MNIST stray", "unrecognized arguments: stray", 1),
        ("train-image --config MNIST --output_dir OUT --resume latest", "OUT", 1),
        ("train-video", "required", 1),
    ],
)  # fmt: skip
def test_bad_input_ends_in_one_line(
    command: str,
    message: str,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "broken.yaml").write_text("trainer: {\n")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe")
    (tmp_path / "list.yaml").write_text("- trainer\n")
    (tmp_path / "weights.safetensors").write_bytes(b"half")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("{}")
    places = {
        "BROKEN": "broken.yaml",
        "BINARY": "binary.yaml",
        "LIST": "list.yaml",
        "WEIGHTS": "weights.safetensors",
        "FOLDER": "folder",
        "OUT": "out",
    }
    places = {name: str(tmp_path / place) for name, place in places.items()}
    places["MNIST"] = str(ROOT / "configs" / "image_dit_mnist.yaml")
    words = [places.get(word, word) for word in command.split()]
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, *words) == code
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert lines[-1].startswith("error: ")
    assert places.get(message, message) in lines[-1]
    assert sum(line.startswith("error: ") for line in lines) == 1
    assert "Traceback" not in output.err
    assert "usage:" not in output.err
    assert not output.out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("words", [(), ("evaluate",)])
def test_no_command_at_all_gives_the_help_and_fails(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, *words) == 2
    assert capsys.readouterr().err.startswith(f"usage: {' '.join(['mhla', *words])} COMMAND ...")


def test_a_missing_package_is_named_with_the_line_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert call(monkeypatch, "benchmark", "model", "--out", str(tmp_path)) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: the package matplotlib is not installed: pip install matplotlib; in a")


def raising(error: BaseException) -> int:
    def call() -> None:
        raise error

    return exit_code(call)


def test_a_hub_that_was_not_asked_is_told_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def call() -> None:
        raise OSError("a/b does not appear to have a file named model_index.json.")

    for offline in (False, True):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        assert exit_code(call) == 1
        assert ("the hub was not asked" in capsys.readouterr().err) is offline


def test_sigterm_leaves_nothing_temporary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reached = []

    def call() -> None:
        with tempfile.TemporaryDirectory(dir=tmp_path):
            is_ready, tell = os.pipe()
            child = os.fork()
            if not child:
                os.write(tell, b"1")
                time.sleep(30)
                os._exit(1)
            os.read(is_ready, 1)
            os.kill(child, signal.SIGTERM)
            reached.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    assert exit_code(call) == 143
    assert reached == [143], "a fork ends without a word"
    assert capsys.readouterr().err == "error: terminated\n"
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    before = signal.signal(signal.SIGTERM, lambda *_: reached.append(0))
    try:
        assert exit_code(lambda: os.kill(os.getpid(), signal.SIGTERM)) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
    assert reached == [143, 0], "who has plans for it keeps them"


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: 128 + signal.SIGTERM) == 143
    assert raising(CommandError("no", code=2)) == 2
    assert raising(KeyboardInterrupt()) == 130
    assert raising(ImportError("pip install it")) == 1
    assert raising(ValueError("several changes:\n  a: 1 -> 2\n  b: 3 -> 4")) == 1
    assert raising(OSError()) == 1
    assert raising(zipfile.BadZipFile("no zip")) == 1
    assert raising(MemoryError("no room")) == 1
    assert raising(torch.OutOfMemoryError("CUDA out of memory")) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: no",
        "error: interrupted",
        "error: pip install it",
        "error: several changes: a: 1 -> 2; b: 3 -> 4",
        "error: OSError",
        "error: a file is broken: no zip",
        "error: out of memory; take a smaller size or fewer at a time: no room",
        "error: out of memory; take a smaller size or fewer at a time: CUDA out of memory",
    ]
    assert exit_code(lambda: len(torch.empty(2**50))) == 1
    assert "error: out of memory; take a smaller size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("x"), ModuleNotFoundError("x", name="mhla_diffusion.nowhere")]
)
def test_a_fault_of_the_project_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        raising(error)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    run = subprocess.run(
        [sys.executable, "-m", "mhla_diffusion", "--help"], stdout=writing, stderr=subprocess.PIPE, cwd=ROOT
    )
    os.close(writing)
    assert run.returncode == 128 + signal.SIGPIPE
    assert run.stderr == b""

"""Bytes of any file of a checkpoint, a cache, an output or statistics that are no longer what was written."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.processes import Script

from .bench import Bench, ended
from .outcomes import Record, judge_end, output_of
from .subjects import digest_files

Damage = Callable[[random.Random, Path], str]


def _flip(draw: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes() or b"\0")
    position, bit = draw.randrange(len(content)), draw.randrange(8)
    content[position] ^= 1 << bit
    path.write_bytes(content)
    return f"bit {bit} of byte {position}"


def _overwrite(draw: random.Random, path: Path) -> str:
    content = bytearray(path.read_bytes() or b"\0")
    start = draw.randrange(len(content))
    size = min(draw.choice([1, 16, 512, 4096]), len(content) - start)
    new = bytes(size) if draw.random() < 0.5 else draw.randbytes(size)
    content[start : start + size] = new
    path.write_bytes(content)
    return f"bytes {start} to {start + size}"


def _cut(draw: random.Random, path: Path) -> str:
    content = path.read_bytes()
    size = draw.choice([0, draw.randrange(len(content) + 1)])
    path.write_bytes(content[:size])
    return f"cut at {size}"


def _extend(draw: random.Random, path: Path) -> str:
    path.write_bytes(path.read_bytes() + draw.randbytes(draw.randint(1, 100)))
    return "more bytes"


def _remove(draw: random.Random, path: Path) -> str:
    path.unlink()
    return "removed"


def _exchange(draw: random.Random, path: Path) -> str:
    others = sorted(other for other in path.parent.iterdir() if other.is_file() and other != path)
    if not others:
        return _cut(draw, path)
    other = draw.choice(others)
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)
    return f"exchanged with {other.name}"


def _web_page(draw: random.Random, path: Path) -> str:
    path.write_text("<!DOCTYPE html><html><body>503 Service Unavailable</body></html>")
    return "a web page"


DAMAGES: list[Damage] = [_flip, _flip, _overwrite, _overwrite, _cut, _extend, _remove, _exchange, _web_page]


@dataclass(frozen=True)
class Target:
    """What is damaged, and the command that then reads it.

    Args:
        name: of the target.
        make: writes the folder that is damaged.
        use: starts the command, with the damaged folder and the place of what it makes.
        made: hashes of what is made, out of both.
        files: which files of the folder are damaged.
    """

    name: str
    make: Callable[[Bench, Path], None]
    use: Callable[[Bench, Path, Path], Script]
    made: Callable[[Bench, Path, Path], dict[str, str]]
    files: str = "**/*"


def damaged_files(bench: Bench, number: int) -> list[Record]:
    """Damage a file by chance and read it: what comes of it is as undamaged, or it is said."""
    draw, target = random.Random(f"damage {number}"), TARGETS[number % len(TARGETS)]
    source, expected = _undamaged(bench, target)
    out = bench.fresh("damage", number)
    folder = out.parent / "copy"
    shutil.copytree(source, folder, symlinks=True)
    path = draw.choice(sorted(path for path in folder.glob(target.files) if path.is_file()))
    what = f"{path.relative_to(folder)}, {draw.choice(DAMAGES)(draw, path)}"
    result = ended(target.use(bench, folder, out))
    status, line = judge_end(result)
    if status == "done":
        made = target.made(bench, folder, out)
        said = next((line for line in output_of(result).splitlines() if _tells(line, path)), "")
        same = made == expected
        status = ("resumed" if same else "skipped") if said else ("harmless" if same else "wrong")
        line = said
    if status not in ("wrong", "traceback", "hang", "crash"):
        bench.clear(out)
    return [Record("damaged files", number, target.name, status, f"{what}: {line}")]


def _tells(line: str, path: Path) -> bool:
    words = ("damaged", "not what", "skipped", "cannot be read", "unreadable")
    return any(word in line for word in words) or ("WARNING" in line and path.name in line)


def _undamaged(bench: Bench, target: Target) -> tuple[Path, dict[str, str]]:
    """Return the folder that is damaged in copies, and what comes of it undamaged."""
    place = bench.place / "damage" / target.name.replace(" ", "-")
    source = place / "source"
    if not source.exists():
        partial = place / "source.partial"
        shutil.rmtree(place, ignore_errors=True)
        target.make(bench, partial)
        partial.rename(source)
    if target.name not in _expected:
        folder, out = bench.fresh("undamaged", TARGETS.index(target)).parent / "copy", place / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(source, folder, symlinks=True)
        result = target.use(bench, folder, out).finish()
        assert result.returncode == 0, result.stdout + result.stderr
        _expected[target.name] = target.made(bench, folder, out)
        shutil.rmtree(folder.parent)
    return source, _expected[target.name]


_expected: dict[str, dict[str, str]] = {}


def _done_again(name: str, subject: str, make: Callable[[Bench, Path], None], again: bool = False) -> Target:
    """Output of a command that is given to the same command again."""
    return Target(
        name,
        make,
        lambda bench, folder, out: bench.subjects[subject].start(folder, again=again),
        lambda bench, folder, out: bench.subjects[subject].digest(folder),
    )


def _begin_training(bench: Bench, folder: Path) -> None:
    result = bench.subjects["training"].run(folder, "--trainer.max_steps", "8")
    assert result.returncode == 0, result.stdout + result.stderr
    shutil.rmtree(folder / "pipeline")


def _complete(subject: str) -> Callable[[Bench, Path], None]:
    def make(bench: Bench, folder: Path) -> None:
        shutil.copytree(bench.undisturbed(subject)[0], folder)

    return make


def _train_on_latents(bench: Bench, folder: Path, out: Path) -> Script:
    return Script(
        "train_image", "--config", bench.given / "training.yaml", "--data.source", "latents",
        "--data.path", folder, "--data.flip", "false", "--model.in_channels", "4", "--trainer.max_steps", "4",
        "--sampling.every", "0", "--output_dir", out,
    )  # fmt: skip


def _copy_features(bench: Bench, folder: Path) -> None:
    out = bench.undisturbed("scoring")[0]
    shutil.copytree(out.with_name("out-cache"), folder)


def _score_with(bench: Bench, folder: Path, out: Path) -> Script:
    subject = bench.subjects["scoring"]
    return subject.start(out, "--cache", str(folder))


def _write_statistics(bench: Bench, folder: Path) -> None:
    folder.mkdir(parents=True)
    result = Script(
        "evaluate", "stats", "--images", bench.given / "images" / "cat", "--extractor", "efficientnet_lite0",
        "--out", folder / "real.npz",
    ).finish()  # fmt: skip
    assert result.returncode == 0, result.stderr


def _score_against(bench: Bench, folder: Path, out: Path) -> Script:
    return bench.subjects["scoring"].start(out, "--real", str(folder / "real.npz"), "--max_skipped", "0")


def _scores(bench: Bench, folder: Path, out: Path) -> dict[str, str]:
    report = bench.subjects["scoring"].digest(out)["report"]
    return {"report": report.replace(str(folder), "FOLDER")}


TARGETS = [
    _done_again("checkpoints", "training", _begin_training, again=True),
    _done_again("images", "images", _complete("images")),
    _done_again("videos", "videos", _complete("videos")),
    _done_again("latents", "caching", _complete("caching")),
    Target(
        "latents trained on", _complete("caching"), _train_on_latents,
        lambda bench, folder, out: digest_files(out, "pipeline/transformer/*.safetensors"),
    ),
    Target("features", _copy_features, _score_with, _scores),
    Target("statistics", _write_statistics, _score_against, _scores),
]  # fmt: skip
CASES = {"damaged files": damaged_files}

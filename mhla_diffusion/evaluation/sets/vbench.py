"""Generated videos in the layout that VBench reads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from pathlib import Path

from .videos import open_videos


def export_vbench(generated: str | Path, out: str | Path) -> int:
    """Copy videos as ``<prompt>-<index>.mp4`` and write prompts.json, which maps each file to its prompt.

    VBench finds the videos of its own prompts by these names; for other prompts give it prompts.json as
    ``--prompt_file`` with ``--mode=custom_input``. Slashes in a prompt become spaces in the name.

    Args:
        generated: folder of scripts/generate.py, whose manifest.json holds the prompts.
        out: folder that is not there yet.

    Returns:
        The number of videos.

    Raises:
        ValueError: when ``out`` exists, or a video has no prompt, is missing or has too long a one.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} is already there: give a new folder")
    videos = open_videos(generated)
    out.parent.mkdir(parents=True, exist_ok=True)
    seen: Counter[str] = Counter()
    prompts = {}
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as parent:
        temporary = Path(parent) / out.name
        temporary.mkdir()
        for name in videos.names:
            file, prompt = Path(videos.path) / name, videos.prompts.get(name)
            if prompt is None:
                raise ValueError(
                    f"{name} has no prompt: give a folder whose manifest.json holds one for each"
                )
            if not file.is_file():
                raise ValueError(f"{file} is listed in the manifest and missing")
            stem = " ".join(prompt.replace("/", " ").split())
            target = f"{stem}-{seen[stem]}{file.suffix}"
            if len(target.encode()) > 255:
                raise ValueError(f"the prompt of {name} is too long for the name of a file: {prompt[:80]}...")
            shutil.copyfile(file, temporary / target)
            prompts[target] = prompt
            seen[stem] += 1
        text = json.dumps(prompts, indent=2, ensure_ascii=False) + "\n"
        (temporary / "prompts.json").write_text(text, encoding="utf-8")
        temporary.rename(out)
    return len(prompts)

"""Generated videos in the layout that VBench reads."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from ...files.locking import new_folder
from ...files.writing import write_folder
from .samples import SampleSet
from .videos import open_videos


def export_vbench(generated: str | Path, out: str | Path) -> int:
    """Copy videos as ``<prompt>-<index>.mp4`` and write prompts.json, which maps each file to its prompt.

    VBench finds the videos of its own prompts by these names; for other prompts give it prompts.json as
    ``--prompt_file`` with ``--mode=custom_input``. Slashes in a prompt become spaces in the name.

    Args:
        generated: folder of mhla generate, whose manifest.json holds the prompts.
        out: folder that is not there yet.

    Returns:
        The number of videos.

    Raises:
        ValueError: when ``out`` exists, or a video has no prompt, is missing or has too long a one.
    """
    videos = open_videos(generated)
    folder, targets = Path(videos.path), _targets(videos)

    def write(place: Path) -> None:
        for name, target in targets.items():
            shutil.copyfile(folder / name, place / target)
        prompts = {target: videos.prompts[name] for name, target in targets.items()}
        text = json.dumps(prompts, indent=2, ensure_ascii=False) + "\n"
        (place / "prompts.json").write_text(text, encoding="utf-8")

    with new_folder(out) as target:
        write_folder(target, write)
    return len(targets)


def _targets(videos: SampleSet) -> dict[str, str]:
    """Names of files in VBench's layout, by those that the videos have."""
    seen: Counter[str] = Counter()
    targets = {}
    for name in videos.names:
        file, prompt = Path(videos.path) / name, videos.prompts.get(name)
        if prompt is None:
            raise ValueError(f"{name} has no prompt: give a folder whose manifest.json holds one for each")
        if not file.is_file():
            raise ValueError(f"{file} is listed in the manifest and missing")
        stem = " ".join(prompt.replace("/", " ").split())
        targets[name] = f"{stem}-{seen[stem]}{file.suffix}"
        seen[stem] += 1
        if len(targets[name].encode()) > 255:
            raise ValueError(f"the prompt of {name} is too long for the name of a file: {prompt[:80]}...")
    return targets

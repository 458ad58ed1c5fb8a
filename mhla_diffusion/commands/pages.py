"""Pages of ``--help``, kept as text: to make one is to import torch and all that a command needs.

``python scripts/write_help.py`` writes them again after a change of what they say; a test compares them.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

FOLDER = Path(__file__).parent / "help"
_WIDTH = 100


def page_for(path: Sequence[str], arguments: Sequence[str], prog: str) -> str | None:
    """Return the help that arguments ask for; None where they ask for none, or for what no page has.

    Args:
        path: of the command, such as ``["generate", "image"]``.
        arguments: ``--help`` or ``-h`` among them for all options, ``--model.mhla.help`` for those below one.
        prog: what the user typed before them.
    """
    asked = next((word for word in arguments if re.fullmatch(r"-h|--help|--[\w.]+\.help", word)), None)
    page = _file(path)
    if asked is None or not page.is_file():
        return None
    text = page.read_text("utf-8").replace(" ".join(["mhla", *path]), prog, 1)
    if asked in ("-h", "--help"):
        return text
    return _options_below(text, asked.removesuffix(".help"))


def live_page(path: Sequence[str]) -> str:
    """Make the help of a command of its parser, and that of settings which have one of their own."""
    page = _call(path, "--help")
    for option in re.findall(r"^  (--[\w.]+\.help) +Show the help for \w+Config and", page, re.MULTILINE):
        page += "\n" + _call(path, option).split("\n\n", 2)[2]
    return page


def _call(path: Sequence[str], option: str) -> str:
    module = importlib.import_module(f".{path[0].replace('-', '_')}", __package__)
    text, width = io.StringIO(), {"COLUMNS": str(_WIDTH)}
    with (
        mock.patch.dict(os.environ, width),
        contextlib.redirect_stdout(text),
        contextlib.suppress(SystemExit),
    ):
        module.main([option], " ".join(["mhla", *path]), *path[1:])
    return text.getvalue()


def write_pages(paths: Sequence[Sequence[str]]) -> None:
    """Write the pages of these commands, and remove those of others."""
    wanted = {_file(path): path for path in paths}
    for file in set(FOLDER.glob("*.txt")) - wanted.keys():
        file.unlink()
    for file, path in wanted.items():
        file.write_text(live_page(path), "utf-8")


def _file(path: Sequence[str]) -> Path:
    return FOLDER / f"{'-'.join(path)}.txt"


def _options_below(text: str, name: str) -> str | None:
    """The part of a page on options that begin with a name and a dot."""
    entries = re.findall(rf"^  {re.escape(name)}\.\S.*\n(?:   .*\n)*", text, re.MULTILINE)
    return f"options below {name}:\n\n{''.join(entries)}".rstrip() if entries else None

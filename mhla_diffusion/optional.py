"""Packages of the optional extras, imported at the moment they are needed."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from types import ModuleType


def require(module: str) -> ModuleType:
    """Import ``module``, which a package of an optional extra brings.

    Raises:
        ImportError: when it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(how_to_install(error.name or module)) from error


def how_to_install(module: str) -> str:
    """Return what to say about a missing module.

    That is the command that installs its package, which works wherever there is an index, and one for the
    whole extra that it is of, in a copy of the repository.
    """
    package = module.partition(".")[0]
    command, more = f"pip install {package}", ""
    for requirement in _requirements():  # the extras that others include come first
        what, _, condition = requirement.partition(";")
        name = re.split(r"[^\w.-]", what)[0]
        if re.sub("[-_.]", "", name) != package.replace("_", ""):
            continue
        what = what.replace(" ", "")
        command = f"pip install {name}" if what == name else f'pip install "{what}"'
        extra = re.search(r"extra == ['\"](\w+)", condition)
        # The last have everything: too much for one package.
        if extra is not None and extra[1] not in ("demo", "docs", "test"):
            more = f'; in a copy of the repository pip install ".[{extra[1]}]" brings all of its kind'
        break
    return f"the package {package} is not installed: {command}{more}"


def _requirements() -> list[str]:
    try:
        return importlib.metadata.requires("mhla-diffusion") or []
    except importlib.metadata.PackageNotFoundError:  # a copy that is not installed
        return []

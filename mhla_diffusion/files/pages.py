"""Pages of HTML that need no other file and no network, in one style, and the pictures in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from typing import Any

from ..optional import require


def render(package: str, template: str, *, folder: str = ".", **values: Any) -> str:
    """Return a template that lies in a package, filled.

    It may include ``base.css``, the style of all pages, and ``tables.css``, that of tables of numbers.

    Args:
        package: its name.
        template: name of the file.
        folder: of the package in which it lies.
        values: by the names that the template has for them.

    Raises:
        ImportError: when jinja2 is not installed.
    """
    jinja2 = require("jinja2")
    places = [jinja2.PackageLoader(package, folder), jinja2.PackageLoader(__package__, ".")]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, loader=jinja2.ChoiceLoader(places)
    )
    return environment.get_template(template).render(**values)


def written(save: Callable[..., Any], *args: Any, **options: Any) -> bytes:
    """Return what ``save(file, *args, **options)`` writes, as ``Image.save`` and ``Figure.savefig`` do."""
    buffer = io.BytesIO()
    save(buffer, *args, **options)
    return buffer.getvalue()


def data_uri(image: bytes, kind: str = "png") -> str:
    """Return a picture as an address that holds it."""
    return f"data:image/{kind};base64,{base64.b64encode(image).decode('ascii')}"

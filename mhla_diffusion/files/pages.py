"""Pages of HTML that need no other file and no network, in one style."""

from __future__ import annotations

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

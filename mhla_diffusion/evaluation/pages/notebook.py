"""Pages inside a notebook."""

from __future__ import annotations

import html


def in_frame(page: str) -> str:
    """Return a page as an element of another, which keeps its styles to itself."""
    return f'<iframe srcdoc="{html.escape(page)}" style="width: 100%; height: 720px; border: 0"></iframe>'

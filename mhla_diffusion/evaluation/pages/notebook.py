"""Pages inside a notebook."""

from __future__ import annotations

import html


def in_frame(page: str, *, height: int = 720) -> str:
    """Return a page as an element of another, which keeps its styles to itself."""
    style = f"width: 100%; height: {height}px; border: 0"
    return f'<iframe srcdoc="{html.escape(page)}" style="{style}"></iframe>'

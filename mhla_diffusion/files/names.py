"""Names of files and folders that nobody means when they say which folder their samples are in."""

from __future__ import annotations

# Of network drives, macOS and Windows, which put them beside what is there.
_OF_SYSTEMS = {"@eadir", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "lost+found", "desktop.ini"}
_OF_SYSTEMS |= {"system volume information", "thumbs.db"}


def is_hidden(name: str) -> bool:
    """Tell a name, without a folder, that begins with a dot or is one that systems give."""
    return (name.startswith(".") and name != "..") or name.lower() in _OF_SYSTEMS

"""Files on disk: written whole or not at all, videos, and the manifest of what was generated."""

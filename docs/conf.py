"""Configuration of the manual: Markdown pages, and a reference made of docstrings. Needs no network.

sphinx-build --fail-on-warning docs docs/build
"""

from __future__ import annotations

import mhla_diffusion

project = "mhla_diffusion"
version = release = mhla_diffusion.__version__
copyright = "the authors of mhla_diffusion"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["build"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "mhla_diffusion"
html_copy_source = False
html_show_sphinx = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_class_signature = "separated"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False

# Names of this package that resolve to nothing are errors, but for types in signatures, which go by the files
# that hold them. Other packages have pages of their own; short names are those of a room.
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!mhla_diffusion\.).*"),
    (r"py:(class|obj)", r"mhla_diffusion\.\w+\.\w+.*"),
]

"""Sphinx configuration."""

import tapes

project = "tapes"
author = "the tapes authors"
copyright = "2026, the tapes authors"
version = release = tapes.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"tapes {release}"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
myst_heading_anchors = 3
napoleon_use_ivar = True

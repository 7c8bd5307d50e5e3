"""Sphinx configuration."""

import vnm_compile

project = "vnm_compile"
author = "the vnm_compile developers"
copyright = f"2026, {author}"
release = vnm_compile.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "vnm_compile"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_member_order = "bysource"

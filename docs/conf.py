"""Sphinx configuration; build with ``make docs``."""

from importlib.metadata import version as installed_version

project = "finetuning-scheduler"
author = "The Fine-Tuning Scheduler authors"
version = release = installed_version(project)
extensions = ["myst_parser"]
html_theme = "furo"
html_show_copyright = False
html_title = "Fine-Tuning Scheduler"
exclude_patterns = ["_build"]
myst_heading_anchors = 3

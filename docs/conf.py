"""How Sphinx builds these pages; `scripts/docs` does. Every warning is an error."""

from __future__ import annotations

import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

project = "outboxkit"
author = "outboxkit contributors"
version = release = version_of("outboxkit")

extensions = ["llms_txt", "myst_parser", "sphinx_copybutton"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
exclude_patterns = ["_build", "_ext"]
source_suffix = {".md": "markdown"}
html_theme = "furo"
html_show_copyright = False  # the licence stands in the repository
html_title = "outboxkit"
html_copy_source = True
html_static_path = ["_static"]
html_css_files = ["outboxkit.css"]
copybutton_prompt_text = "$ "
copybutton_line_continuation_character = "\\"

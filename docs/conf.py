"""How Sphinx builds the site from these pages: offline, with warnings as errors (``make docs``)."""

import sys
from importlib.metadata import version as installed_version
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from tools.command_pages import write_command_pages  # noqa: E402
from tools.site_text import as_restructured_text, with_links_to_pages  # noqa: E402

write_command_pages(HERE / "reference" / "commands")

project = "kdpipe"
author = "the kdpipe authors"
version = release = installed_version("kdpipe")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["plots", "pictures"]
html_theme = "furo"
html_title = f"kdpipe {release}"
html_static_path: list[str] = []
html_copy_source = False
html_theme_options = {"source_view_link": "", "top_of_page_buttons": []}

myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 4
# The pages' own words where smart quotes would change commands.
smartquotes = False
highlight_language = "text"

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
# Other projects' names: their inventories would have to be fetched.
nitpick_ignore_regex = [
    ("py:.*", r"(?!(cache_spec|train|pipeline)\.).*"),
    # What a user of the Python pages never makes.
    ("py:class", r"cache_spec\.(layout|local_copy|masking|read_ahead|receipts)\..*"),
    ("py:class", r"train\.(teacher_targets|loss_divergences)\..*"),
]


def _read(app, name, source):
    source[0] = with_links_to_pages(source[0])


def _docstring(app, what, name, obj, options, lines):
    lines[:] = as_restructured_text(lines)


def setup(app):
    app.connect("source-read", _read)
    app.connect("include-read", lambda app, path, name, source: _read(app, name, source))
    app.connect("autodoc-process-docstring", _docstring)

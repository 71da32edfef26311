"""Configuration of the documentation site.

``sphinx-build -W docs/source docs/build`` builds it; lists of slugs, flags, memory and modules are
made from the code while it builds (``_ext/generated.py``).
"""

import importlib.util
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
for folder in (HERE / "_ext", ROOT, ROOT / "kernels", ROOT / "benchmarks"):
    sys.path.insert(0, str(folder))

import flashdreams  # noqa: E402

project = "flashdreams"
author = "the flashdreams authors"
project_copyright = author
release = version = flashdreams.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "generated"]
exclude_patterns = ["examples"]
myst_enable_extensions = ["deflist", "colon_fence"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "flashdreams"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
html_show_sourcelink = html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}

default_role = "py:obj"
# Two modules may name a class alike; an annotation under TYPE_CHECKING does not say which it means.
suppress_warnings = ["ref.python"]
autodoc_default_options = {
    "members": True,
    "member-order": "bysource",
    "show-inheritance": True,
    "ignore-module-all": True,
}
# The site needs the extra docs alone; pages on kernels show their Python side.
autodoc_mock_imports = [] if importlib.util.find_spec("triton") else ["triton"]
autodoc_typehints = "signature"
add_module_names = False
autodoc_typehints_format = "short"
autodoc_use_type_comments = False
python_maximum_signature_line_length = 80
napoleon_use_rtype = False
napoleon_custom_sections = [("Source", "notes_style")]

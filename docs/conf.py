"""How the pages in this folder become a site: `make docs`.

Sphinx, for MkDocs has had no release since 2024, and Material for MkDocs is maintained until May 2027 only.
"""

from importlib.metadata import version as installed_version
from typing import Any

from sphinx.application import Sphinx

project = "outbox"
version = release = installed_version("observation-outbox")
project_copyright = "the outbox developers"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
# The links in the pages go to headings too, as they do where the repository is browsed.
myst_heading_anchors = 3
# Every page of the site is a file that can be read without it.
html_theme = "furo"
html_title = "outbox"
html_copy_source = False
html_show_sphinx = False

# The docstrings say `name` where they mean code, which is a link where it is a name of ours.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80


def setup(app: Sphinx) -> None:
    """Let signatures be read that have a default which no source text stands for."""

    def readable(*told: Any) -> tuple[str, str | None] | None:
        signature, returned = told[-2:]
        return (signature.replace("<factory>", "..."), returned) if signature else None

    app.connect("autodoc-process-signature", readable)

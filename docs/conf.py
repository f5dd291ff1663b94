"""Sphinx settings: `make docs` builds a site from the pages in this folder.

Sphinx was chosen because MkDocs has had no release since 2024, and Material for MkDocs is maintained only until
May 2027.
"""

from importlib.metadata import version as installed_version
from typing import Any

from sphinx.application import Sphinx

project = "outbox"
version = release = installed_version("observation-outbox")
project_copyright = "the outbox developers"

extensions = ["myst_parser", "sphinx.ext.autodoc"]
# Links to headings work on the site as they do in the repository browser.
myst_heading_anchors = 3
# The site needs no copies of the sources: each page is also readable in the repository.
html_theme = "furo"
html_title = "outbox"
html_copy_source = False
html_show_sphinx = False

# In docstrings, `name` means code; if it is one of our names, it becomes a link.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80


def setup(app: Sphinx) -> None:
    """Replace `<factory>` in signatures, which is not valid Python, with `...`."""

    def readable(*told: Any) -> tuple[str, str | None] | None:
        signature, returned = told[-2:]
        return (signature.replace("<factory>", "..."), returned) if signature else None

    app.connect("autodoc-process-signature", readable)

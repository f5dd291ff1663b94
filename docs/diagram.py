"""Write the diagram of the lifecycle into the pages that show it: `python docs/diagram.py`."""

import re
from pathlib import Path

from outbox.lifecycle import diagram

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "docs/lifecycle.md")

for name in PAGES:
    page = ROOT / name
    text = page.read_text(encoding="utf-8")
    page.write_text(
        re.sub(r"```mermaid\n.*?```", f"```mermaid\n{diagram()}\n```", text, flags=re.DOTALL), encoding="utf-8"
    )

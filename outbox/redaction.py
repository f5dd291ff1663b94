"""How credentials are kept out of texts and tracebacks."""

from __future__ import annotations

import re
import sys
import traceback
from contextlib import contextmanager
from html.entities import codepoint2name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

REDACTED = "[REDACTED-TOKEN]"
"""What stands in a text in the place of a credential."""

_SHORTEST_SECRET = 8
_LONGEST_SPELLING = 12  # of one character: four percent-encoded bytes


def redact(text: str, secrets: Iterable[str]) -> str:
    """Replace the secrets of 8 characters or more, however the text spells them; put longer ones first."""
    for secret in secrets:
        if len(secret) >= _SHORTEST_SECRET:
            text = re.sub(_any_spelling(secret), REDACTED, text, flags=re.IGNORECASE)
    return text


def without_end(text: str, secrets: Iterable[str]) -> str:
    """Leave out as much of a text that was cut as could be the beginning of a secret, which no pattern finds."""
    return text[: -_LONGEST_SPELLING * max(map(len, secrets))]


@contextmanager
def private_locals() -> Iterator[None]:
    """Clear the local variables of the frames that an error leaves on its way here.

    Reports of crashes show them. The files and lines of the traceback stay, and so do errors from before.
    """
    before = sys.exc_info()[1]
    try:
        yield
    except BaseException as error:
        current: BaseException | None = error
        while current is not None and current is not before:
            traceback.clear_frames(current.__traceback__)
            current = current.__context__
        raise


def _any_spelling(secret: str) -> str:
    """Return a pattern for the text with any of its characters escaped as in JSON, Python, HTML or a URL."""
    # Beyond ASCII a server may answer in another encoding than the one that its text is read in.
    latin_as_utf8 = secret.encode("latin-1", "replace").decode(errors="replace")
    utf8_as_latin = secret.encode(errors="replace").decode("latin-1")
    return "|".join("".join(map(_spelling, reading)) for reading in {secret, latin_as_utf8, utf8_as_latin})


def _spelling(char: str) -> str:
    code = ord(char)
    percent = "".join(f"%{byte:02x}" for byte in char.encode(errors="replace"))
    entities = f"#0*{code}", f"#x0*{code:x}", codepoint2name.get(code, f"#{code}")
    return rf"(?:\\?{re.escape(char)}|\\u{code:04x}|\\x{code:02x}|{percent}|&(?:{'|'.join(entities)});)"

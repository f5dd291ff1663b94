"""The settings of a console, and what its pages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import current_app

from outbox.web.looks import Looks

if TYPE_CHECKING:
    from outbox.outbox import Outbox
    from outbox.web.security import MayEnter

EXTENSION = "outbox"
"""The name of the console among the extensions of its Flask application."""


class Console:
    """The outbox that a console shows, and its settings, as `create_app` describes them."""

    def __init__(  # noqa: PLR0913 - each setting is one
        self,
        outbox: Outbox,
        *,
        may_enter: MayEnter | None,
        secret: str | None,
        host_names: frozenset[str] | None,
        read_only: bool,
        hide_payloads: bool,
    ) -> None:
        self.outbox = outbox
        self.may_enter = may_enter
        self.secret = secret
        self.host_names = host_names
        self.read_only = read_only
        self.hide_payloads = hide_payloads
        self.looks = Looks(outbox, with_bodies=not hide_payloads)


def console() -> Console:
    """Return the console of the current request."""
    found: Console = current_app.extensions[EXTENSION]
    return found

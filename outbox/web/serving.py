"""Serves the console by itself."""

from __future__ import annotations

import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import waitress

from outbox.web import create_app
from outbox.web.security import LOCAL_NAMES, from_this_machine

if TYPE_CHECKING:
    from flask import Flask

    from outbox.outbox import Outbox

_THREADS = 8


def app_alone(
    outbox: Outbox, *, secret: str | None, host_names: Iterable[str], read_only: bool, hide_payloads: bool
) -> Flask:
    """Return the console for a program of its own. Without a secret, only this machine may use it.

    It answers to the names of this machine and to `host_names`.
    """
    return create_app(
        outbox,
        secret=secret,
        may_enter=None if secret else from_this_machine,
        host_names={*LOCAL_NAMES, *host_names},
        read_only=read_only,
        hide_payloads=hide_payloads,
    )


class Server:
    """Listens on a port at once, and answers during `run`. Port 0 picks a free port.

    Raises OSError, which names the port, if it can't listen there.
    """

    def __init__(self, app: Flask, host: str, port: int) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            # waitress leaks its threads and sockets if it fails to bind one itself.
            listening = socket.create_server((host, port), family=family)
        except OSError as error:
            raise OSError(error.errno, f"port {port} of {host}: {error.strerror}") from None
        self._server: Any = waitress.create_server(
            app,
            sockets=[listening],
            threads=_THREADS,
            ident=None,
            # `from_this_machine` needs the headers of proxies, to refuse their requests.
            clear_untrusted_proxy_headers=False,
        )
        self.port: int = self._server.effective_port

    def run(self) -> None:
        """Answer requests until Ctrl-C."""
        self._server.run()

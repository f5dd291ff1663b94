"""Serves the console by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import waitress

if TYPE_CHECKING:
    from flask import Flask

_THREADS = 8


class Server:
    """Listens on a port at once, and answers during `run`. Port 0 picks a free port."""

    def __init__(self, app: Flask, host: str, port: int) -> None:
        self._server: Any = waitress.create_server(
            app,
            host=host,
            port=port,
            threads=_THREADS,
            ident=None,
            # `from_this_machine` needs the headers of proxies, to refuse their requests.
            clear_untrusted_proxy_headers=False,
        )
        self.port: int = self._server.effective_port

    def run(self) -> None:
        """Answer requests until Ctrl-C."""
        self._server.run()

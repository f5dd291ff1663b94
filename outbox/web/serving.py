"""Serves the console by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import waitress

if TYPE_CHECKING:
    from flask import Flask

_THREADS = 8


class Server:
    """Listens on a port from the start, and answers while it runs. Port 0 picks a free one."""

    def __init__(self, app: Flask, host: str, port: int) -> None:
        self._server: Any = waitress.create_server(
            app,
            host=host,
            port=port,
            threads=_THREADS,
            ident=None,
            # The console looks at the headers of proxies: it refuses their requests if it has no secret.
            clear_untrusted_proxy_headers=False,
        )
        self.port: int = self._server.effective_port

    def run(self) -> None:
        """Answer requests until Ctrl-C."""
        self._server.run()

"""The adapter that gives requests our connections, and reads less of the answer than its own adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import requests
from requests.adapters import HTTPAdapter

from outbox.upload.deadline import Connection, TlsConnection, progress


class Adapter(HTTPAdapter):
    """Sends on connections that know the deadline, and leaves the answer's body and cookies unread."""

    def get_connection_with_tls_context(
        self,
        request: requests.PreparedRequest,
        verify: bool | str | None,  # noqa: FBT001 - the base's signature
        proxies: Mapping[str, str] | None = None,
        cert: tuple[str, str] | str | None = None,
    ) -> Any:
        """Return the pool of our connections."""
        pool: Any = super().get_connection_with_tls_context(request, verify, proxies, cert)
        pool.ConnectionCls = TlsConnection if pool.scheme == "https" else Connection
        return pool

    def request_url(self, request: requests.PreparedRequest, proxies: Mapping[str, str] | None) -> str:
        """Return the target without its query, which the connection adds: urllib3 logs what it gets here."""
        target, mark, query = super().request_url(request, proxies).partition("?")
        progress().query = mark + query
        return target

    def cert_verify(
        self,
        conn: Any,
        url: str,  # noqa: ARG002 - the base's signature
        verify: bool | str | None,  # noqa: FBT001 - the base's signature
        cert: Any,
    ) -> None:
        """Verify certificates whatever the scheme of the URL."""
        # If the URL is http, the base class accepts any certificate of an https proxy.
        super().cert_verify(conn, "https:", verify, cert)  # type: ignore[no-untyped-call]  # the stubs leave it out

    def build_response(
        self,
        req: requests.PreparedRequest,  # noqa: ARG002 - the base's signature
        resp: Any,
    ) -> requests.Response:
        """Return the status and the unread answer."""
        # The base class also parses cookies. A service could make that take seconds, or emit warnings.
        response = requests.Response()
        response.status_code, response.raw = resp.status, resp
        return response

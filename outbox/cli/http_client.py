"""The `HttpClient` of `outbox flush` and `outbox run`, as their options and the file say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from outbox.cli.credentials import noticing
from outbox.cli.service import Service
from outbox.failures import ConfigurationError
from outbox.upload.auth import NO_AUTH, ApiKey
from outbox.upload.client import HttpClient
from outbox.upload.formats import CloudEvents
from outbox.upload.oauth import ClientCredentials
from outbox.upload.signing import StandardWebhooks

# Settings that `HttpClient` knows under the same name.
_SAME = (
    "read_answer",
    "max_answer_bytes",
    "max_batch_bytes",
    "connect_timeout_ms",
    "read_timeout_ms",
    "deadline_ms",
)
_CLOUDEVENTS = ("cloudevents", "cloudevents-batch")


def http_client(service: Service, on_new_credentials: Callable[[], object] | None) -> HttpClient:
    """Return the client. It calls `on_new_credentials` when the credentials have changed."""
    table = service.table.settings
    settings = {name: table[name] for name in _SAME if name in table} | _connection(service)
    if "compression" in table:
        settings[table["compression"]] = True
    settings |= {
        name: value
        for name, value in (("path", _path(service)), ("format", _format(service)))
        if value is not None
    }
    headers: dict[str, Any] = {name: service.table.header(name) for name in table.get("headers", {})}
    return HttpClient(
        service.base_url,
        headers={**headers, **service.headers},
        sign=_sign(service),
        **_login(service, on_new_credentials),
        **settings,
    )


def _format(service: Service) -> Any:
    table = service.table.settings
    form = service.form or table.get("format")
    attributes = {name: table[name] for name in ("source", "subject") if name in table}
    if not attributes:
        return form
    if form not in _CLOUDEVENTS:
        raise ConfigurationError(
            f"{service.table.where}{' and '.join(attributes)} set, but the format is {form or 'json'!r},"
            f" expected {' or '.join(_CLOUDEVENTS)}"
        )
    return CloudEvents(**attributes, batch=form != _CLOUDEVENTS[0])


def _path(service: Service) -> str | None:
    table = service.table.settings
    if service.path is not None:
        return service.path
    if "path_env" in table or "path_file" in table:
        return service.table.secret("path")() or ""
    path: str | None = table.get("path")
    return path


def _connection(service: Service) -> dict[str, Any]:
    table = service.table.settings
    settings: dict[str, Any] = {"allow_insecure": service.allow_insecure or table.get("allow_insecure", False)}
    if "verify" in table:
        settings["verify"] = service.table.path(table["verify"])
    if "cert" in table:
        cert = table["cert"]
        settings["cert"] = (
            service.table.path(cert) if isinstance(cert, str) else tuple(map(service.table.path, cert))
        )
    return settings


def _sign(service: Service) -> StandardWebhooks | None:
    if not {"webhook_secret_env", "webhook_secret_file"} & service.table.settings.keys():
        return None
    return StandardWebhooks(service.table.secret("webhook_secret"))


def _login(service: Service, on_new_credentials: Callable[[], object] | None) -> dict[str, Any]:
    table = service.table.settings
    if service.auth == "none":
        return {"auth": NO_AUTH}
    secret = service.secret if on_new_credentials is None else noticing(service.secret, on_new_credentials)
    if service.auth == "basic":
        return {"auth": (lambda: table["user"] if secret() else None, secret)}
    if service.auth == "api-key":
        return {"auth": ApiKey(table["api_key_header"], secret)}
    if service.auth == "oauth2":
        scope = table.get("scope")
        return {
            "auth": ClientCredentials(
                table["token_url"], table["client_id"], secret, scope=scope, **_connection(service)
            )
        }
    return {"token": secret}

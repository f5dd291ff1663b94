"""Where and how `outbox flush` and `outbox run` deliver: their options, and what the file says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click

from outbox.cli.config import LOGINS, Config
from outbox.cli.credentials import Reader, first_of
from outbox.cli.display import escape
from outbox.cli.options import config_of, import_module
from outbox.failures import ConfigurationError, OutboxError
from outbox.upload.redaction import without_credentials
from outbox.upload.secrets import LIKELY_CREDENTIAL

if TYPE_CHECKING:
    from outbox.records import UploadClient

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def _headers(_context: click.Context, _param: click.Parameter, value: tuple[str, ...]) -> dict[str, str]:
    headers = {}
    for given in value:
        name, colon, text = given.partition(":")
        if LIKELY_CREDENTIAL.search(name):
            raise click.BadParameter(
                f"{escape(name)} is the name of a credential, which other users of this machine could read in the"
                " list of processes; name it in outbox.toml"
            )
        if not colon:
            raise click.BadParameter(f"{escape(given)!r}, expected NAME:VALUE, such as X-Shop:17")
        headers[name] = text.strip()
    return headers


class _Factory(NamedTuple):
    name: str
    make: Callable[[], Any]

    def client(self) -> UploadClient:
        try:
            client = self.make()
        except OutboxError:
            raise
        except Exception as error:
            text = without_credentials(error, None)
            raise ConfigurationError(f"--client {self.name} failed: {type(error).__name__}: {text}") from error
        if not callable(getattr(client, "upload", None)) or not hasattr(type(client), "logged_in"):
            raise ConfigurationError(
                f"--client {self.name} returned a {type(client).__name__}, expected an UploadClient, which has"
                " upload() and logged_in"
            )
        made: UploadClient = client
        return made


def _factory(_context: click.Context, _param: click.Parameter, value: str | None) -> _Factory | None:
    if value is None:
        return None
    module, _, name = value.partition(":")
    if not module or not name:
        raise click.BadParameter(f"{escape(value)!r}, expected MODULE:FACTORY, such as shop.delivery:client")
    make = getattr(import_module(module), name, None)
    if not callable(make):
        raise click.BadParameter(f"the module {module} has no function {escape(name)!r}")
    return _Factory(value, make)


_OPTIONS = (
    click.option("--url", envvar="OUTBOX_URL", show_envvar=True, help="Base URL of the service."),
    click.option(
        "--path", metavar="PATH", help='Path after the base URL; "" is none. Default: /cloud/observations.'
    ),
    click.option(
        "--format",
        "form",
        metavar="NAME",
        help="Shape of a request: json (the default), json:KEY, ndjson, single, cloudevents or cloudevents-batch.",
    ),
    click.option(
        "--header",
        "headers",
        metavar="NAME:VALUE",
        multiple=True,
        callback=_headers,
        help="Header of each request. Repeatable.",
    ),
    click.option("--no-auth", is_flag=True, help="Send no credentials."),
    click.option("--allow-insecure", is_flag=True, help="Allow http to other machines."),
    click.option(
        "--client",
        "factory",
        metavar="MODULE:FACTORY",
        callback=_factory,
        help="Deliver with the client that this function returns. The module is installed or in the current"
        " directory.",
    ),
)


def service_options(command: Decorated) -> Decorated:
    """Add the options that say where and how to deliver, and pass them to the command as `service`."""

    @wraps(command)
    def connected(*args: Any, **options: Any) -> Any:
        given = {name: options.pop(name) for name in Service._fields if name in options}
        context = click.get_current_context()
        return command(*args, service=Service(config_of(context), context.obj, **given), **options)

    decorated: Any = connected
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    options: Decorated = decorated
    return options


class Service(NamedTuple):
    """Where and how to deliver, as the options and the file say."""

    config: Config
    environment_token: Reader
    url: str | None = None
    path: str | None = None
    form: str | None = None
    headers: Mapping[str, str] = MappingProxyType({})
    no_auth: bool = False
    allow_insecure: bool = False
    factory: _Factory | None = None

    @property
    def name(self) -> str:
        """Where the events go, in words."""
        return self.base_url if self.factory is None else self.factory.name

    @property
    def way_to_log_in(self) -> str:
        """What to do if the client is not logged in."""
        if self.factory is not None:
            return f"see the client of {self.factory.name}"
        ways = ["OUTBOX_TOKEN", "OUTBOX_TOKEN_FILE"] if self.auth == "bearer" else []
        named = (f"{LOGINS[self.auth].secret}_{source}" for source in ("env", "file"))
        ways += [f"what {name} names" for name in named if name in self.config.destination]
        return f"set {' or '.join(ways)}"

    @property
    def login_problem(self) -> str | None:
        """Why `outbox flush` could not log in now, in words. None if it could, or if no service is known."""
        if self.auth == "none" or not (self.url or self.config.destination.get("url")):
            return None
        try:
            return None if self.secret() else f"not logged in, there are no credentials; {self.way_to_log_in}"
        except ConfigurationError as error:
            return f"not logged in: {error}"

    @contextmanager
    def client(self, on_new_credentials: Callable[[], object] | None = None) -> Iterator[UploadClient]:
        """Open the client, and close it at the end.

        `on_new_credentials` is called when the credentials have changed.
        """
        if self.factory is not None:
            client = self.factory.client()
        else:
            from outbox.cli.http_client import http_client  # noqa: PLC0415 - slow: it loads requests, which only delivery needs

            client = http_client(self, on_new_credentials)
        try:
            yield client
        finally:
            getattr(client, "close", lambda: None)()

    @property
    def base_url(self) -> str:
        """The URL of the service. Raises `UsageError` if there is none."""
        url: str | None = self.url or self.config.destination.get("url")
        if url is None:
            raise click.UsageError(
                "there is no URL of a service, expected --url, OUTBOX_URL, url in outbox.toml, or --client"
            )
        return url

    @property
    def auth(self) -> str:
        """How to log in, a key of `LOGINS`."""
        auth: str = "none" if self.no_auth else self.config.destination.get("auth", "bearer")
        return auth

    @property
    def secret(self) -> Reader:
        """A function that reads the secret that `auth` needs."""
        if self.auth == "bearer":
            return first_of(self.environment_token, self.config.secret("token"))
        return self.config.secret(LOGINS[self.auth].secret or "", is_word=self.auth != "basic")


def login_problem() -> str | None:
    """Return why `outbox flush` could not log in now, None if it could.

    The settings are those of the environment and of the file that this command reads.
    """
    context = click.get_current_context()
    url = os.environ.get("OUTBOX_URL")
    return Service(config_of(context), context.obj, url).login_problem

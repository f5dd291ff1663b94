"""The settings of a service for `outbox flush` and `outbox run`, from their options and from outbox.toml."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import click
from click.core import ParameterSource

from outbox.cli.config_destination import LOGINS
from outbox.cli.config_table import Table
from outbox.cli.credentials import Reader, first_of
from outbox.cli.options import config_of, destination_option, import_module
from outbox.destinations import DEFAULT_NAME, stored
from outbox.failures import ConfigurationError, OutboxError
from outbox.upload.redaction import without_credentials
from outbox.upload.secrets import LIKELY_CREDENTIAL
from outbox.words import escape

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
    destination_option(
        "--destination",
        words="Deliver only to this destination, which the next options describe. Without it, they describe"
        " `default`.",
    ),
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

_DESCRIBING = ("url", "path", "form", "headers", "no_auth", "allow_insecure", "factory")
"""The options that describe a service. They are fields of `Service`."""


def service_options(command: Decorated) -> Decorated:
    """Add the options that say where and how to deliver, and pass them to the command as `services`."""

    @wraps(command)
    def connected(*args: Any, **options: Any) -> Any:
        context = click.get_current_context()
        flags = {name: options.pop(name) for name in _DESCRIBING}
        given = {
            name: value
            for name, value in flags.items()
            if context.get_parameter_source(name) is not ParameterSource.DEFAULT
        }
        destination = options.pop("destination")
        if (
            destination not in (None, DEFAULT_NAME)
            and context.get_parameter_source("url") is ParameterSource.ENVIRONMENT
        ):
            del given["url"]
        return command(*args, services=_services(destination, given), **options)

    decorated: Any = connected
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    options: Decorated = decorated
    return options


class Service(NamedTuple):
    """Where and how to deliver the events of a destination, as the options and the file say."""

    destination: str
    table: Table
    environment_token: Reader
    known: Sequence[str]
    """The destinations that the file describes."""
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
        named = [f"{LOGINS[self.auth].secret}_{source}" for source in ("env", "file")]
        ways = ["OUTBOX_TOKEN", "OUTBOX_TOKEN_FILE"] if self.auth == "bearer" and self._is_default else []
        ways += [f"what {name} names" for name in named if name in self.table.settings]
        if not ways:
            ways = [f"{' or '.join(named)} in [destinations.{self.destination}] of outbox.toml"]
        return f"set {' or '.join(ways)}"

    @property
    def login_problem(self) -> str | None:
        """Why `outbox flush` could not log in now, in words. None if it could, or if no service is known."""
        if self.auth == "none" or not (self.url or self.table.settings.get("url")):
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
        url: str | None = self.url or self.table.settings.get("url")
        if url is None:
            of = "" if self._is_default else f" for the destination {self.destination}"
            ways = "--url, OUTBOX_URL" if self._is_default else "--url"
            others = (
                f"; the file describes {', '.join(self.known)}; --destination chooses one" if self.known else ""
            )
            raise click.UsageError(
                f"there is no URL of a service{of}, expected {ways}, url in outbox.toml, or --client{others}"
            )
        return url

    @property
    def _is_default(self) -> bool:
        return self.destination == DEFAULT_NAME

    @property
    def auth(self) -> str:
        """How to log in, a key of `LOGINS`."""
        auth: str = "none" if self.no_auth else self.table.settings.get("auth", "bearer")
        return auth

    @property
    def secret(self) -> Reader:
        """A function that reads the secret that `auth` needs."""
        if self.auth == "bearer":
            return first_of(self.environment_token, self.table.secret("token"))
        return self.table.secret(LOGINS[self.auth].secret or "", is_word=self.auth != "basic")


class Services(NamedTuple):
    """The services of a command."""

    chosen: Service
    """The service that the options describe."""
    every: Sequence[Service]
    """Only the chosen one if it was named, else all that the options, the environment and the file describe."""


def _services(destination: str | None, given: Mapping[str, Any]) -> Services:
    """Return the services; `given` are the options for the destination, or for the default one."""
    context = click.get_current_context()
    config = config_of(context)
    known = [*config.destinations]
    chosen = destination or DEFAULT_NAME
    is_chosen_alone = destination is not None or not known
    names = [chosen] if is_chosen_alone else known if chosen in known or not given else [chosen, *known]
    services = {
        name: Service(
            name,
            config.destination(name),
            context.obj if name == DEFAULT_NAME else lambda: None,
            known,
            **(given if name == chosen else {}),
        )
        for name in {chosen: None, **dict.fromkeys(names)}
    }
    return Services(services[chosen], [services[name] for name in names])


def login_problems() -> dict[str, str]:
    """Return why `outbox flush` could not log in now, by stored name of the destination.

    The settings are those of the environment and of the file that this command reads.
    """
    url = os.environ.get("OUTBOX_URL")
    services = _services(None, {"url": url} if url else {}).every
    problems = ((stored(service.destination), service.login_problem) for service in services)
    return {destination: problem for destination, problem in problems if problem is not None}

"""The command web: the console in a browser."""

from __future__ import annotations

import os
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import ip_address
from typing import Any, NamedTuple

import click

from outbox.cli.bounds import policy_of, warn_undelivered_option
from outbox.cli.display import say
from outbox.cli.endings import sigterm_like_ctrl_c
from outbox.cli.options import uses_database
from outbox.cli.service import login_problems
from outbox.failures import ConfigurationError
from outbox.outbox import Outbox
from outbox.words import escape

VARIABLE = "OUTBOX_WEB_SECRET"

_LARGEST_PORT = 65_535
_EXPECTED = "an address and a port, such as 127.0.0.1:8765 or [::1]:8765"


class Address(NamedTuple):
    """Where the console listens."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it."""
        return ip_address(self.host).is_loopback

    @property
    def in_url(self) -> str:
        """The host as URLs and Host headers write it."""
        return f"[{self.host}]" if ":" in self.host else self.host


def _address(_context: click.Context, _param: click.Parameter, value: str) -> Address:
    host, _, port = value.rpartition(":")
    with suppress(ValueError):
        address = Address(str(ip_address(host.strip("[]"))), int(port))
        if address.in_url == host and port.isdigit() and address.port <= _LARGEST_PORT:
            return address
    raise click.BadParameter(f"{escape(value)!r}, expected {_EXPECTED}")


@click.command(epilog="Example: outbox web --read-only")
@click.option(
    "--listen",
    metavar="ADDRESS",
    default="127.0.0.1:8765",
    show_default=True,
    callback=_address,
    help=f"Listen on this address and port; port 0 picks a free port. Any address but loopback needs {VARIABLE}.",
)
@click.option(
    "--host-name",
    "host_names",
    metavar="NAME",
    multiple=True,
    help="Accept this name in the Host header, such as the name of a proxy. Repeatable.",
)
@click.option("--read-only", is_flag=True, help="Show everything, change nothing.")
@click.option(
    "--hide-payloads",
    is_flag=True,
    help="Hide payloads, the fields that are taken from them, and the bodies of answers.",
)
@warn_undelivered_option
@uses_database
def web(
    database: str,
    *,
    listen: Address,
    host_names: tuple[str, ...],
    read_only: bool,
    hide_payloads: bool,
    max_undelivered: int,
) -> None:
    """Show the console in a browser, until Ctrl-C.

    It listens on loopback. To listen on another address, set OUTBOX_WEB_SECRET, and put a proxy with TLS in front
    of the console. The secret has at least 16 characters, and the login page asks for it. On loopback the secret
    is optional; without it, every user of this machine can enter.
    """
    missing = [name for name in ("flask", "waitress") if find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"`outbox web` needs {' and '.join(missing)}: pip install 'observation-outbox[web]'"
        )
    from outbox.web.serving import Server, app_alone  # noqa: PLC0415 - slow: it loads Flask, which only this command needs

    secret = os.environ.get(VARIABLE)
    if not secret and not listen.is_loopback:
        raise click.UsageError(f"other machines can reach {listen.in_url}, expected a secret in {VARIABLE}")
    with Outbox(database, policy=policy_of(max_undelivered=max_undelivered)) as outbox:
        outbox.store.login_problems.update(login_problems())
        app = app_alone(
            outbox,
            secret=secret or None,
            host_names=[listen.in_url, *host_names],
            read_only=read_only,
            hide_payloads=hide_payloads,
        )
        server = Server(app, listen.host, listen.port)
        with sigterm_like_ctrl_c(), suppress(KeyboardInterrupt):  # Ctrl-C is the normal end
            say(f"http://{listen.in_url}:{server.port}/")
            if not listen.is_loopback:
                say("outbox: this is plain HTTP; put a proxy with TLS in front of it", err=True)
            server.run()


COMMANDS: tuple[Any, ...] = (web,)

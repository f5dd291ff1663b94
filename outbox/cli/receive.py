"""The commands for trying things out: receive and demo."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

import click

from outbox.cli.credentials import Reader
from outbox.cli.display import say
from outbox.cli.endings import sigterm_like_ctrl_c
from outbox.words import escape

RECEIVE_MODES = ("ok", "down", "overloaded", "revoked", "hang", "drop")
"""The modes of the test server, listed here so that the other commands need not import it."""

_POLL_S = 0.1
_sleep = time.sleep


@click.command(epilog="Example: outbox receive --port 8787 --mode overloaded")
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=0,
    show_default=True,
    help="Port to listen on; 0 picks a free port.",
)
@click.option("--path", metavar="PATH", help="Accept events at this path only.")
@click.option(
    "--format",
    "form",
    metavar="NAME",
    default="json",
    show_default=True,
    help="json, json:KEY, ndjson, single, cloudevents, cloudevents-batch or elasticsearch.",
)
@click.option(
    "--secret", metavar="TEXT", help="Requests must be signed with this secret, as in Standard Webhooks."
)
@click.option("--results", is_flag=True, help="Answer with a result for each event.")
@click.option("--show", is_flag=True, help="Print each accepted event.")
@click.option(
    "--store", metavar="FILE", type=click.Path(dir_okay=False), help="Append the received events to this file."
)
@click.option(
    "--mode", type=click.Choice(RECEIVE_MODES), default="ok", show_default=True, help="Initial response mode."
)
@click.option(
    "--reject-marker",
    metavar="TEXT",
    default="poison",
    show_default=True,
    help="Reject requests that contain an event with this text.",
)
@click.pass_obj
def receive(
    token: Reader,
    *,
    port: int,
    path: str | None,
    form: str,
    secret: str | None,
    results: bool,
    show: bool,
    store: str | None,
    mode: Any,
    reject_marker: str,
) -> None:
    """Run a test service that receives events, until Ctrl-C.

    If OUTBOX_TOKEN or OUTBOX_TOKEN_FILE is set, requests must carry that token. Without --path, any path accepts
    events. POST /control with {"mode": "down"} changes the response mode. GET /received counts the events.
    """
    from outbox.testing.receiver import IngestServer  # noqa: PLC0415 - slow: it loads http.server

    server = IngestServer(
        port=port,
        path=path,
        format=form,
        token=token(),
        secret=secret,
        results=results,
        store=store,
        poison=reject_marker,
    )
    server.set_mode(mode)
    seen = 0
    with server, sigterm_like_ctrl_c(), suppress(KeyboardInterrupt):
        say(server.url)
        shown = len(server.stored)
        while True:
            _sleep(_POLL_S)
            for request in server.requests[seen:]:
                seen += 1
                answer = "no answer" if request.status is None else request.status
                say(f"POST {escape(request.path)} {request.events} events: {answer}")
            for text in list(server.stored.values())[shown:] if show else ():
                shown += 1
                say(escape(text))


@click.command(epilog="Example: outbox demo")
@click.pass_context
def demo(context: click.Context) -> None:
    """Watch events survive an outage, a rejected token and a bad event."""
    from outbox.cli.demo import run  # noqa: PLC0415 - slow: it loads Rich and http.server

    context.exit(run())


COMMANDS = (receive, demo)

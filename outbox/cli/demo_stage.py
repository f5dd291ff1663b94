"""The service and the stage of `outbox demo`."""

from __future__ import annotations

import http.client
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from outbox.clock import now_ms
from outbox.failures import OutboxError
from outbox.lifecycle import Status
from outbox.stats import Stats
from outbox.testing.receiver import IngestServer

if TYPE_CHECKING:
    from typing_extensions import Self

TOKEN = "token-of-the-demo"  # noqa: S105 - made up, for a service that runs as long as the demo

_LOOKS = {
    Status.PENDING: ("yellow", ""),
    Status.SENDING: ("cyan", "being uploaded, under a lease"),
    Status.SENT: ("green", "the service has them"),
    Status.PARKED: ("magenta", "wait until a token is accepted"),
    Status.ABANDONED: ("red", "rejected; kept with the reason"),
}


def serve() -> None:
    """Run the demo's service: print the port, then answer requests until standard input is closed."""
    port, store = sys.argv[1:]
    with IngestServer(port=int(port), token=TOKEN, store=store) as server:
        sys.stdout.write(server.url.rpartition(":")[2] + "\n")
        sys.stdout.flush()
        sys.stdin.read()


class Service:
    """The service. Its process ends when standard input is closed, so it can't outlive the demo."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """The base URL, once the process has started."""
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the process. A restart uses the same port and keeps the received events."""
        program = "from outbox.cli.demo_stage import serve; serve()"
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", program, str(self._port), str(self._store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches only the demo, which then stops the service
        )
        port = self._process.stdout.readline() if self._process.stdout else b""
        if not port:
            raise OutboxError("the demo's service did not start")
        self._port = int(port)

    def stop(self) -> None:
        """Stop the process and wait until it ends. Leaving the context does the same."""
        if self._process is not None:
            self._process.communicate()
            self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def control(self, **wish: Any) -> None:
        """Change how the service answers."""
        self._ask("POST", "/control", msgspec.json.encode(wish))

    def received(self) -> dict[str, Any]:
        """Return the numbers of received events."""
        return self._ask("GET", "/received")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)) as connection:
            connection.request(method, path, body)
            return msgspec.json.decode(connection.getresponse().read(), type=dict[str, Any])


class Stage:
    """The output: lines of text, and on a terminal a live table below them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._is_live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def say(self, text: str, *, style: str = "") -> None:
        """Print a line."""
        # Without the table, long lines are not wrapped, so that a URL can be copied.
        self._console.print(Text(text, style), soft_wrap=not self._live.is_started)

    def hold(self, seconds: float) -> None:
        """Wait, so that the output can be read; only on a terminal."""
        if self._is_live:
            time.sleep(seconds)

    def draw(self, stats: Stats) -> None:
        """Redraw the table; only on a terminal."""
        if self._is_live:
            self._live.update(table_of(stats), refresh=True)

    def mark(self, stats: Stats) -> None:
        """Show the counts at the end of a step."""
        self.draw(stats)
        if not self._is_live:
            self.say("  now " + ", ".join(f"{count} {status}" for status, count in stats.counts.items()))


def table_of(stats: Stats) -> Table:
    """Return the counts as a table with bars."""
    table = Table(box=box.ROUNDED, expand=True, border_style="dim")
    table.add_column("status")
    table.add_column("events", justify="right")
    table.add_column("", ratio=1)
    table.add_column("meaning", width=38, no_wrap=True)
    total = sum(stats.counts.values())
    for status, (colour, meaning) in _LOOKS.items():
        count = stats.counts[status]
        bar = ProgressBar(total or 1, count, style="black", complete_style=colour, finished_style=colour)
        style = colour if count else "dim"
        words = _due(stats) if status is Status.PENDING and count else meaning
        table.add_row(status.value, str(count), bar, words, style=style)
    return table


def _due(stats: Stats) -> str:
    left_ms = (stats.next_due_at_ms or 0) - now_ms()
    return f"waiting, next try in {left_ms / 1_000:.1f} s" if left_ms > 0 else "due now"

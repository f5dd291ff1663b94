"""`outbox demo`: a few hundred events on their way to a server that has a bad day."""

from __future__ import annotations

import http.client
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime, timezone
from itertools import islice
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

from outbox import capture
from outbox.client import HttpClient
from outbox.clock import now_ms
from outbox.display import hidden_log
from outbox.events import Event, RuleCitedInEdit
from outbox.failures import ConfigurationError, OutboxError, UploadFailure
from outbox.flusher import BatchItem
from outbox.lifecycle import Status
from outbox.outbox import Outbox
from outbox.policy import Policy, backoff
from outbox.receiver import IngestServer
from outbox.stats import Stats

if TYPE_CHECKING:
    from typing_extensions import Self

_MORE_THAN_THERE_ARE = 10_000

POLICY = Policy(backoff_ms=400)
"""The usual policy but for the back-off, or the demo would take a quarter of an hour."""

RETRY_AFTER_SEC = 2
"""What the overloaded server asks for."""

FRAME_S = 0.12
"""How long a request stays to be seen on a terminal; without one nobody watches, and nothing is held up."""

READING_S = 1.4
"""The same for the words at the beginning of a scene."""

_TOKEN = "token-of-the-demo"  # noqa: S105 - made up, for a server that lives as long as the demo
_TICK_S = 0.1

_LOOKS = {
    Status.PENDING: ("yellow", ""),
    Status.SENDING: ("cyan", "being uploaded, under a lease"),
    Status.SENT: ("green", "the server has them"),
    Status.PARKED: ("magenta", "no use in trying before a new login"),
    Status.ABANDONED: ("red", "given up and kept, with the reason"),
}


def run(*, console: Console | None = None) -> int:
    """Show the outbox at work, in under a minute; return 0, or 1 when the numbers do not add up in the end.

    The database is kept for a look; an interrupt or an error removes it, and the server's process in any case.
    """
    if capture.is_off():
        raise ConfigurationError("OUTBOX_CAPTURE is false, so nothing would be recorded; the demo needs it unset")
    folder = Path(tempfile.mkdtemp(prefix="outbox-demo-"))
    stage = _Stage(console or Console(highlight=False))
    server = _Server(folder / "received.ndjson")
    url = f"sqlite:///{(folder / 'outbox.db').as_posix()}"
    try:
        with hidden_log(), server, Outbox.open(url, policy=POLICY) as outbox:
            server.start()
            with HttpClient(server.url, token=_TOKEN) as client:
                play = _Play(stage, server, outbox, client)
                with stage:
                    for scene in _SCENES:
                        scene(play)
                adds_up = _tally(play)
                _what_next(play, url)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return 0 if adds_up else 1


def serve() -> None:
    """Be the demo's server: print the port, and answer until the standard input ends."""
    port, store = sys.argv[1:]
    with IngestServer(port=int(port), token=_TOKEN, store=store) as server:
        sys.stdout.write(server.url.rpartition(":")[2] + "\n")
        sys.stdout.flush()
        sys.stdin.read()


def example_events() -> list[dict[str, Any]]:
    """Return the example events, from a checkout or from an installed package."""
    here = Path(__file__).parent
    installed = here / "examples"
    folder = installed if installed.is_dir() else here.parent / "examples"
    lines = (folder / "events.ndjson").read_bytes().splitlines()
    return [msgspec.json.decode(line) for line in lines]


def outbox_command() -> str:
    """Return how to call `outbox` from here: the virtual environment that ran this need not be on the PATH."""
    scripts, here = Path(sysconfig.get_path("scripts")), Path.cwd()
    if shutil.which("outbox"):
        return "outbox"
    return str((scripts.relative_to(here) if scripts.is_relative_to(here) else scripts) / "outbox")


# --- the scenes ---


def _opening(play: _Play) -> None:
    first_ms = backoff(1, POLICY.backoff_ms)
    play.say("An outbox, its server, and a bad day", style="bold")
    play.say(
        "Time is compressed: the first retry comes after"
        f" {first_ms / 1_000:g} s here and after {backoff(1) // 60_000} minutes in earnest;"
    )
    play.say("the back-off doubles from there in both. Everything else is the real thing: a database file,")
    play.say("HTTP, and a server in a process of its own.")


def _good_day(play: _Play) -> None:
    play.scene("1. A good day", "Events are recorded in a local database first. Nothing waits for the network.")
    play.record(play.examples(40))
    play.flush()


def _outage(play: _Play) -> None:
    play.scene(
        "2. The server is down",
        "Recording goes on. What can't be sent waits in the database, each time twice as long.",
    )
    play.server.stop()
    play.record(play.examples(110))
    play.flush()
    play.wait()
    play.flush()
    play.server.start()
    play.say("The server is back. The next attempt finds it:")
    play.wait()
    play.flush()


def _overload(play: _Play) -> None:
    play.scene(
        "3. 429: the server asks to slow down",
        f"It names {RETRY_AFTER_SEC} seconds (Retry-After). They are kept, and count as no failure of the events.",
    )
    play.server.control(mode="overloaded", retryAfterSec=RETRY_AFTER_SEC)
    play.record(play.examples(50))
    play.flush()
    play.server.control(mode="ok")
    play.wait()
    play.flush()


def _revoked_token(play: _Play) -> None:
    play.scene(
        "4. 401: the token is revoked",
        "Trying again would not help, so the events are parked, for as long as it takes.",
    )
    play.server.control(mode="revoked")
    play.record(play.examples(30))
    play.flush()
    play.stage.hold(READING_S)
    play.server.control(mode="ok")
    play.say("A new login. The first success brings the parked events back, spread out a little:")
    play.record(play.examples(8))
    play.flush()
    play.wait()
    play.flush()


def _poison(play: _Play) -> None:
    play.scene(
        "5. 422: two poisoned events spoil their batch",
        "The batch is halved until the two stand alone. Only they are given up, the others get through.",
    )
    one = _poisoned("+    spool.lock().map_err(|_poisoned| Error::Spool)?")
    other = _poisoned("+    Err(poisoned) => poisoned.into_inner(),")
    play.record([*play.examples(20), one, *play.examples(30), other, *play.examples(12)])
    play.flush()


_SCENES = (_opening, _good_day, _outage, _overload, _revoked_token, _poison)


def _poisoned(diff_excerpt: str) -> RuleCitedInEdit:
    return RuleCitedInEdit(
        rule_id="rs-no-unwrap-outside-tests",
        session_id="emil-d7e02447",
        file_path="crates/agent/src/spool.rs",
        diff_excerpt=diff_excerpt,
        cited_at=datetime(2026, 11, 23, 15, 30, tzinfo=timezone.utc),
    )


def _tally(play: _Play) -> bool:
    """Print what became of all events, and return whether our numbers and the server's agree."""
    counts = play.outbox.stats().counts
    received = play.server.received()
    sent, abandoned = counts["sent"], counts["abandoned"]
    waiting = counts["pending"] + counts["sending"] + counts["parked"]
    adds_up = play.recorded == sent + abandoned + waiting and received["events"] == sent
    play.say("")
    play.say("The tally", style="bold")
    play.say(f"{play.recorded} recorded = {sent} delivered + {abandoned} abandoned + {waiting} waiting")
    play.say(f"{received['events']} different events at the server, {received['duplicates']} came twice")
    if adds_up:
        play.say("It adds up: nothing was lost.", style="bold green")
    else:
        play.say("It does not add up. That is a bug, please report it with the lines above.", style="bold red")
    return adds_up


def _what_next(play: _Play, url: str) -> None:
    command = outbox_command()
    play.say("")
    play.say("The database is kept. See why the two were given up:", style="bold")
    for line in (
        f"export OUTBOX_DATABASE_URL={url}",
        f"{command} status",
        f"{command} list --state abandoned",
        *(f"{command} show {row.id}" for row in play.outbox.find(status=Status.ABANDONED, limit=1)),
    ):
        play.say(f"  {line}", style="cyan")


# --- who plays ---


class _Play:
    """The outbox and its server, with all that they do shown on the stage. It is also the client of the outbox."""

    def __init__(self, stage: _Stage, server: _Server, outbox: Outbox, client: HttpClient) -> None:
        self.stage = stage
        self.server = server
        self.outbox = outbox
        self.say = stage.say
        self.recorded = 0
        self._client = client
        self._examples = iter(example_events())

    def scene(self, title: str, comment: str) -> None:
        self.say("")
        self.say(title, style="bold")
        self.say(comment)
        self.stage.hold(READING_S)

    def examples(self, count: int) -> list[dict[str, Any]]:
        """Take the next example events."""
        return list(islice(self._examples, count))

    def record(self, events: Sequence[Event | Mapping[str, Any]]) -> None:
        """Record events one by one, as an application does."""
        spent_s = 0.0
        for event in events:
            started = time.perf_counter()
            self.recorded += self.outbox.enqueue(event) is not None
            spent_s += time.perf_counter() - started
            self._draw()
        self.say(f"  {len(events)} events recorded, {spent_s / len(events) * 1_000:.1f} ms each")

    def flush(self) -> None:
        """Send all that is due, batch after batch, also after one that failed for all of its events."""
        while self.outbox.flush(self).claimed:
            self._draw()
        self.stage.mark(self.outbox.stats())

    def wait(self) -> None:
        """Wait until all that is pending is due, for the due times are spread."""
        pending = self.outbox.find(status=Status.PENDING, limit=_MORE_THAN_THERE_ARE)
        due_ms = max((row.next_attempt_at_ms for row in pending), default=0)
        self.say(f"  waiting for {max(0, due_ms - now_ms()) / 1_000:.1f} s, until they are due")
        while (left_ms := due_ms - now_ms()) > 0:
            self._draw()
            time.sleep(min(left_ms / 1_000, _TICK_S))

    @property
    def logged_in(self) -> bool:
        return self._client.logged_in

    def upload(self, batch: Sequence[BatchItem], /) -> None:
        self._draw()
        self.stage.hold(FRAME_S)
        request = f"  POST {len(batch):>3} {'event ' if len(batch) == 1 else 'events'}"
        try:
            self._client.upload(batch)
        except UploadFailure as failure:
            self.say(f"{request}  {failure}", style="blue")
            raise
        self.say(f"{request}  accepted", style="blue")

    def _draw(self) -> None:
        self.stage.draw(self.outbox.stats())


class _Server:
    """The ingest server in a process of its own. It ends with its standard input, so it can't outlive the demo."""

    def __init__(self, store: Path) -> None:
        self._store = store
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start it; again on the same port, and with what it has received before."""
        program = "from outbox import demo; demo.serve()"
        self._process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-c", program, str(self._port), str(self._store)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the demo, which then ends the server
        )
        port = self._process.stdout.readline() if self._process.stdout else b""
        if not port:
            raise OutboxError("the demo's server did not start")
        self._port = int(port)

    def stop(self) -> None:
        """Let it end and wait for that; leaving the context does the same."""
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
        self._ask("POST", "/control", msgspec.json.encode(wish))

    def received(self) -> dict[str, Any]:
        return self._ask("GET", "/received")

    def _ask(self, method: str, path: str, body: bytes | None = None) -> dict[str, Any]:
        with closing(http.client.HTTPConnection("127.0.0.1", self._port, timeout=10)) as connection:
            connection.request(method, path, body)
            return msgspec.json.decode(connection.getresponse().read(), type=dict[str, Any])


class _Stage:
    """What is seen: on a terminal lines of text above a table that is kept up to date, else lines alone."""

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
        # Without the table lines stay in one piece, so that a URL can be copied.
        self._console.print(Text(text, style), soft_wrap=not self._live.is_started)

    def hold(self, seconds: float) -> None:
        """Leave what is seen for a moment, where somebody sees it."""
        if self._is_live:
            time.sleep(seconds)

    def draw(self, stats: Stats) -> None:
        if self._is_live:
            self._live.update(_table(stats), refresh=True)

    def mark(self, stats: Stats) -> None:
        """Show the state at the end of a step."""
        self.draw(stats)
        if not self._is_live:
            self.say("  now " + ", ".join(f"{count} {status}" for status, count in stats.counts.items()))


def _table(stats: Stats) -> Table:
    table = Table(box=box.ROUNDED, expand=True, border_style="dim")
    table.add_column("state")
    table.add_column("events", justify="right")
    table.add_column("", ratio=1)
    table.add_column("what it means", width=38, no_wrap=True)
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
    return f"waiting, next attempt in {left_ms / 1_000:.1f} s" if left_ms > 0 else "due now"

"""`outbox demo`: a few hundred events are delivered to a service that keeps failing."""

from __future__ import annotations

import shutil
import sysconfig
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from outbox import capture
from outbox.cli.demo_stage import TOKEN, Service, Stage
from outbox.cli.logs import hidden_log
from outbox.clock import monotonic_s, now_ms
from outbox.delays import backoff
from outbox.event_types import RuleCitedInEdit
from outbox.events import Event
from outbox.failures import ConfigurationError, UploadFailure
from outbox.lifecycle import Status
from outbox.outbox import Outbox
from outbox.policy import Policy
from outbox.records import BatchItem
from outbox.stats import duration
from outbox.upload.client import HttpClient

_MORE_THAN_THERE_ARE = 10_000

POLICY = Policy(backoff_ms=400, pause_ms=100, proof_ms=600)
"""The default policy with shorter times, so that the demo does not take a quarter of an hour."""

RETRY_AFTER_SEC = 2
"""The delay that the overloaded service asks for."""

_PROOF = f"{POLICY.proof_ms / 1_000:g} s (by default: {duration(Policy().proof_ms)})"

FRAME_S = 0.12
"""How long each request is shown on a terminal. Without a terminal the demo does not wait."""

READING_S = 1.4
"""How long the introduction of a scene is shown on a terminal."""

_TICK_S = 0.1


def run(*, console: Console | None = None) -> int:
    """Run the demo, which takes under a minute. Return 0, or 1 if the numbers do not add up at the end.

    The database is kept, so that it can be examined; after an interrupt or an error it is deleted. The service's
    process ends in any case.
    """
    if capture.is_off():
        raise ConfigurationError("OUTBOX_CAPTURE is 'false', expected it unset: the demo enqueues events")
    folder = Path(tempfile.mkdtemp(prefix="outbox-demo-"))
    stage = Stage(console or Console(highlight=False))
    service = Service(folder / "received.ndjson")
    url = f"sqlite:///{(folder / 'outbox.db').as_posix()}"
    try:
        with hidden_log(), service, Outbox.open(url, policy=POLICY) as outbox:
            service.start()
            with HttpClient(service.url, token=TOKEN) as client:
                play = _Play(stage, service, outbox, client)
                with stage:
                    for scene in _SCENES:
                        scene(play)
                adds_up = _tally(play)
                _what_next(play, url)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return 0 if adds_up else 1


def example_events() -> list[dict[str, Any]]:
    """Return the example events, from a checkout or from an installed package."""
    here = Path(__file__).parent.parent
    installed = here / "examples"
    folder = installed if installed.is_dir() else here.parent / "examples"
    lines = (folder / "events.ndjson").read_bytes().splitlines()
    return [msgspec.json.decode(line) for line in lines]


def outbox_command() -> str:
    """Return the command that starts `outbox`, even if the virtual environment is not on the PATH."""
    scripts, here = Path(sysconfig.get_path("scripts")), Path.cwd()
    if shutil.which("outbox"):
        return "outbox"
    return str((scripts.relative_to(here) if scripts.is_relative_to(here) else scripts) / "outbox")


def _opening(play: _Play) -> None:
    first_ms = backoff(1, POLICY.backoff_ms)
    play.say("An outbox, its service, and a bad day", style="bold")
    play.say(
        f"Time is compressed: the first retry comes after {first_ms / 1_000:g} s"
        f" instead of {backoff(1) // 60_000} minutes."
    )
    play.say("After that the wait doubles each time.")
    play.say(f"A rejected event is abandoned {_PROOF} after its first rejection, if it is rejected again.")
    play.say("Everything else is real: a database file, HTTP, and a service in its own process.")


def _good_day(play: _Play) -> None:
    play.scene("1. A good day", "Events are stored in a local database first. No enqueue waits for the network.")
    play.enqueue(play.examples(40))
    play.flush()


def _outage(play: _Play) -> None:
    play.scene(
        "2. The service is down",
        f"Enqueue still works. The outbox pauses (here {POLICY.pause_ms / 1_000:g} s, by default"
        f" {Policy().pause_ms / 1_000:g} s; doubled each time), and tries again.",
    )
    play.service.stop()
    play.enqueue(play.examples(110))
    play.flush()
    play.wait()
    play.flush()
    play.service.start()
    play.say("The service is back. The next try succeeds, and the other events follow:")
    play.wait()
    play.flush()


def _overload(play: _Play) -> None:
    play.scene(
        "3. 429: the service asks to slow down",
        f"It asks for {RETRY_AFTER_SEC} seconds (Retry-After). The events wait that long. This is no failure.",
    )
    play.service.control(mode="overloaded", retryAfterSec=RETRY_AFTER_SEC)
    play.enqueue(play.examples(50))
    play.flush()
    play.service.control(mode="ok")
    play.wait()
    play.flush()


def _revoked_token(play: _Play) -> None:
    play.scene(
        "4. 401: the token is revoked",
        "A retry with this token would fail, so the events are parked until a token is accepted.",
    )
    play.say("A firewall may refuse a single event like this, so a few events are tried alone first.")
    play.service.control(mode="revoked")
    play.enqueue(play.examples(30))
    play.flush()
    play.stage.hold(READING_S)
    play.service.control(mode="ok")
    play.say("A new login. After the first success the parked events are retried, spread over a short time:")
    play.enqueue(play.examples(8))
    play.wait()
    play.flush()
    play.wait()
    play.flush()


def _poison(play: _Play) -> None:
    play.scene(
        "5. 422: the service rejects a batch because of two events",
        "The batch is searched until both are found. The others are delivered.",
    )
    one = _poisoned("+    spool.lock().map_err(|_poisoned| Error::Spool)?")
    other = _poisoned("+    Err(poisoned) => poisoned.into_inner(),")
    play.enqueue([*play.examples(20), one, *play.examples(30), other, *play.examples(12)])
    play.flush()
    play.say(
        "A rejection may be the service's mistake, so the two events wait for proof. An event is abandoned if"
    )
    play.say(f"the service rejects it alone again, at least {_PROOF} later, and accepts others:")
    play.wait()
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
    """Print the outcomes of all events, and return whether our numbers and the service's agree."""
    counts = play.outbox.stats().counts
    received = play.service.received()
    sent, abandoned = counts["sent"], counts["abandoned"]
    waiting = counts["pending"] + counts["sending"] + counts["parked"]
    adds_up = play.enqueued == sent + abandoned + waiting and received["events"] == sent
    play.say("")
    play.say("The tally", style="bold")
    play.say(f"{play.enqueued} enqueued = {sent} delivered + {abandoned} abandoned + {waiting} waiting")
    play.say(f"{received['events']} different events at the service, {received['duplicates']} of them came twice")
    if adds_up:
        play.say("It adds up: no event was lost.", style="bold green")
    else:
        play.say("It does not add up. This is a bug; please report it with the lines above.", style="bold red")
    return adds_up


def _what_next(play: _Play, url: str) -> None:
    command = outbox_command()
    play.say("")
    play.say("The database is kept. To see why the two events were abandoned:", style="bold")
    for line in (
        f"export OUTBOX_DATABASE_URL={url}",
        f"{command} status",
        f"{command} list --status abandoned",
        *(f"{command} show {row.id}" for row in play.outbox.find(status=Status.ABANDONED, limit=1)),
    ):
        play.say(f"  {line}", style="cyan")


class _Play:
    """The outbox, its service and its client. Everything that they do is shown on the stage."""

    def __init__(self, stage: Stage, service: Service, outbox: Outbox, client: HttpClient) -> None:
        self.stage = stage
        self.service = service
        self.outbox = outbox
        self.say = stage.say
        self.enqueued = 0
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

    def enqueue(self, events: Sequence[Event | Mapping[str, Any]]) -> None:
        """Enqueue events one by one, as an application does."""
        spent_s = 0.0
        for event in events:
            started = monotonic_s()
            self.enqueued += self.outbox.enqueue(event) is not None
            spent_s += monotonic_s() - started
            self._draw()
        self.say(f"  {len(events)} events enqueued, {spent_s / len(events) * 1_000:.1f} ms each")

    def flush(self) -> None:
        """Wait for the end of a pause. Then send batches until nothing is due or the service fails."""
        for pause in self.outbox.stats().pauses:
            time.sleep(max(0, pause.until_ms - now_ms()) / 1_000)
        while self.outbox.flush(self).claimed:
            self._draw()
        self.stage.mark(self.outbox.stats())

    def wait(self) -> None:
        """Wait until all pending events are due and no pause lasts."""
        pending = self.outbox.find(status=Status.PENDING, limit=_MORE_THAN_THERE_ARE)
        pauses = self.outbox.stats().pauses
        due_ms = max([0, *(row.next_attempt_at_ms for row in pending), *(pause.until_ms for pause in pauses)])
        self.say(f"  waiting for {max(0, due_ms - now_ms()) / 1_000:.1f} s until all events are due")
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

"""What one flusher learns of a service holds for the flushers of all hosts, on a server."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta

import pytest
from click.testing import CliRunner

from builders import (
    DOWN,
    NOON,
    NOON_MS,
    OK,
    REJECTED,
    REVOKED,
    SLOW_DOWN,
    ScriptedClient,
    add_row,
    refuse,
    row,
    rule_fired,
)
from outbox import FlushReport, HttpClient, HttpFailure, Outbox, TransportFailure, statements
from outbox.cli import main
from outbox.display import status_in_words
from outbox.policy import Policy, pause_ms
from outbox.receiver import Answer
from outbox.transaction import Transaction

SERVICE = "https://ingest.example.com"
UNREACHABLE = TransportFailure("connection refused")
SECOND = 1_000

pytestmark = pytest.mark.usefixtures("noon")

on_servers = pytest.mark.servers


class Client(ScriptedClient):
    def __init__(self, *answers, destination: str | None = SERVICE) -> None:
        super().__init__(*answers)
        self.destination = destination


@pytest.fixture
def other(outbox: Outbox, url: str) -> Iterator[Outbox]:
    """The same outbox on another host."""
    with Outbox(url) as opened:
        yield opened


def enqueue(outbox: Outbox, count: int = 1) -> None:
    outbox.enqueue_many([rule_fired()] * count)


def paused(outbox: Outbox) -> list[tuple[str, int, int]]:
    return [(pause.destination, pause.failures, pause.until_ms - NOON_MS) for pause in outbox.stats().pauses]


# For how long


@pytest.mark.parametrize(
    ("failure", "seen", "expected"),
    [
        (UNREACHABLE, 0, 1 * SECOND),
        (UNREACHABLE, 1, 2 * SECOND),
        (UNREACHABLE, 6, 64 * SECOND),
        (UNREACHABLE, 7, 64 * SECOND),
        (HttpFailure(500), 2, 4 * SECOND),
        (HttpFailure(408), 0, 1 * SECOND),
        (HttpFailure(429), 0, 60 * SECOND),
        (HttpFailure(429), 5, 60 * SECOND),
        (SLOW_DOWN, 0, 40 * SECOND),
        (HttpFailure(429, retry_after_ms=300_000), 3, 300 * SECOND),
        (DOWN, 0, 1 * SECOND),
        (HttpFailure(503, retry_after_ms=7_000), 0, 7 * SECOND),
        (HttpFailure(503, retry_after_ms=7_000), 3, 8 * SECOND),
        (REVOKED, 0, None),
        (REJECTED, 0, None),
    ],
)
def test_a_failure_pauses_a_service_for_so_long(failure, seen: int, expected: int | None) -> None:
    assert pause_ms(failure, seen, Policy()) == expected


# Who waits


@on_servers
@pytest.mark.parametrize(("failure", "seconds"), [(SLOW_DOWN, 40), (DOWN, 1), (UNREACHABLE, 1)])
def test_what_one_host_learns_makes_all_wait(outbox: Outbox, other: Outbox, noon, failure, seconds: int) -> None:
    enqueue(outbox)
    assert outbox.flush(Client(failure)).rescheduled == 1
    enqueue(outbox, 20)
    idle = Client()
    noon.travel(milliseconds=seconds * SECOND - 1)
    expected = FlushReport(failure=str(failure), paused_until_ms=NOON_MS + seconds * SECOND)
    assert other.flush(idle) == other.flush_all(idle) == outbox.flush(idle) == expected
    assert idle.batches == []


@on_servers
def test_after_a_pause_one_small_batch_goes_as_a_probe(outbox: Outbox, other: Outbox, noon) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    enqueue(outbox, 40)
    noon.travel(seconds=1)
    waiting = []
    probe = Client(lambda _: waiting.append(other.flush(Client())))
    assert outbox.flush(probe).sent == 8
    assert waiting == [FlushReport(failure=str(DOWN), paused_until_ms=NOON_MS + 61 * SECOND)]
    assert outbox.stats().pauses == []
    assert other.flush(Client()).sent == 32


@on_servers
def test_flush_all_goes_on_in_full_batches_after_its_probe(outbox: Outbox, noon) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    enqueue(outbox, 100)
    noon.travel(seconds=1)
    client = Client()
    assert outbox.flush_all(client).sent == 100
    assert client.sizes == [8, 64, 28]


@on_servers
def test_a_pause_grows_with_each_probe_that_fails(outbox: Outbox, noon) -> None:
    enqueue(outbox, 200)
    pauses = []
    for _ in range(9):
        now_ms = outbox._store.now_ms()
        assert outbox.flush(Client(UNREACHABLE)).rescheduled
        (pause,) = outbox.stats().pauses
        pauses.append((pause.failures, (pause.until_ms - now_ms) // SECOND))
        noon.move_to(NOON + timedelta(milliseconds=pause.until_ms - NOON_MS))
    assert pauses == [(1, 1), (2, 2), (3, 4), (4, 8), (5, 16), (6, 32), (7, 64), (8, 64), (9, 64)]


@on_servers
@pytest.mark.parametrize(("first", "second"), [(SLOW_DOWN, UNREACHABLE), (UNREACHABLE, SLOW_DOWN)])
def test_two_that_fail_at_once_count_as_one_failure_with_the_longer_pause(
    outbox: Outbox, other: Outbox, first, second
) -> None:
    enqueue(outbox, 128)

    def meanwhile(_batch):
        other.flush(Client(first))
        return second

    outbox.flush(Client(meanwhile))
    assert paused(outbox) == [(SERVICE, 1, 40 * SECOND)]


@on_servers
def test_a_failure_from_before_the_pause_ends_no_probe(outbox: Outbox, other: Outbox, noon) -> None:
    enqueue(outbox, 100)
    outbox.flush(Client(UNREACHABLE))
    noon.travel(seconds=1)
    waiting = []

    def meanwhile(_batch):
        outbox._store.pause(SERVICE, seen=0, until_ms=NOON_MS, last_error="from before")
        waiting.append(other.flush(Client()).claimed)

    assert outbox.flush(Client(meanwhile)).sent == 8
    assert waiting == [0]


@on_servers
def test_a_probe_that_fails_after_its_pause_was_ended_begins_a_new_one(
    outbox: Outbox, other: Outbox, noon
) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    enqueue(outbox, 100)
    noon.travel(seconds=1)

    def meanwhile(_batch):
        other.retry_now()
        return UNREACHABLE

    outbox.flush(Client(meanwhile))
    assert paused(outbox) == [(SERVICE, 1, 3 * SECOND)]


@on_servers
@pytest.mark.parametrize("answer", [REVOKED, REJECTED])
def test_a_probe_that_is_answered_ends_the_pause_whatever_it_is_told(outbox: Outbox, noon, answer) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    enqueue(outbox, 3)
    noon.travel(seconds=1)
    outbox.flush(Client(*[answer] * 4))
    assert outbox.stats().pauses == []


@on_servers
def test_a_probe_with_nothing_to_send_is_none(outbox: Outbox, other: Outbox, noon) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    noon.travel(seconds=1)
    assert outbox.flush(Client()) == FlushReport()
    enqueue(outbox)
    assert other.flush(Client()).sent == 1


@on_servers
def test_a_probe_that_sends_nothing_leaves_it_to_another_one(outbox: Outbox, other: Outbox, noon) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    noon.travel(seconds=1)
    add_row(outbox, payload_json="{")
    assert outbox.flush(Client()).abandoned == 1
    enqueue(outbox)
    assert other.flush(Client()).sent == 1


@on_servers
def test_a_probe_that_is_interrupted_leaves_it_to_another_one(outbox: Outbox, other: Outbox, noon) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    enqueue(outbox)
    noon.travel(seconds=1)
    with pytest.raises(KeyboardInterrupt):
        outbox.flush(Client(KeyboardInterrupt()))
    assert other.flush(Client()).sent == 1


@on_servers
def test_a_probe_that_died_leaves_it_to_another_one_when_its_lease_has_run_out(
    outbox: Outbox, other: Outbox, noon
) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    enqueue(outbox)
    noon.travel(seconds=1)
    now_ms = outbox._store.now_ms()
    claimed = outbox._store.claim(
        now_ms=now_ms, lease_ms=now_ms + 60_000, batch_size=64, destination=SERVICE, probe_size=8
    )
    assert len(claimed.rows) == 1
    noon.travel(seconds=59)
    assert other.flush(Client()).claimed == 0
    noon.travel(seconds=1)
    assert other.flush(Client()).sent == 1


@on_servers
@pytest.mark.parametrize(("of_the_faster", "claimed"), [(OK, 32), (DOWN, 0)])
def test_of_two_that_want_to_probe_at_once_one_is_late(
    outbox: Outbox, other: Outbox, noon, monkeypatch, of_the_faster, claimed: int
) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    enqueue(outbox, 40)
    noon.travel(seconds=1)
    change = Transaction.change

    def late(transaction, statement, /, **parameters):
        if statement is statements.BEGIN_PROBE:
            monkeypatch.undo()
            other.flush(Client(of_the_faster))
        return change(transaction, statement, **parameters)

    monkeypatch.setattr(Transaction, "change", late)
    assert outbox.flush(Client()).claimed == claimed


@on_servers
def test_retry_now_ends_every_pause(outbox: Outbox, other: Outbox) -> None:
    enqueue(outbox)
    outbox.flush(Client(SLOW_DOWN))
    enqueue(outbox, 20)
    assert other.retry_now() == 1
    assert outbox.stats().pauses == []
    assert other.flush(Client()).sent == 21


@on_servers
def test_each_service_has_a_pause_of_its_own(outbox: Outbox) -> None:
    enqueue(outbox)
    outbox.flush(Client(DOWN))
    enqueue(outbox, 2)
    assert outbox.flush(Client(OK, destination="https://elsewhere.example.com")).sent == 2
    long = "https://ingest.example.com/" + 300 * "x"
    enqueue(outbox)
    outbox.flush(Client(DOWN, destination=long))
    assert paused(outbox) == [(SERVICE, 1, SECOND), (long[:191], 1, SECOND)]


@on_servers
def test_a_client_that_names_no_service_shares_no_pause(outbox: Outbox) -> None:
    enqueue(outbox)
    outbox.flush(ScriptedClient(DOWN))
    enqueue(outbox)
    assert outbox.stats().pauses == []
    assert outbox.flush(ScriptedClient()).sent == 1


def test_on_sqlite_the_rows_wait_but_the_service_is_not_paused(outbox: Outbox) -> None:
    enqueue(outbox)
    outbox.flush(Client(SLOW_DOWN))
    enqueue(outbox)
    assert outbox.stats().pauses == []
    assert outbox.flush(Client()).sent == 1


@on_servers
def test_a_pause_that_can_not_be_written_costs_no_outcome(outbox: Outbox, caplog) -> None:
    enqueue(outbox)
    refuse(outbox, "INSERT", "observation_destinations", "no pauses here")
    assert outbox.flush(Client(DOWN)).rescheduled == 1
    assert "pausing the queue failed, the next one will try again" in caplog.text
    assert row(outbox, 1).last_error == str(DOWN)


# What is shown


def test_the_http_client_is_known_by_its_base_url() -> None:
    with HttpClient("http://127.0.0.1:8000/api/", token="t") as client:
        assert client.destination == "http://127.0.0.1:8000/api"


@on_servers
def test_the_status_page_says_who_is_left_alone_and_why(outbox: Outbox, noon) -> None:
    def shown() -> str:
        text = status_in_words(outbox.stats(), "here", now_ms=outbox._store.now_ms())
        return next(line for line in text.splitlines() if line.startswith("paused"))

    why = f"{'paused':<14}{SERVICE}: the server asks to slow down ({SLOW_DOWN})"
    enqueue(outbox)
    outbox.flush(Client(SLOW_DOWN))
    assert shown() == f"{why}; nothing is sent for 40 seconds, `outbox retry` ends that"
    noon.travel(seconds=40)
    assert shown() == f"{why}; one flusher is to try it with a small batch"
    enqueue(outbox)
    seen: list[str] = []
    outbox.flush(Client(lambda _: seen.append(shown())))
    assert seen == [f"{why}; one flusher tries it with a small batch"]


@on_servers
def test_the_command_line_says_that_a_service_is_left_alone(outbox: Outbox, url: str, monkeypatch, server) -> None:
    monkeypatch.setenv("OUTBOX_TOKEN", "token-of-tests")
    enqueue(outbox)
    server.script(Answer(429, body='{"retryAfterSec":40}'))
    flush = ["--database", url, "flush", "--url", server.url]
    assert CliRunner().invoke(main, flush).exit_code == 3
    enqueue(outbox)
    told = CliRunner().invoke(main, flush)
    assert told.exit_code == 3
    until = "2026-11-24 12:00:40 UTC (in 40 seconds)"
    assert f"the service is left alone until {until}; `outbox retry` ends that" in told.output
    assert len(server.requests) == 1

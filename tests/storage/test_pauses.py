"""What one flusher learns of a service holds for all flushers of the database."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from builders import (
    DOWN,
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
from outbox import FlushReport, HttpFailure, Outbox, Policy, TransportFailure
from outbox.cli import main
from outbox.cli.display import status_in_words
from outbox.pauses import SharedPause
from outbox.storage import pauses
from outbox.storage.transactions import Transaction
from outbox.testing import Answer

UNREACHABLE = TransportFailure("connection refused")
SECOND = 1_000

pytestmark = [pytest.mark.usefixtures("noon"), pytest.mark.contract]


@pytest.fixture
def other(outbox: Outbox, url: str) -> Iterator[Outbox]:
    """The same outbox in another process."""
    with Outbox(url) as opened:
        yield opened


def enqueue(outbox: Outbox, count: int = 1) -> None:
    outbox.enqueue_many([rule_fired()] * count)


def paused(outbox: Outbox) -> list[tuple[str, int, int]]:
    return [(pause.destination, pause.failures, pause.until_ms - NOON_MS) for pause in outbox.stats().pauses]


def left_alone(failure, *, until_ms: int) -> FlushReport:
    why = f"paused, the service failed or asked to slow down: {failure}"
    return FlushReport(failure=str(failure), paused_until_ms=until_ms, skipped=why)


def fail(outbox: Outbox, noon, times: int = 3, failure=DOWN) -> None:
    """Let the service fail so often, and the last pause be over."""
    enqueue(outbox, times)
    with Outbox(outbox.engine, policy=Policy(batch_size=1)) as small:
        for _ in range(times):
            report = small.flush(ScriptedClient(failure))
            noon.travel(milliseconds=report.paused_until_ms - small.store.now_ms())


# Who waits, and for how long


@pytest.mark.parametrize(
    ("failure", "seconds"),
    [
        (SLOW_DOWN, 40),
        (HttpFailure(429), 60),
        (DOWN, 1),
        (HttpFailure(503, retry_after_ms=7_000), 7),
        (HttpFailure(404), 1),
        (UNREACHABLE, 1),
        (REVOKED, 1),
        (REJECTED, 1),
    ],
)
def test_what_one_flusher_learns_makes_all_wait(outbox: Outbox, other: Outbox, noon, failure, seconds) -> None:
    enqueue(outbox)
    assert outbox.flush(ScriptedClient(failure)).paused_until_ms == NOON_MS + seconds * SECOND
    enqueue(outbox, 20)
    idle = ScriptedClient()
    noon.travel(milliseconds=seconds * SECOND - 1)
    expected = left_alone(failure, until_ms=NOON_MS + seconds * SECOND)
    assert other.flush(idle) == other.flush_all(idle) == outbox.flush(idle) == expected
    assert idle.batches == []
    noon.travel(milliseconds=1)
    assert other.flush(idle).sent == 20


def test_the_pause_doubles_with_each_failure_up_to_20_seconds(outbox: Outbox, noon) -> None:
    enqueue(outbox, 200)
    seconds = []
    for _ in range(7):
        now_ms = outbox.store.now_ms()
        report = outbox.flush(ScriptedClient(UNREACHABLE))
        seconds.append((report.paused_until_ms - now_ms) // SECOND)
        noon.travel(seconds=seconds[-1])
    assert seconds == [1, 2, 4, 8, 16, 20, 20]


def test_an_acceptance_ends_the_pause_and_the_count(outbox: Outbox, noon) -> None:
    fail(outbox, noon, times=2)
    enqueue(outbox)
    assert outbox.flush(ScriptedClient()).sent == 1
    assert paused(outbox) == []
    enqueue(outbox)
    report = outbox.flush(ScriptedClient(DOWN))
    assert report.paused_until_ms == outbox.store.now_ms() + SECOND


def test_a_request_that_is_accepted_after_others_failed_ends_their_pause(outbox: Outbox, other: Outbox) -> None:
    enqueue(outbox, 65)
    assert outbox.flush(ScriptedClient(lambda _: other.flush(ScriptedClient(DOWN)) and None)).sent == 64
    assert paused(outbox) == []


def test_a_request_under_way_does_not_end_a_silence_that_was_asked_for(outbox: Outbox, other: Outbox) -> None:
    enqueue(outbox, 65)
    assert outbox.flush(ScriptedClient(lambda _: other.flush(ScriptedClient(SLOW_DOWN)) and None)).sent == 64
    assert paused(outbox) == [("default", 0, 40 * SECOND)]


@pytest.mark.parametrize(("first", "second"), [(SLOW_DOWN, UNREACHABLE), (UNREACHABLE, SLOW_DOWN)])
def test_two_that_fail_at_once_count_as_one_failure_with_the_longer_pause(
    outbox: Outbox, other: Outbox, first, second
) -> None:
    enqueue(outbox, 128)
    outbox.flush(ScriptedClient(lambda _: other.flush(ScriptedClient(first)) and second))
    assert paused(outbox) == [("default", 1, 40 * SECOND)]


def test_the_original_never_pauses(url: str) -> None:
    with Outbox.open(url, policy=Policy.original()) as original:
        enqueue(original)
        original.flush(ScriptedClient(SLOW_DOWN))
        enqueue(original)
        assert original.stats().pauses == []
        assert original.flush(ScriptedClient()).sent == 1


# Probes


def test_after_three_failures_one_row_goes_as_a_probe(outbox: Outbox, other: Outbox, noon) -> None:
    fail(outbox, noon)
    enqueue(outbox, 40)
    waiting = []
    assert outbox.flush(ScriptedClient(lambda _: waiting.append(other.flush(ScriptedClient())))).sent == 1
    assert waiting == [left_alone(DOWN, until_ms=outbox.store.now_ms() + 60 * SECOND)]
    assert paused(outbox) == []
    assert other.flush(ScriptedClient()).sent == 39


def test_probes_are_the_newest_fresh_row_and_the_oldest_that_failed_in_turn(outbox: Outbox, noon) -> None:
    fail(outbox, noon)
    fresh = outbox.enqueue_many([rule_fired()] * 3)
    noon.travel(seconds=600)  # those that failed are due, too
    probed = []
    for _ in range(4):
        client = ScriptedClient(DOWN)
        noon.travel(milliseconds=outbox.flush(client).paused_until_ms - outbox.store.now_ms())
        probed += client.ids
    assert probed == [[fresh[2]], [1], [fresh[1]], [2]]


def test_a_probe_of_the_newest_row_finds_one_that_was_brought_back(outbox: Outbox, noon) -> None:
    fail(outbox, noon)
    now_ms = outbox.store.now_ms()
    older = add_row(outbox, created_at_ms=now_ms - 2, next_attempt_at_ms=now_ms)
    add_row(outbox, created_at_ms=now_ms - 1, next_attempt_at_ms=now_ms + 9)
    client = ScriptedClient()
    outbox.flush(client)
    assert client.ids == [[older]]


def test_a_probe_takes_a_row_whose_lease_ran_out(outbox: Outbox, noon) -> None:
    fail(outbox, noon)
    held = add_row(outbox, status="sending", next_attempt_at_ms=outbox.store.now_ms())
    client = ScriptedClient()
    outbox.flush(client)
    assert client.ids == [[held]]


def test_flush_all_goes_on_in_full_batches_after_its_probe(outbox: Outbox, noon) -> None:
    fail(outbox, noon)
    enqueue(outbox, 100)
    client = ScriptedClient()
    assert outbox.flush_all(client).sent == 100
    assert client.sizes == [1, 64, 35]


def test_a_probe_with_nothing_to_send_is_none(outbox: Outbox, other: Outbox, noon) -> None:
    fail(outbox, noon)
    assert outbox.flush(ScriptedClient()) == FlushReport()
    enqueue(outbox)
    assert other.flush(ScriptedClient()).sent == 1


def test_a_probe_that_sends_nothing_leaves_it_to_another_one(outbox: Outbox, other: Outbox, noon) -> None:
    fail(outbox, noon)
    now_ms = outbox.store.now_ms()
    add_row(outbox, payload_json="{", created_at_ms=now_ms)
    assert outbox.flush(ScriptedClient()).abandoned == 1
    enqueue(outbox)
    assert other.flush(ScriptedClient()).sent == 1


def test_a_probe_that_is_interrupted_leaves_it_to_another_one(outbox: Outbox, other: Outbox, noon) -> None:
    fail(outbox, noon)
    enqueue(outbox)
    with pytest.raises(KeyboardInterrupt):
        outbox.flush(ScriptedClient(KeyboardInterrupt()))
    assert other.flush(ScriptedClient()).sent == 1


def test_a_probe_that_died_leaves_it_to_another_one_when_its_lease_has_run_out(outbox: Outbox, noon) -> None:
    fail(outbox, noon)
    enqueue(outbox, 2)
    now_ms = outbox.store.now_ms()
    claimed = outbox.store.claims.claim(now_ms=now_ms, lease_until_ms=now_ms + 60_000, batch_size=64)
    assert (len(claimed.rows), claimed.is_probe) == (1, True)
    noon.travel(seconds=59)
    assert outbox.flush(ScriptedClient()).claimed == 0
    noon.travel(seconds=1)
    assert outbox.flush(ScriptedClient()).sent == 1


def test_a_probe_that_is_proven_bad_lets_the_next_one_go_at_once(outbox: Outbox, noon) -> None:
    fail(outbox, noon)
    now_ms = outbox.store.now_ms()
    add_row(outbox, created_at_ms=now_ms, suspected_at_ms=now_ms - 600_000)
    add_row(outbox, status="sent", sent_at_ms=now_ms)
    report = outbox.flush(ScriptedClient(REJECTED))
    assert (report.abandoned, report.paused_until_ms, report.goes_on) == (1, None, True)
    enqueue(outbox)
    assert outbox.flush(ScriptedClient()).sent == 1


@pytest.mark.servers
@pytest.mark.parametrize(("of_the_faster", "claimed"), [(OK, 39), (DOWN, 0)])
def test_of_two_that_want_to_probe_at_once_one_is_late(
    outbox: Outbox, other: Outbox, noon, monkeypatch, of_the_faster, claimed: int
) -> None:
    fail(outbox, noon)
    enqueue(outbox, 40)
    change = Transaction.change

    def late(transaction, statement, /, **parameters):
        if statement is pauses.BEGIN_PROBE:
            monkeypatch.undo()
            other.flush(ScriptedClient(of_the_faster))
        return change(transaction, statement, **parameters)

    monkeypatch.setattr(Transaction, "change", late)
    assert outbox.flush(ScriptedClient()).claimed == claimed


# What an operator does, and sees


def test_retry_now_ends_the_pause(outbox: Outbox, other: Outbox) -> None:
    enqueue(outbox)
    outbox.flush(ScriptedClient(SLOW_DOWN))
    enqueue(outbox, 20)
    assert other.retry_now() == 1
    assert outbox.stats().pauses == []
    assert [other.flush(ScriptedClient()).sent for _ in range(2)] == [20, 1]


def test_a_pause_that_can_not_be_written_costs_no_outcome(outbox: Outbox, caplog) -> None:
    enqueue(outbox)
    refuse(outbox, "INSERT", "observation_destinations", "no pauses here")
    assert outbox.flush(ScriptedClient(DOWN)).rescheduled == 1
    assert "pausing the queue failed, the next flush tries again" in caplog.text
    assert row(outbox, 1).last_error == str(DOWN)


def test_a_rule_that_changes_nothing_writes_nothing(outbox: Outbox) -> None:
    refuse(outbox, "INSERT", "observation_destinations", "no pauses here")
    changed = outbox.store.pauses.change("", lambda pause: pause)
    assert changed == (SharedPause(), SharedPause())


def test_the_status_page_says_who_is_left_alone_and_why(outbox: Outbox, noon) -> None:
    def shown() -> str:
        text = status_in_words(outbox.stats(), "here", now_ms=outbox.store.now_ms())
        return next(line for line in text.splitlines() if line.startswith("paused"))

    why = f"the service asks to slow down ({SLOW_DOWN}), 3 failures in a row"
    fail(outbox, noon, times=2)
    enqueue(outbox)
    outbox.flush(ScriptedClient(SLOW_DOWN))
    assert "nothing is sent until" in shown()
    assert shown().endswith(f" (in 40 seconds): {why}; `outbox retry --all` ends the pause")
    noon.travel(seconds=40)
    assert shown().endswith(f"the pause is over, and the next flush sends one event as a probe: {why}")
    enqueue(outbox)
    seen: list[str] = []
    outbox.flush(ScriptedClient(lambda _: seen.append(shown())))
    (probing,) = seen
    assert "one flusher sends one event as a probe; the others wait for its result" in probing


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
    assert "nothing was sent: paused, the service failed or asked to slow down: 429 Too Many" in told.output
    assert told.output.endswith(f"; the pause ends at {until}, or when you run `outbox retry --all`\n")
    assert len(server.requests) == 1


def test_while_one_flusher_probes_no_other_one_begins_a_probe(outbox: Outbox) -> None:
    outbox.store.pauses.change("", lambda pause: pause._replace(failures=3, number=1))

    def begins(*, now_ms: int) -> bool:
        return outbox.store.claims._writer.run(
            lambda transaction: pauses.begin_probe(
                transaction, "", seen=1, now_ms=now_ms, lease_until_ms=now_ms + 60_000
            )
        )

    assert [begins(now_ms=NOON_MS), begins(now_ms=NOON_MS + 59_999), begins(now_ms=NOON_MS + 60_000)] == [
        True,
        False,
        True,
    ]

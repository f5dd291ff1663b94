from __future__ import annotations

import json
from datetime import timedelta

import pytest
from freezegun import freeze_time
from sqlalchemy import insert

from builders import NOON, NOON_MS, add_row, row
from command_line import runner
from outbox import Policy, life
from outbox.cli import main
from outbox.pauses import SharedPause
from outbox.storage.engines import writing
from outbox.storage.tables import tries


@pytest.fixture
def run(url):
    def run(*arguments):
        return runner().invoke(main, ["--database", url, *map(str, arguments)])

    return run


def facts(run, row_id=1):
    """What `show` says a minute after noon, by name."""
    with freeze_time(NOON + timedelta(minutes=1)):
        text = run("show", row_id).stdout
    return {line[:14].rstrip(): line[14:] for line in text.partition("\n\n")[0].splitlines()}


def pause(outbox, **fields):
    outbox.store.pauses.change("", lambda _: SharedPause(**{"number": 1, "last_error": "503 Down", **fields}))


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (
            {},
            "it has been due since 2026-11-24 12:00:00 UTC; the next flush sends it. A failure after 2026-12-01 12:00:00 UTC",
        ),
        ({"revived_at_ms": NOON_MS + 60_000}, ". A failure after 2026-12-01 12:01:00 UTC abandons it"),
        (
            {"status": "sending", "next_attempt_at_ms": NOON_MS + 90_000},
            "a flusher is sending it; if that flusher dies, it is due again at 2026-11-24 12:01:30 UTC",
        ),
        ({"status": "sending"}, "it has been due since 2026-11-24 12:00:00 UTC"),
        ({"status": "sent", "sent_at_ms": NOON_MS}, "nothing: it is delivered"),
        (
            {"status": "parked"},
            "set a new token, then run `outbox retry --all`. Without a retry, one parked event is tried each",
        ),
        ({"status": "abandoned"}, "nothing: it is abandoned; `outbox requeue 1` returns it to the queue"),
        ({"payload_json": "oops"}, "the next flush abandons it, because its payload is no JSON object: "),
    ],
)
def test_what_comes_next_depends_on_the_state(run, outbox, columns, words):
    add_row(outbox, **columns)
    with freeze_time(NOON + timedelta(minutes=1)):
        text, as_json = run("show", 1), run("show", 1, "--json")
    assert words in text.stdout
    assert words in json.loads(as_json.stdout)["next"]


def test_a_pause_of_another_destination_holds_no_event(run, outbox):
    add_row(outbox, destination="billing")
    pause(outbox, until_ms=NOON_MS + 90_000, failures=1)
    assert "pause" not in facts(run)["next"]


def test_an_unknown_state_has_no_next(run, outbox):
    add_row(outbox)
    odd = row(outbox, 1)
    odd._machine_status = "odd"
    assert "does not know the status" in life.what_next(odd, life.Around(NOON_MS, Policy(), [], [], []))


def test_show_tells_everything_and_what_comes_next(run, outbox):
    add_row(
        outbox,
        event_id="order-17",
        retry_count=2,
        next_attempt_at_ms=NOON_MS + 240_000,
        last_error="503 Service Unavailable",
        rule_ids_json='["r1"]',
        session_id="s1",
        file_path="a.py",
    )
    with freeze_time(NOON + timedelta(minutes=1)):
        result = run("show", 1)
    assert (
        result.stdout
        == """\
event         1
event id      order-17
type          rule_fired
destination   default
status        pending
next          it waits until 2026-11-24 12:04:00 UTC (in 3 minutes); then the next flush sends it. A failure \
after 2026-12-01 12:00:00 UTC abandons it
created       2026-11-24 12:00:00 UTC (1 minute ago)
occurred      2026-11-24 12:00:00 UTC (1 minute ago)
failures      2
last error    the service is failing (503 Service Unavailable)
rules         ["r1"]
session       s1
file          a.py
content hash  b6dc97a47e194612

2026-11-24 12:00:00 UTC  recorded

{
  "event_type": "rule_fired",
  "rule_ids": [
    "r1"
  ],
  "session_id": "s1",
  "fired_at": "2026-11-24T12:00:00Z"
}
"""
    )


def test_show_leaves_out_fields_that_the_event_does_not_have(run, outbox):
    outbox.enqueue({"event_type": "order_shipped", "order_id": "o-17"})
    names = [line.split("  ")[0] for line in run("show", 1).stdout.splitlines()]
    assert "content hash" in names
    assert not {"rules", "session", "file"} & {*names}


def test_json_of_show_has_every_column_by_its_name(run, outbox):
    add_row(outbox)
    event = json.loads(run("show", 1, "--json").stdout)
    assert event["payload_json"].startswith('{"event_type":')
    assert event["created_at_ms"] == NOON_MS
    columns = ("revived_at_ms", "suspected_at_ms", "waits_for", "lost_leases")
    assert [event[name] for name in columns] == [None, None, None, 0]


def test_an_event_that_is_not_there_is_a_failure(run, outbox):
    result = run("show", 7)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "outbox: there is no event 7: it was never enqueued here, or it was deleted\n"


def test_a_suspect_says_since_when_and_what_would_prove_it(run, outbox):
    add_row(outbox, waits_for="proof", suspected_at_ms=NOON_MS, last_error="422 Bad", retry_count=1)
    told = facts(run)
    assert (
        told["waits for"] == "proof: the service rejected this event alone; it is a suspect until there is proof"
    )
    assert told["suspected"] == "since 2026-11-24 12:00:00 UTC (1 minute ago), when it was first rejected alone"
    assert told["proof"] == (
        "the outbox abandons the event if the service rejects it alone again after 2026-11-24 12:10:00 UTC (in 9 minutes),"
        " and accepted another event since the first rejection, at most 1 minute before the new rejection"
    )
    assert told["last error"] == "the service rejected this event alone (422 Bad)"


def test_an_abandoned_suspect_has_been_proven_bad(run, outbox):
    add_row(
        outbox, status="abandoned", waits_for="proof", suspected_at_ms=NOON_MS, last_error="permanent: 422 Bad"
    )
    told = facts(run)
    assert "suspected" in told
    assert not {"proof", "waits for"} & {*told}
    assert told["last error"] == "the service rejected this event (permanent: 422 Bad)"


def test_a_suspicion_that_is_no_time_proves_nothing(run, outbox):
    add_row(outbox, suspected_at_ms="x")
    told = facts(run)
    assert told["suspected"].startswith("since 'x'")
    assert "proof" not in told


@pytest.mark.parametrize(
    ("waits_for", "words"),
    [
        ("service", "service: the service probably failed, not this event; "),
        ("delay", "delay: the service asked for a delay"),
        ("row", "row: this event failed alone while the service seemed to work; "),
        ("odd", "odd: this program does not know why"),
    ],
)
def test_what_an_event_waits_for_is_put_in_words(run, outbox, waits_for, words):
    add_row(outbox, waits_for=waits_for, last_error="500 Oops")
    told = facts(run)
    assert told["waits for"].startswith(words)
    assert "suspected" not in told


def test_a_row_that_failed_alone_says_nothing_about_the_service(run, outbox):
    add_row(outbox, waits_for="row", last_error="403 Forbidden")
    expected = "this event failed alone while the service seemed to work (403 Forbidden)"
    assert facts(run)["last error"] == expected


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        (1, "1, the number of times that a flusher died, or lost its lease, while it held the event"),
        (
            2,
            "2, the number of times that a flusher died, or lost its lease, while it held the event; it is sent alone now",
        ),
        ("x", "'x', the number of times that a flusher died, or lost its lease, while it held the event"),
    ],
)
def test_lost_leases_are_told(run, outbox, lost, words):
    add_row(outbox, lost_leases=lost)
    assert facts(run)["lost leases"] == words


def test_a_pause_that_holds_an_event_is_told(run, outbox):
    add_row(outbox)
    add_row(outbox, next_attempt_at_ms=NOON_MS + 3_600_000)
    pause(outbox, failures=1, until_ms=NOON_MS + 90_000)
    assert facts(run)["next"].startswith(
        "it has been due since 2026-11-24 12:00:00 UTC, but its destination is paused until"
        " 2026-11-24 12:01:30 UTC (in 30 seconds): the service is failing (503 Down); then the next flush sends it. "
    )
    assert facts(run, 2)["next"].startswith(
        "it waits until 2026-11-24 13:00:00 UTC (in 59 minutes); then the next"
    )


def test_a_probe_comes_first_after_three_failures(run, outbox):
    add_row(outbox)
    pause(outbox, failures=3, until_ms=NOON_MS)
    assert facts(run)["next"].startswith(
        "it has been due since 2026-11-24 12:00:00 UTC; one event is sent as a probe,"
    )


# What happened


def lives(run, row_id=1):
    """The lines of `show` about the past of an event."""
    return run("show", row_id).stdout.split("\n\n")[1].splitlines()


def try_at(outbox, row_id, minute, **fields):
    """Keep a failed try, so many minutes after noon."""
    event = row(outbox, row_id)
    values = {"duration_ms": 120, "host": "web-1", "verdict": "transient", "failure": "503 Down", **fields}
    with writing(outbox.engine) as connection:
        connection.execute(
            insert(tries).values(
                row_id=row_id, created_at_ms=event.created_at_ms, tried_at_ms=NOON_MS + minute * 60_000, **values
            )
        )


def test_show_tells_the_life_of_an_event_in_order(run, outbox):
    add_row(outbox, status="sent", sent_at_ms=NOON_MS + 360_000, revived_at_ms=NOON_MS + 180_000)
    try_at(outbox, 1, 1)
    try_at(outbox, 1, 2, verdict="auth blocked", failure="401 Unauthorized", host="web-2", duration_ms=9_999)
    try_at(outbox, 1, 5, duration_ms=45_000, failure="connection refused\x1b[31m")
    assert lives(run) == [
        "2026-11-24 12:00:00 UTC  recorded",
        "2026-11-24 12:01:00 UTC  tried by web-1; failed after 120 ms, transient: the service is failing (503 Down)",
        "2026-11-24 12:02:00 UTC  tried by web-2; failed after 9999 ms, auth blocked: the service rejected the token (401 Unauthorized)",
        "2026-11-24 12:03:00 UTC  returned to the queue",
        r"2026-11-24 12:05:00 UTC  tried by web-1; failed after 45 seconds, transient: the upload failed (connection refused\x1b[31m)",
        "2026-11-24 12:06:00 UTC  accepted by the service",
    ]


def test_a_rejected_request_says_nothing_about_other_requests(run, outbox):
    add_row(outbox)
    try_at(outbox, 1, 1, verdict="permanent", failure="422 Bad")
    try_at(outbox, 1, 2, verdict="permanent", failure="permanent: 422 Bad")
    assert [line.partition("permanent: ")[2] for line in lives(run)[1:]] == [
        "the service rejected the request (422 Bad)",
        "the service rejected this event (permanent: 422 Bad)",
    ]


def test_show_says_that_earlier_tries_are_not_kept(run, outbox):
    add_row(outbox)
    for minute in range(4):
        try_at(outbox, 1, minute)
    assert "are kept" not in "".join(lives(run))
    try_at(outbox, 1, 4)
    assert lives(run)[1].endswith("(503 Down). Only the last 5 failed tries are kept")
    assert len(lives(run)) == 6


def test_json_of_show_has_the_tries(run, outbox):
    add_row(outbox)
    try_at(outbox, 1, 1)
    assert json.loads(run("show", 1, "--json").stdout)["tries"] == [
        {
            "tried_at_ms": NOON_MS + 60_000,
            "duration_ms": 120,
            "host": "web-1",
            "verdict": "transient",
            "failure": "503 Down",
        }
    ]


def test_a_time_that_is_no_number_breaks_nothing(run, outbox):
    add_row(outbox, created_at_ms="long ago")
    assert lives(run) == ["'long ago'  recorded"]


def test_a_payload_is_indented_unless_that_makes_it_huge():
    assert life.pretty('{"a":[1,"é"]}') == '{\n  "a": [\n    1,\n    "é"\n  ]\n}'
    deep = f"{'[' * 500}{'1,' * 5_000}1{']' * 500}"
    assert life.pretty(deep) == deep

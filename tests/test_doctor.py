"""What the doctor finds, and what it takes for sound."""

import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner
from freezegun import freeze_time

from builders import (
    DOWN,
    NOON,
    NOON_MS,
    ScriptedClient,
    add_row,
    rule_fired,
)
from outbox import Outbox, Policy
from outbox.cli import main
from outbox.delays import backoff
from outbox.doctor import examine
from outbox.holds import hold_in_words
from outbox.storage import sqlite_file


def path_of(url: str) -> Path:
    return Path(url.removeprefix("sqlite:///"))


def doctor(url: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["--database", url, "doctor"])
    return result.exit_code, result.output


def test_the_doctor_finds_a_sound_database_well(outbox: Outbox, url: str) -> None:
    outbox.enqueue_many([rule_fired()] * 3)
    outbox.flush(ScriptedClient(DOWN))
    code, words = doctor(url)
    assert code == 0
    assert [line.split()[:2] for line in words.splitlines()] == [
        ["ok", "schema"],
        ["ok", "integrity"],
        ["ok", "journal"],
        ["ok", "permissions"],
        ["ok", "identity"],
        ["ok", "times"],
        ["ok", "destinations"],
    ]


@pytest.mark.contract
@pytest.mark.traced
def test_the_doctor_tells_the_id_of_the_outbox(outbox: Outbox) -> None:
    outbox_id = outbox.store.views.outbox_id()
    (found,) = [one for one in examine(outbox.engine, Policy()) if one.check == "identity"]
    assert found.is_well
    assert found.words.startswith(f"the outbox id is {outbox_id}, the first part of each event id")
    assert "a restored backup keeps it" in found.words


def test_the_doctor_speaks_json(outbox: Outbox, url: str) -> None:
    result = CliRunner().invoke(main, ["--database", url, "doctor", "--json"])
    assert result.exit_code == 0
    assert '"check": "schema", "is_well": true' in result.output


@pytest.mark.contract
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"status": "sending", "next_attempt_at_ms": NOON_MS}, "1 event is held under an expired lease"),
        (
            {"status": "sending", "next_attempt_at_ms": NOON_MS + 3_600_000},
            "a lease that ends in more than 1 minute",
        ),
        ({"created_at_ms": NOON_MS + 3_600_000}, "created in the future: a clock was or is wrong"),
        ({"next_attempt_at_ms": NOON_MS + 3_600_000}, "due later than the longest wait"),
    ],
)
def test_the_doctor_finds_times_that_cannot_be(outbox: Outbox, url: str, columns, words: str) -> None:
    with freeze_time(NOON):
        add_row(outbox, **columns)
        code, said = doctor(url)
        assert code == 1
        assert "WRONG  times" in said
        assert words in said


@pytest.mark.contract
@pytest.mark.parametrize(
    "columns",
    [
        {"status": "sending", "next_attempt_at_ms": NOON_MS + Policy.lease_ms},
        {"next_attempt_at_ms": NOON_MS + backoff(5) * 5 // 4},
    ],
)
def test_the_doctor_finds_the_longest_lease_and_the_longest_wait_plausible(
    outbox: Outbox, url: str, columns
) -> None:
    with freeze_time(NOON):
        add_row(outbox, **columns)
        assert doctor(url)[0] == 0


@pytest.mark.contract
def test_the_doctor_counts_several(outbox: Outbox, url: str) -> None:
    with freeze_time(NOON):
        add_row(outbox, status="sending")
        add_row(outbox, status="sending")
        assert "2 events are held" in doctor(url)[1]


def test_the_doctor_finds_files_that_others_may_read(outbox: Outbox, url: str) -> None:
    path_of(url).chmod(0o644)
    code, words = doctor(url)
    assert code == 1
    assert "outbox.db has mode 0644, so users other than its owner can open it" in words


def test_the_doctor_finds_another_journal(outbox: Outbox, url: str, monkeypatch) -> None:
    outbox.close()
    monkeypatch.setattr(sqlite_file, "_enter_wal", lambda _: None)
    other = sqlite3.connect(path_of(url))
    other.execute("PRAGMA journal_mode = DELETE")
    other.close()
    code, words = doctor(url)
    assert code == 1
    assert "the journal mode is 'delete', expected 'wal'" in words


def test_the_doctor_finds_no_schema_and_no_file(url: str) -> None:
    assert doctor(url) == (
        1,
        f"WRONG  schema        there is no database {path_of(url)}; check the URL, or create it with `outbox upgrade` or Outbox.open()\n",
    )
    sqlite3.connect(path_of(url)).close()
    code, words = doctor(url)
    assert code == 1
    assert "has no outbox schema" in words


def test_the_doctor_tells_what_the_integrity_check_finds(outbox: Outbox, url: str) -> None:
    outbox.enqueue_many([rule_fired()] * 200)
    with outbox.engine.begin() as connection:
        # An index that lacks its entries: the file is well-formed, but not sound.
        connection.exec_driver_sql("PRAGMA writable_schema = ON")
        connection.exec_driver_sql(
            "UPDATE sqlite_master SET sql = replace(sql, '+status = ''parked''', '1')"
            " WHERE name = 'observation_events_parked_idx'"
        )
    outbox.close()
    code, words = doctor(url)
    assert code == 1
    assert "WRONG  integrity     the file is damaged" in words


@pytest.mark.servers
def test_the_doctor_examines_what_a_server_has(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    assert [(finding.check, finding.is_well) for finding in examine(outbox.engine, Policy())] == [
        ("schema", True),
        ("identity", True),
        ("times", True),
        ("destinations", True),
    ]


def test_a_database_in_memory_has_no_file_to_examine() -> None:
    with Outbox.open("sqlite://") as outbox:
        assert [finding.check for finding in examine(outbox.engine, Policy())] == [
            "schema",
            "integrity",
            "identity",
            "times",
            "destinations",
        ]


@pytest.mark.contract
@pytest.mark.usefixtures("noon")
@pytest.mark.traced
def test_the_doctor_names_destinations_that_nobody_delivers_to(outbox: Outbox) -> None:
    hour_ms = 3_600_000

    def said() -> list[tuple[bool, str]]:
        found = examine(outbox.engine, Policy())
        return [(one.is_well, one.words) for one in found if one.check == "destinations" and "hour" in one.words]

    add_row(outbox, next_attempt_at_ms=NOON_MS - hour_ms)
    assert said() == []  # it is the only destination
    outbox.purge(older_than=NOON_MS + 1)
    # Due for less than an hour, not due yet, served within the last hour, delivered.
    add_row(outbox, destination="young", next_attempt_at_ms=NOON_MS - hour_ms + 1)
    add_row(outbox, destination="later", next_attempt_at_ms=NOON_MS + 1)
    for served_ms, destination in ((NOON_MS - hour_ms + 1, "served"), (NOON_MS - hour_ms, "unserved")):
        add_row(outbox, destination=destination, status="sent", sent_at_ms=served_ms)
        add_row(outbox, destination=destination, next_attempt_at_ms=NOON_MS - hour_ms)
    words = "nothing was delivered for an hour to {}, although events are due; check that a flusher serves each of them"
    assert said() == [(False, f"{words.format('unserved')}, and what `outbox status` shows")]
    hold = outbox.hold("unserved", why="a deploy")
    assert said() == []
    assert ("destinations", True, hold_in_words(hold)) in examine(outbox.engine, Policy())  # that is no fault
    outbox.resume("unserved")
    for number in range(12):
        add_row(outbox, destination=f"d{number:02}", status="sending", next_attempt_at_ms=NOON_MS - hour_ms)
    ((_, listed),) = said()
    assert listed.startswith(words.format("d00, d01, d02, d03, d04, d05, d06, d07, d08, d09, 3 more"))


@pytest.mark.contract
@pytest.mark.usefixtures("noon")
def test_the_doctor_warns_of_programs_that_know_no_destinations(outbox: Outbox) -> None:
    def said() -> list[str]:
        return [found.words for found in examine(outbox.engine, Policy()) if found.check == "destinations"]

    add_row(outbox)
    add_row(outbox, destination="search", status="sent", sent_at_ms=NOON_MS)
    assert said() == ["every undelivered event goes to the default destination"]
    for destination in ("billing", "billing", "crm"):
        add_row(outbox, destination=destination)
    (words,) = said()
    assert words.startswith(
        "undelivered events go to 2 destinations beside the default one: a program that knows no"
    )
    assert words.endswith("would send them to the default one; it must not flush this database")

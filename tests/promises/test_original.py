"""The file that difflore made, and its requests: adopted, upgraded, downgraded, delivered and shared with it."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import sqlite3
from collections import Counter
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import pytest
from alembic import command

from builders import ROOT, ScriptedClient, rule_fired
from outbox import HttpClient, HttpFailure, Outbox, Policy, schema
from outbox.events import decode
from outbox.new_rows import columns
from outbox.testing.receiver import IngestServer
from peers import ACCEPTED, Peer, Row, read_request
from test_schema import alembic_here

DATA = ROOT / "tests" / "data" / "difflore"
REQUESTS = json.loads((DATA / "requests.json").read_text(encoding="utf-8"))
COLUMNS = (
    "id, event_type, rule_id, rule_ids_json, session_id, file_path, occurred_at_ms, payload_json, status, retry_count,"
    " next_attempt_at_ms, last_error, created_at_ms, sent_at_ms"
)
with closing(sqlite3.connect(f"file:{DATA}/difflore-0.2.0.db?immutable=1", uri=True)) as left:
    SCHEMA = [sql for (sql,) in left.execute("SELECT sql FROM sqlite_master WHERE name LIKE 'observation%'")]
LEFT_AT = datetime(2026, 11, 26, 14, 0, tzinfo=timezone.utc)
LEASE_MS = 60_000


class Original:
    """What difflore does to its file: plain SQL on its own columns, as it would before any of ours was there."""

    def __init__(self, file: Path):
        self._file = file
        for sql in SCHEMA:
            self.ask(re.sub("^CREATE (TABLE|INDEX)", r"CREATE \1 IF NOT EXISTS", sql))

    def ask(self, statement, *values):
        with closing(sqlite3.connect(self._file)) as connection, connection:
            return connection.execute(statement, values).fetchall()

    def rows(self):
        return self.ask(f"SELECT {COLUMNS} FROM observation_events ORDER BY id")

    def counts(self):
        return Counter(status for (status,) in self.ask("SELECT status FROM observation_events"))

    def enqueue(self, now_ms):
        payload = '{"event_type":"rule_fired","rule_ids":["r"],"session_id":"s","fired_at":"2026-11-26T14:00:00.123456789Z"}'
        ((row_id,),) = self.ask(
            "INSERT INTO observation_events (event_type, rule_ids_json, session_id, occurred_at_ms, payload_json,"
            " next_attempt_at_ms, created_at_ms) VALUES ('rule_fired', '[\"r\"]', 's', ?, ?, ?, ?) RETURNING id",
            *(now_ms, payload, now_ms, now_ms),
        )
        return row_id

    def claim(self, now_ms):
        return [
            row_id
            for (row_id,) in self.ask(
                "UPDATE observation_events SET status = 'sending', next_attempt_at_ms = ? WHERE id IN (SELECT id"
                " FROM observation_events WHERE status IN ('pending', 'sending') AND next_attempt_at_ms <= ?"
                " ORDER BY created_at_ms, id LIMIT 64) RETURNING id",
                *(now_ms + LEASE_MS, now_ms),
            )
        ]

    def deliver(self, ids, now_ms):
        for row_id in ids:
            self.ask("UPDATE observation_events SET status = 'sent', sent_at_ms = ? WHERE id = ?", now_ms, row_id)

    def park(self, ids):
        for row_id in ids:
            self.ask(
                "UPDATE observation_events SET status = 'parked', last_error = '401' WHERE id = ? AND status = 'sending'",
                row_id,
            )

    def unpark(self, now_ms):
        self.ask(
            "UPDATE observation_events SET status = 'pending', retry_count = 0, last_error = NULL,"
            " next_attempt_at_ms = ? + id % 5000 WHERE status = 'parked'",
            now_ms,
        )


@pytest.fixture
def file(tmp_path):
    return shutil.copy(DATA / "difflore-0.2.0.db", tmp_path / "outbox.db")


@pytest.fixture
def original(file):
    return Original(file)


@pytest.fixture
def later(outbox_time):
    """The time, which stands still after all leases of the file ran out."""
    outbox_time.move_to(LEFT_AT)
    return outbox_time


def ms(time):
    return int(time.now.timestamp() * 1_000)


# The file


def test_its_file_is_adopted_without_touching_a_row(original, file, url):
    before, ddl = (
        original.rows(),
        original.ask("SELECT name, sql FROM sqlite_master WHERE name LIKE 'observation%'"),
    )
    assert original.counts() == {"sent": 5, "parked": 10, "pending": 15, "sending": 5, "abandoned": 1}

    with Outbox.open(url) as outbox:
        assert original.rows() == before
        assert outbox.stats().counts == dict(original.counts())
        for found, values in zip(outbox.find(limit=len(before)), before, strict=True):
            assert tuple(getattr(found, name) for name in COLUMNS.split(", ")) == values
    its_indexes = "'observation_events_recent_idx', 'observation_events_pending_idx'"
    assert original.ask(f"SELECT * FROM sqlite_master WHERE name IN ({its_indexes})") == []
    original = Original(file)  # it creates its indexes again
    for name, sql in ddl:
        ((now,),) = original.ask("SELECT sql FROM sqlite_master WHERE name = ?", name)
        assert now.startswith(sql.removesuffix(")").rstrip())


def test_its_events_are_read_as_it_reads_them(original):
    for values in original.rows():
        row = dict(zip(COLUMNS.split(", "), values, strict=True))
        read = columns(decode(row["payload_json"]), now_ms=0)
        assert read == {name: row[name] for name in read}


def check_that_it_goes_on(file, now_ms):
    """The original opens the file, enqueues, claims and delivers; its other events stay as they are."""
    original = Original(file)
    before = original.rows()
    row_id = original.enqueue(now_ms)
    assert row_id == max(values[0] for values in before) + 1
    assert original.claim(now_ms) == [row_id]
    original.deliver([row_id], now_ms)
    assert original.rows()[:-1] == before


def test_it_goes_on_after_each_step_of_the_upgrade_and_of_the_downgrade(file, url):
    before = Original(file).rows()
    now_ms = min(values[10] for values in before if values[8] in ("pending", "sending")) - 1
    revisions = [*schema.REVISIONS, *reversed(schema.REVISIONS[:-1]), "base"]
    for number, revision in enumerate(revisions):
        move = command.upgrade if number < len(schema.REVISIONS) else command.downgrade
        move(alembic_here(url), revision)
        check_that_it_goes_on(file, now_ms)
        assert Original(file).rows()[: len(before)] == before

    with Outbox.open(url) as outbox:
        assert outbox.stats().counts["sent"] == 5 + len(revisions)


def test_all_that_it_left_is_delivered_once_and_as_it_is(original, url, later, outbox_server, outbox_client):
    payloads = {values[0]: values[7] for values in original.rows()}
    undelivered = {values[0] for values in original.rows() if values[8] != "sent"}
    with Outbox.open(url) as outbox:
        assert outbox.flush_all(outbox_client).sent == 20
        assert list(outbox_server.stored.values()) == [payloads[row_id] for row_id in range(17, 37)]

        later.travel(seconds=6)  # the success brought the parked events back
        assert outbox.flush_all(outbox_client).sent == 10
        assert outbox.requeue_abandoned(older_than=later.now).total == 1
        assert outbox.flush_all(outbox_client).sent == 1
        assert outbox.stats().counts["sent"] == 36

    assert sorted(outbox_server.stored.values()) == sorted(payloads[row_id] for row_id in undelivered)
    assert outbox_server.duplicates == 0


# Both on one file


def test_what_one_holds_the_other_leaves_alone(original, url, later):
    with Outbox.open(url, policy=Policy.original()) as outbox:
        held = original.claim(ms(later))
        assert len(held) == 20
        assert outbox.flush(ScriptedClient()).claimed == 0

        later.travel(milliseconds=LEASE_MS)
        client = ScriptedClient(lambda batch: original.deliver(original.claim(ms(later)), ms(later)))
        assert outbox.flush(client).sent == 20
        assert client.ids == [sorted(held)]


def test_what_one_parks_the_other_brings_back(original, url, later):
    with Outbox.open(url, policy=Policy.original()) as outbox:
        original.park(original.claim(ms(later)))
        assert original.counts()["parked"] == 30
        row_id = outbox.enqueue(rule_fired())
        assert outbox.flush(ScriptedClient()).sent == 1
        assert original.counts()["parked"] == 0

        later.travel(seconds=6)
        assert outbox.flush(ScriptedClient(HttpFailure(401))).parked == 30
        original.unpark(ms(later))
        later.travel(seconds=6)
        assert len(original.claim(ms(later))) == 30
        assert outbox.get(row_id).status == "sent"


# Its requests and its service


def post(server, request):
    port = int(server.url.rpartition(":")[2])
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request(request["method"], request["path"], request["body"].encode(), request["headers"])
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


@pytest.mark.parametrize("request_", REQUESTS)
def test_its_requests_are_understood_and_answered_as_its_service_answers(request_):
    events = json.loads(request_["body"])
    with IngestServer(token="tok-123") as server:
        assert post(server, request_) == (200, {"received": len(events), "deduped": 0})
        assert post(server, request_) == (200, {"received": len(events), "deduped": len(events)})
        texts = list(server.stored.values())
    assert f"[{','.join(texts)}]" == request_["body"]
    assert [json.loads(text) for text in texts] == events


@pytest.mark.parametrize("request_", REQUESTS)
def test_the_same_rows_make_the_same_request(request_, original):
    stored = {values[7]: values[0] for values in original.rows()}
    batch = [Row(stored[payload], payload) for payload in stored if payload in request_["body"]]
    taken = []

    def serve(connection, stopped):
        taken.extend(read_request(connection))
        connection.sendall(ACCEPTED)

    with Peer(serve) as peer, HttpClient(peer.url, token="tok-123") as client:
        client.upload(batch)
    head, body = taken
    assert body.decode() == request_["body"]
    assert head.startswith(f"{request_['method']} {request_['path']} HTTP/1.1\r\n")
    for name in ("authorization", "content-type"):
        assert f"\r\n{name}: {request_['headers'][name]}".lower() in head.lower()


@pytest.mark.parametrize(
    ("status", "code"), [(400, "BAD_REQUEST"), (401, "UNAUTHORIZED"), (403, "FORBIDDEN"), (429, "RATE_LIMITED")]
)
def test_its_failures_are_answered_in_the_shape_that_its_service_defines(status, code):
    with IngestServer() as server:
        server.script(status)
        answered, body = post(server, REQUESTS[0])
    assert (answered, list(body)) == (status, ["defined", "code", "status", "message", "data"])
    assert (body["defined"], body["code"], body["status"]) == (True, code, status)
    assert isinstance(body["message"], str)


def test_a_wrong_token_and_a_body_that_is_none_are_such_failures():
    request = {**REQUESTS[0], "headers": {"authorization": "Bearer tok-123"}}
    with IngestServer(token="tok-123") as server:
        assert post(server, {**request, "body": "[1]"})[1]["code"] == "BAD_REQUEST"
        server.token = "another"
        assert post(server, request)[1]["code"] == "UNAUTHORIZED"

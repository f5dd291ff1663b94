"""What tests build rows, events and answers from."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sqlalchemy import event, insert, select

from outbox import BatchItem, HttpFailure, ObservationEvent, Outbox, Policy, RuleFired, UploadFailure
from outbox.storage.engines import reading, writing

ROOT = Path(__file__).parents[1]

NOON = datetime(2026, 11, 24, 12, 0, tzinfo=timezone.utc)
NOON_MS = 1_795_521_600_000

OK = None
REJECTED = HttpFailure(422, "Unprocessable Entity", "bad row")
REVOKED = HttpFailure(401, "Unauthorized", '{"error":"session_revoked"}')
DOWN = HttpFailure(503, "Service Unavailable")
SLOW_DOWN = HttpFailure(429, "Too Many Requests", '{"retryAfterSec":40}')


def rule_fired(**fields: Any) -> RuleFired:
    return RuleFired(**{"rule_ids": ["r1"], "session_id": "s1", "fired_at": NOON, **fields})


class ScriptedClient:
    """An upload client whose answers are given: None accepts, a failure is raised, a function decides."""

    def __init__(
        self, *answers: UploadFailure | BaseException | Callable[..., Any] | None, logged_in: bool = True
    ):
        self.answers = list(answers)
        self.logged_in = logged_in
        self.batches: list[list[BatchItem]] = []

    @property
    def sizes(self) -> list[int]:
        return [len(batch) for batch in self.batches]

    @property
    def ids(self) -> list[list[int]]:
        return [[item.id for item in batch] for batch in self.batches]

    def upload(self, batch: Sequence[BatchItem], /) -> None:
        self.batches.append(list(batch))
        answer = self.answers.pop(0) if self.answers else OK
        if callable(answer):
            answer = answer(batch)
        if answer is not None:
            raise answer


class Original(Policy):
    """The rules of the original uploader."""

    is_original = True


def rejecting(*bad_ids: int) -> ScriptedClient:
    """A server that rejects every request with one of these rows in it."""
    client = ScriptedClient()
    client.answers = [lambda batch: REJECTED if {item.id for item in batch} & {*bad_ids} else OK] * 1_000
    return client


def add_row(outbox: Outbox, **columns: Any) -> int:
    """Put a row in any state into the table, past all rules."""
    payload = '{"event_type":"rule_fired","rule_ids":["r1"],"session_id":"s1","fired_at":"2026-11-24T12:00:00Z"}'
    row = {
        "event_type": "rule_fired",
        "occurred_at_ms": NOON_MS,
        "payload_json": payload,
        "created_at_ms": NOON_MS,
        "next_attempt_at_ms": NOON_MS,
        **columns,
    }
    with writing(outbox.engine) as connection:
        return connection.execute(insert(ObservationEvent.__table__).values(row)).inserted_primary_key[0]


def row(outbox: Outbox, row_id: int) -> ObservationEvent:
    found = outbox.get(row_id)
    assert found is not None, f"row {row_id} is gone"
    return found


def statuses(outbox: Outbox) -> list[str]:
    """The status of every row, by id."""
    events = ObservationEvent.__table__
    with reading(outbox.engine) as connection:
        return list(connection.scalars(select(events.c.status).order_by(events.c.id)))


def all_sent(outbox: Outbox) -> bool:
    return set(statuses(outbox)) == {"sent"}


def on_statement(outbox: Outbox, seen: Callable[[str], object]) -> None:
    """Call `seen` with the text of each statement just before SQLite runs it."""
    outbox.engine.dispose()  # so that no connection is checked out that does not tell
    event.listen(outbox.engine, "connect", lambda connection, _: connection.set_trace_callback(seen))


@contextmanager
def heeding_ctrl_c() -> Iterator[None]:
    """Let processes that are started here end by Ctrl-C, even where `nohup` or `&` told the tests to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def run_code(code: str, name: str, namespace: dict[str, Any]) -> None:
    """Run the code of a page in a namespace, where all that it defines stays, also when it fails."""
    own = compile(code, name, "exec", dont_inherit=True)  # without the __future__ of this file
    exec(own, namespace)  # noqa: S102 - to run what the pages show is the test


def columns_of(found: ObservationEvent) -> dict[str, Any]:
    return {column.name: getattr(found, column.name) for column in ObservationEvent.__table__.columns}


# Which databases speak the language of another one.
_LANGUAGES = {"mariadb": "mysql", "fourth": "sqlite"}


def refuse(outbox: Outbox, what: str, table: str, words: str, *, on_sqlite: str = "ABORT") -> None:
    """Let the database itself refuse every INSERT, UPDATE or DELETE of a table, in these words."""
    trigger = f"CREATE TRIGGER refuse BEFORE {what} ON {table}"
    statements = {
        "sqlite": [f"{trigger} BEGIN SELECT RAISE({on_sqlite}, '{words}'); END"],
        "postgresql": [
            "CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql"
            f" AS $$ BEGIN RAISE EXCEPTION '{words}'; END $$",
            f"{trigger} FOR EACH ROW EXECUTE FUNCTION refuse()",
        ],
        "mysql": [f"{trigger} FOR EACH ROW SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = '{words}'"],
    }
    with outbox.engine.begin() as connection:
        for statement in statements[_LANGUAGES.get(outbox.engine.dialect.name, outbox.engine.dialect.name)]:
            connection.exec_driver_sql(statement)


def refuse_third(outbox: Outbox) -> None:
    """Refuse one of several events, after others were taken."""
    words = "the third one is refused"
    statements = {
        "sqlite": [
            "CREATE TRIGGER refuse_third BEFORE INSERT ON observation_events WHEN NEW.session_id = 'third'"
            f" BEGIN SELECT RAISE(ABORT, '{words}'); END"
        ],
        "postgresql": [
            "CREATE OR REPLACE FUNCTION refuse_third() RETURNS trigger LANGUAGE plpgsql AS"
            f" $$ BEGIN IF NEW.session_id = 'third' THEN RAISE EXCEPTION '{words}'; END IF; RETURN NEW; END $$",
            "CREATE TRIGGER refuse_third BEFORE INSERT ON observation_events"
            " FOR EACH ROW EXECUTE FUNCTION refuse_third()",
        ],
        "mysql": [
            "CREATE TRIGGER refuse_third BEFORE INSERT ON observation_events FOR EACH ROW"
            f" IF NEW.session_id = 'third' THEN SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = '{words}'; END IF"
        ],
    }
    with outbox.engine.begin() as connection:
        for statement in statements[_LANGUAGES.get(outbox.engine.dialect.name, outbox.engine.dialect.name)]:
            connection.exec_driver_sql(statement)

"""The host sees every statement of the outbox: its listeners, its log and its traces do."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import pytest
from opentelemetry.instrumentation.sqlalchemy import SQLAlchemyInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sqlalchemy import Engine, create_engine, event

from builders import DOWN, REVOKED, ScriptedClient, rule_fired
from outbox import Outbox, Policy
from outbox.storage.engines import open_engine

# On a file of SQLite our own engine works on the driver's cursor.
ENGINES = [
    pytest.param("sqlite", create_engine, id="sqlite-host's"),
    *(
        pytest.param(database, make, id=f"{database}-{name}", marks=pytest.mark.slow)
        for database in ("postgresql", "mariadb")
        for name, make in (("host's", create_engine), ("ours", open_engine))
    ),
]
on_each_engine = pytest.mark.parametrize(("database", "make"), ENGINES, indirect=["database"])

# What each operation writes. PostgreSQL begins some with WITH, and MariaDB claims by two statements.
EXPECTED = {
    "enqueue": ["INSERT INTO observation_events"],
    "claim": ["status='sending'"],
    "settle": ["status='sent'"],
    "reschedule": ["SET retry_count="],
    "park": ["status='parked'"],
    "renew": ["SET next_attempt_at_ms="],
    "cap": ["DELETE FROM observation_events", "INSERT INTO observation_events_ledger"],
    "retry": ["UPDATE observation_events SET next_attempt_at_ms="],
}


def do_everything(outbox: Outbox) -> None:
    for answer in (DOWN, REVOKED, None):
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient(answer))
        outbox.retry_now()
    outbox.enqueue_many([rule_fired()] * 4)
    now = outbox.store.now_ms()
    claimed = outbox.store.claims.claim(now_ms=now, lease_until_ms=now + 60_000, batch_size=9).rows
    outbox.store.claims.renew([row.id for row in claimed], lease_until_ms=now + 60_000, for_ms=90_000)


def missing(seen: list[str]) -> list[str]:
    """What of the expected is not among the statements that were seen."""
    words = [" ".join(statement.split()) for statement in seen]
    return [
        operation
        for operation, parts in EXPECTED.items()
        if not all(any(part in statement for statement in words) for part in parts)
    ]


@pytest.fixture
def engine(outbox: Outbox, url: str, make: Callable[..., Engine]) -> Iterator[Engine]:
    made = make(url)
    yield made
    made.dispose()


@pytest.fixture
def hosted(engine: Engine) -> Iterator[Outbox]:
    with Outbox(engine, policy=Policy(max_rows=4, when_full="trim")) as opened:
        yield opened


@on_each_engine
def test_a_listener_sees_every_statement(hosted: Outbox, engine: Engine) -> None:
    seen: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
    do_everything(hosted)
    assert missing(seen) == []


@pytest.mark.parametrize(("database", "make"), ENGINES[:1], indirect=["database"])
def test_a_listener_sees_as_many_statements_as_sqlite_runs(hosted: Outbox, engine: Engine) -> None:
    """But for BEGIN and COMMIT: where Python's driver sends them, nobody sees them."""
    listened: list[str] = []
    traced: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def _listen(_connection, _cursor, statement, parameters, _context, many):
        listened.extend([statement] * (len(parameters) if many else 1))

    engine.dispose()
    event.listen(engine, "connect", lambda connection, _: connection.set_trace_callback(traced.append))
    do_everything(hosted)

    def verbs(statements: list[str]) -> list[str]:
        first = [statement.split(maxsplit=1)[0] for statement in statements]
        return [verb for verb in first if verb not in ("BEGIN", "COMMIT", "PRAGMA", "--")]

    assert verbs(listened) == verbs(traced)


@on_each_engine
def test_a_listener_may_change_a_statement(hosted: Outbox, engine: Engine) -> None:
    seen: list[str] = []

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def _comment(_connection, _cursor, statement, parameters, _context, _many):
        return f"{statement} /* by: host */", parameters

    event.listen(engine, "before_cursor_execute", lambda *arguments: seen.append(arguments[2]))
    do_everything(hosted)
    assert seen
    assert all(statement.endswith("/* by: host */") for statement in seen)


@on_each_engine
def test_echo_prints_every_statement(hosted: Outbox, engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sqlalchemy.engine.Engine"):
        engine.echo = True
        do_everything(hosted)
    engine.echo = False
    assert missing([record.getMessage() for record in caplog.records]) == []


@on_each_engine
def test_opentelemetry_makes_a_span_of_every_statement(hosted: Outbox, engine: Engine) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    instrumentor = SQLAlchemyInstrumentor()
    # Its newest release does not name SQLAlchemy 2.1 yet.
    instrumentor.instrument(engine=engine, tracer_provider=provider, skip_dep_check=True)
    try:
        do_everything(hosted)
    finally:
        instrumentor.uninstrument()
    attributes = [dict(span.attributes or {}) for span in exporter.get_finished_spans()]
    assert missing([str(found.get("db.statement")) for found in attributes]) == []

"""PgBouncer in transaction mode: each transaction of a client may run on another connection of the server."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import pytest
from sqlalchemy import URL, Engine, create_engine, make_url
from sqlalchemy.orm import Session

from builders import REVOKED, ScriptedClient, rule_fired, statuses
from outbox import ConfigurationError, Outbox
from outbox.storage.engines import open_engine
from outbox.wakeup import Wakeup
from servers import Servers

pytestmark = [pytest.mark.servers("postgresql"), pytest.mark.traced]

CONNECTIONS = 3


@pytest.fixture
def pooled(outbox: Outbox, servers: Servers) -> Iterator[URL]:
    """The URL of the test's outbox through a pooler, which has fewer connections than the test has clients."""
    with servers.pgbouncer(connections=CONNECTIONS) as through:
        yield through.set(database=outbox.engine.url.database)


def work(outbox: Outbox) -> None:
    """Run each statement so often that psycopg would prepare it."""
    for _ in range(8):
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient())


def prepared(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        found = connection.exec_driver_sql("SELECT statement FROM pg_prepared_statements")
        return list(found.scalars())


@contextmanager
def on_a_hosts_engine(url: URL) -> Iterator[Outbox]:
    """Open an outbox on connections that prepare, as psycopg's do where nobody says otherwise."""
    engine = create_engine(url)
    with Outbox(engine) as opened:
        yield opened
    engine.dispose()


@pytest.mark.parametrize("opened", [Outbox, on_a_hosts_engine])
def test_enqueuers_and_flushers_behind_a_pooler_never_run_a_wrong_statement(
    outbox: Outbox, pooled: URL, opened: Callable[[URL], AbstractContextManager[Outbox]]
) -> None:
    names: dict[int, str] = {}
    uploaded: list[tuple[int, str]] = []
    failures: list[BaseException] = []
    is_all_enqueued = threading.Event()

    def enqueue(name: str) -> None:
        try:
            with opened(pooled) as own, Session(own.engine) as session:
                for number in range(60):
                    event = rule_fired(session_id=f"{name}-{number}")
                    ids = [own.enqueue(event), *own.enqueue_many([event] * 3), own.enqueue(event, session=session)]
                    session.commit()
                    names.update(dict.fromkeys(ids, event.session_id))
        except BaseException as error:
            failures.append(error)

    def accept(batch):
        uploaded.extend((item.id, item.event.session_id) for item in batch)

    def flush() -> None:
        try:
            with opened(pooled) as own:
                is_last = False
                while not is_last:
                    is_last = is_all_enqueued.is_set()
                    own.flush(ScriptedClient(*[REVOKED] * 1_000))  # each request of an isolation
                    own.retry_now()
                    own.flush_all(ScriptedClient(*[accept] * 1_000))
        except BaseException as error:
            failures.append(error)

    enqueuers = [threading.Thread(target=enqueue, args=(f"e{number}",)) for number in range(3)]
    flushers = [threading.Thread(target=flush) for _ in range(3)]
    for thread in enqueuers + flushers:
        thread.start()
    for thread in enqueuers:
        thread.join()
    is_all_enqueued.set()
    for thread in flushers:
        thread.join()
    assert failures == []
    while set(statuses(outbox)) != {"sent"}:  # the last flush of one may have parked rows, or begun a pause
        outbox.retry_now()
        outbox.flush_all(ScriptedClient(*[accept] * 1_000))
    assert sorted(uploaded) == sorted(names.items())
    assert Counter(statuses(outbox)) == {"sent": 3 * 60 * 5}


def test_a_database_is_upgraded_through_a_pooler(servers: Servers) -> None:
    server = servers.get("postgresql")
    with (
        server.database() as empty,
        servers.pgbouncer(connections=CONNECTIONS) as through,
        Outbox.open(through.set(database=empty.database)) as opened,
    ):
        work(opened)
        assert statuses(opened) == ["sent"] * 8


def test_on_a_direct_connection_statements_that_stand_alone_are_prepared(outbox: Outbox) -> None:
    work(outbox)
    outbox.stats()
    found = [" ".join(statement.split()) for statement in prepared(outbox.engine)]
    assert {"INSERT INTO observation_events", "WITH delivered AS", "WITH fresh AS"} <= {
        " ".join(statement.split()[:3]) for statement in found
    }
    assert [statement for statement in found if "GROUP BY" in statement] == []


@pytest.mark.parametrize("mode", ["transaction", "session"])
def test_behind_a_pooler_nothing_is_prepared_and_no_setting_is_changed(
    outbox: Outbox, servers: Servers, mode: str
) -> None:
    settings = "SELECT name FROM pg_settings WHERE setting <> reset_val AND name ~ 'enable_|jit|plan_'"
    with (
        servers.pgbouncer(connections=CONNECTIONS, mode=mode) as through,
        Outbox(through.set(database=outbox.engine.url.database)) as pooled,
    ):
        work(pooled)
        assert prepared(pooled.engine) == []
        with pooled.engine.connect() as connection:
            assert connection.exec_driver_sql(settings).all() == []
    assert statuses(outbox) == ["sent"] * 8


def test_on_a_hosts_engine_nothing_of_ours_is_prepared(outbox: Outbox, url: str) -> None:
    engine = create_engine(url, pool_size=1, max_overflow=0)
    with Outbox(engine) as hosted:
        for _ in range(8):
            work(hosted)
            hosted.stats()
            with Session(engine) as session:
                hosted.enqueue(rule_fired(), session=session)
                session.commit()
            with engine.connect() as connection:
                connection.exec_driver_sql("SELECT 42")
                hosted.enqueue(rule_fired(), connection=connection)
                hosted.enqueue(rule_fired(), connection=connection.connection)
                connection.commit()
    statements = prepared(engine)
    assert "SELECT 42" in statements
    assert [statement for statement in statements if "observation" in statement or "SET" in statement] == []
    engine.dispose()


@pytest.mark.parametrize(("threshold", "is_any"), [("none", False), ("None", False), ("0", True), ("2", True)])
def test_the_threshold_in_the_url_is_psycopgs(outbox: Outbox, threshold: str, is_any: bool) -> None:
    with Outbox(outbox.engine.url.update_query_dict({"prepare_threshold": threshold})) as preparing:
        work(preparing)
        assert any("observation_events" in statement for statement in prepared(preparing.engine)) == is_any


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("prepare_threshold=often", "prepare_threshold is 'often', expected none or a whole number from 0"),
        ("prepare_threshold=-1", "prepare_threshold is '-1', expected none or a whole number from 0"),
        ("prepare_threshold=1.5", "prepare_threshold is '1.5', expected none or a whole number from 0"),
        ("prepare_threshold=1&prepare_threshold=2", "prepare_threshold is \"('1', '2')\", expected none or"),
        *((f"{name}=x", f"sets {name},") for name in ("autocommit", "context", "cursor_factory", "row_factory")),
    ],
)
def test_options_of_psycopg_that_can_not_be_used_are_refused_by_name(url: str, options: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        open_engine(f"{url}?{options}")
    assert words in str(refused.value)


def test_options_of_other_drivers_are_theirs(url: str) -> None:
    pytest.importorskip("pg8000")
    engine = open_engine(make_url(url).set(drivername="postgresql+pg8000"))
    assert engine.url.drivername == "postgresql+pg8000"
    engine.dispose()


def test_behind_a_pooler_nothing_is_prepared_whatever_the_url_says(outbox: Outbox, pooled: URL, caplog) -> None:
    with caplog.at_level(logging.WARNING, "outbox"), Outbox(f"{shown(pooled)}?prepare_threshold=0") as preparing:
        work(preparing)
        assert prepared(preparing.engine) == []
    assert "prepare_threshold is ignored, because a pooler stands in between" in caplog.text


def test_behind_a_pooler_nobody_listens(outbox: Outbox, pooled: URL) -> None:
    engine = open_engine(pooled)
    bell = Wakeup(engine)
    for _ in range(2):
        assert bell.sleep(0) is False
    bell.close()
    with ExitStack() as stack:
        everyone = [stack.enter_context(engine.connect()) for _ in range(CONNECTIONS)]
        for connection in everyone:
            assert connection.exec_driver_sql("SELECT pg_listening_channels()").all() == []
    engine.dispose()


def shown(url: URL) -> str:
    return make_url(url).render_as_string(hide_password=False)

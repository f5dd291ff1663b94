"""Which driver a URL of MySQL or MariaDB gets, and how many statements `enqueue_many` takes."""

from __future__ import annotations

import os
from typing import Any

import pytest
from sqlalchemy import event, make_url
from sqlalchemy.orm import Session

from builders import refuse, rule_fired
from outbox import Outbox, StorageError
from outbox.storage.dialects import mysql

WITH = {
    "mysql://db/shop": "mysql+mysqldb://db/shop",
    "mariadb://db/shop": "mariadb+mysqldb://db/shop",
    # These would lead mysqlclient to a socket, which may be that of another server.
    "mysql://localhost:3307/shop": "mysql+mysqldb://127.0.0.1:3307/shop",
    "mysql:///shop": "mysql+mysqldb://127.0.0.1/shop",
    "mysql://localhost/shop?unix_socket=/run/db": "mysql+mysqldb://localhost/shop?unix_socket=%2Frun%2Fdb",
    "mysql+pymysql://localhost/shop": "mysql+pymysql://localhost/shop",
    "mysql+mysqldb://localhost/shop": "mysql+mysqldb://localhost/shop",
}
WITHOUT = {
    "mysql://localhost:3307/shop": "mysql+pymysql://localhost:3307/shop",
    "mariadb://db/shop": "mariadb+pymysql://db/shop",
    "mysql+mysqldb://localhost/shop": "mysql+mysqldb://localhost/shop",
}


@pytest.mark.parametrize(("spec", "expected"), [(object(), WITH), (None, WITHOUT)])
def test_a_url_without_a_driver_gets_mysqlclient_if_that_is_installed(
    spec: object, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mysql, "find_spec", {"MySQLdb": spec}.__getitem__)
    assert {url: str(mysql.DIALECT.with_driver(make_url(url))) for url in expected} == expected


def test_both_drivers_give_up_connecting_after_the_same_time() -> None:
    options = {
        url: mysql.DIALECT.driver_options(make_url(url))[1]
        for url in ("mysql+mysqldb://db", "mysql+mysqldb://db?connect_timeout=3", "mysql+pymysql://db")
    }
    assert list(options.values()) == [{"connect_timeout": 10}, {}, {}]


@pytest.mark.servers("mariadb")
def test_several_events_are_inserted_by_one_statement_unless_they_are_large(outbox: Outbox) -> None:
    """64 of the largest payloads (256 KiB each) would make a statement of 16 MiB, which the server refuses."""
    inserts: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("INSERT"):
            inserts.append(statement)

    event.listen(outbox.engine, "before_cursor_execute", note)
    small = outbox.enqueue_many([rule_fired(session_id=str(number)) for number in range(64)])
    assert len(inserts) == 1
    large = outbox.enqueue_many([rule_fired(session_id=str(number) + "x" * 130_000) for number in range(64)])
    assert len(inserts) == 1 + 64
    assert small + large == sorted({*small, *large})
    assert [found.session_id[:1] for found in outbox.find(limit=128)] == [
        str(number)[0] for number in range(64)
    ] * 2


@pytest.mark.servers("mariadb")
def test_who_may_not_read_the_table_inserts_events_one_by_one(outbox: Outbox, url: str) -> None:
    name = f"only_inserts_{os.getpid()}"
    schema = make_url(url).database
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql(f"CREATE USER {name}@'%%' IDENTIFIED BY 'secret'")
        connection.exec_driver_sql(f"GRANT INSERT ON {schema}.observation_events TO {name}@'%%'")
        connection.exec_driver_sql(f"GRANT SELECT ON {schema}.outbox_alembic_version TO {name}@'%%'")
    try:
        theirs = make_url(url).set(username=name, password="secret")
        with Outbox(theirs) as other, Session(other.engine) as session:
            ids = other.enqueue_many([rule_fired()] * 80, session=session)
            session.commit()
    finally:
        with outbox.engine.begin() as connection:
            connection.exec_driver_sql(f"DROP USER {name}@'%%'")
    assert [found.id for found in outbox.find(limit=100)] == ids


@pytest.mark.servers("mariadb")
def test_another_refusal_of_several_events_is_raised(outbox: Outbox) -> None:
    refuse(outbox, "INSERT", "observation_events", "no inserts today")
    with pytest.raises(StorageError, match="no inserts today"):
        outbox.enqueue_many([rule_fired()] * 4)

"""An event id is recorded once, whoever enqueues it how often."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from itertools import repeat
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session

from builders import add_row, refuse, row, rule_fired, statuses
from children import beside_threads, can_fork
from conditions import FOREVER_S
from crowd import Crowd
from outbox import Outbox, Policy, QueueFull, StorageError

pytestmark = pytest.mark.contract


def host_engine(url: str) -> Engine:
    if url.startswith(("sqlite", "fourth")):
        # Whoever waits for a file's lock has no place in a queue, so one of eight programs may wait for all the others.
        return create_engine(url, connect_args={"timeout": 4 * FOREVER_S})
    return create_engine(url, isolation_level="READ COMMITTED")


@pytest.fixture
def host(url: str) -> Iterator[Engine]:
    """The application's own engine on the same database."""
    engine = host_engine(url)
    yield engine
    engine.dispose()


def test_a_second_enqueue_of_an_id_writes_nothing(outbox: Outbox) -> None:
    first = outbox.enqueue(rule_fired(session_id="first"), event_id="a")
    other = outbox.enqueue(rule_fired(), event_id="A")

    assert outbox.enqueue(rule_fired(session_id="second"), event_id="a") == first
    assert other != first
    assert [found.session_id for found in outbox.find()] == ["first", "s1"]


@pytest.mark.parametrize("status", ["sending", "sent", "parked", "abandoned"])
def test_whatever_became_of_the_first(outbox: Outbox, status: str) -> None:
    row_id = add_row(outbox, status=status, event_id="a")

    assert outbox.enqueue(rule_fired(), event_id="a") == row_id
    assert statuses(outbox) == [status]


def test_once_the_first_row_is_gone_its_id_is_free(outbox: Outbox) -> None:
    first = outbox.enqueue(rule_fired(), event_id="a")
    outbox.purge(event_type="rule_fired")

    assert outbox.enqueue(rule_fired(), event_id="a") > first
    assert statuses(outbox) == ["pending"]


def test_of_equal_ids_in_one_call_the_first_event_is_recorded(outbox: Outbox) -> None:
    events = [rule_fired(session_id=str(number)) for number in range(7)]

    ids = outbox.enqueue_many(events, event_ids=["b", "a", None, "b", "a", None, "c"])

    assert (ids[3], ids[4]) == (ids[0], ids[1])
    assert ids[0] < ids[1] < ids[2] < ids[5] < ids[6]  # in which they are sent
    assert [found.session_id for found in outbox.find()] == ["0", "1", "2", "5", "6"]


def test_many_ids_are_recorded_or_found_in_one_call(outbox: Outbox) -> None:
    names = [f"id-{number}" for number in range(150)]
    ids = outbox.enqueue_many([rule_fired()] * 75, event_ids=names[::2])

    both = outbox.enqueue_many([rule_fired()] * 150, event_ids=names)

    assert both[::2] == ids
    assert [row(outbox, row_id).event_id for row_id in both] == names
    assert outbox.pending_count() == 150


def test_rows_are_counted_once(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_undelivered=99)) as outbox:
        outbox.enqueue_many([rule_fired()] * 3, event_ids=list("aab"))
        for _ in range(3):
            outbox.enqueue(rule_fired(), event_id="a")

        assert outbox.store.bounds._counts[""].undelivered.rows == 2


@pytest.mark.parametrize("policy", [Policy(max_undelivered=2), Policy(max_rows=2)], ids=["bound", "cap"])
def test_a_full_queue_still_tells_the_ids_that_are_there(url: str, host: Engine, policy: Policy) -> None:
    with Outbox.open(url, policy=policy.on(is_shared=False)) as outbox:
        outbox.policy = Policy(
            max_undelivered=policy.max_undelivered, max_rows=policy.max_rows, when_full="reject"
        )
        ids = outbox.enqueue_many([rule_fired()] * 2, event_ids=["a", "b"])

        assert outbox.enqueue_many([rule_fired()] * 3, event_ids=["b", "a", "b"]) == ids[::-1] + ids[1:]
        with Session(host) as session:
            assert outbox.enqueue(rule_fired(), event_id="a", session=session) == ids[0]
        for more in (["a", "c"], ["a", None]):
            with pytest.raises(QueueFull, match="there is no room for 1 more"):
                outbox.enqueue_many([rule_fired()] * 2, event_ids=more)
        with pytest.raises(QueueFull):
            outbox.enqueue(rule_fired())
        assert statuses(outbox) == ["pending"] * 2


def test_a_trim_spares_the_rows_of_its_own_transaction(url: str) -> None:
    with Outbox.open(url, policy=Policy.original(max_rows=2)) as outbox:
        first, second = outbox.enqueue_many([rule_fired()] * 2, event_ids=["a", "b"])
        _, third = outbox.enqueue_many([rule_fired()] * 2, event_ids=["b", "c"])

        assert {found.id for found in outbox.find()} <= {first, second, third}
        assert third in {found.id for found in outbox.find()}
        assert len(statuses(outbox)) == 2


@pytest.mark.sqlite
def test_rows_that_a_trigger_leaves_out_are_an_error(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE TRIGGER leave_out BEFORE INSERT ON observation_events BEGIN SELECT RAISE(IGNORE); END"
        )
    with pytest.raises(StorageError, match="^a trigger of the database left out some of 1 events$"):
        outbox.enqueue(rule_fired(), event_id="a")


@pytest.mark.sqlite
def test_the_row_of_a_caller_that_a_trigger_leaves_out_is_an_error(outbox: Outbox) -> None:
    outbox.enqueue(rule_fired())
    with Session(outbox.engine) as session:
        session.execute(
            text("CREATE TRIGGER leave_out BEFORE INSERT ON observation_events BEGIN SELECT RAISE(IGNORE); END")
        )
        with pytest.raises(StorageError, match="^a trigger of the database left out some of 1 events$"):
            outbox.enqueue(rule_fired(), session=session)


@pytest.mark.servers("postgresql")
def test_rows_that_a_trigger_of_a_server_leaves_out_are_an_error(outbox: Outbox) -> None:
    with outbox.engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION leave_out() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"
        )
        connection.exec_driver_sql(
            "CREATE TRIGGER leave_out BEFORE INSERT ON observation_events FOR EACH ROW EXECUTE FUNCTION leave_out()"
        )
    for number in (1, 64):
        with pytest.raises(StorageError, match=f"^a trigger of the database left out some of {number} events$"):
            outbox.enqueue_many([rule_fired()] * number)


@pytest.mark.traced
def test_another_error_than_a_duplicate_is_raised(outbox: Outbox) -> None:
    refuse(outbox, "INSERT", "observation_events", "no inserts today")
    with pytest.raises(StorageError, match="no inserts today"):
        outbox.enqueue(rule_fired(), event_id="a")


# In the caller's transaction


@pytest.mark.parametrize("kind", ["session", "connection"])
@pytest.mark.traced
def test_a_duplicate_does_not_harm_the_callers_transaction(outbox: Outbox, host: Engine, kind: str) -> None:
    known = outbox.enqueue(rule_fired(), event_id="a")
    with Session(host) as session:
        given: Any = session if kind == "session" else session.connection()
        before = outbox.enqueue(rule_fired(), event_id="b", **{kind: given})
        assert outbox.enqueue(rule_fired(), event_id="a", **{kind: given}) == known
        assert outbox.enqueue(rule_fired(), event_id="b", **{kind: given}) == before
        after = outbox.enqueue(rule_fired(), **{kind: given})
        session.commit()

    assert [found.id for found in outbox.find()] == [known, before, after]


def test_an_id_that_is_rolled_back_is_free(outbox: Outbox, host: Engine) -> None:
    with Session(host) as session:
        outbox.enqueue(rule_fired(session_id="undone"), event_id="a", session=session)
        session.rollback()
        row_id = outbox.enqueue(rule_fired(), event_id="a", session=session)
        session.commit()

    assert [(found.id, found.session_id) for found in outbox.find()] == [(row_id, "s1")]


@pytest.mark.parametrize("commits", [True, False])
@pytest.mark.parametrize("kind", ["own", "session"])
def test_an_enqueue_waits_for_the_transaction_that_has_the_id(
    outbox: Outbox, host: Engine, kind: str, commits: bool
) -> None:
    def second() -> object:
        if kind == "own":
            return outbox.enqueue(rule_fired(session_id="second"), event_id="a")
        with Session(host) as session:
            row_id = outbox.enqueue(rule_fired(session_id="second"), event_id="a", session=session)
            session.commit()
            return row_id

    crowd = Crowd()
    with Session(host) as session:
        first = outbox.enqueue(rule_fired(session_id="first"), event_id="a", session=session)
        crowd.start("second", second)
        if commits:
            session.commit()
        else:
            session.rollback()
    found = crowd.join()["second"]

    assert [(one.id, one.session_id) for one in outbox.find()] == [(found, "first" if commits else "second")]
    assert found == first or not commits


# Many processes

NAMES = [f"id-{number}" for number in range(12)]


def enqueue_all(url: str, barrier: Any, number: int) -> dict[str, int]:
    """Enqueue each id in a way of its own; return the row ids by event id."""
    # Each process begins at another id. One statement for all has them in their order.
    names = NAMES if number % 4 == 3 else NAMES[number:] + NAMES[:number]
    engine = host_engine(url)
    with Outbox(url) as outbox:
        barrier.wait()
        if number % 4 == 3:
            found = outbox.enqueue_many([rule_fired()] * len(names), event_ids=names)
        elif number % 4 == 2:
            found = [outbox.enqueue(rule_fired(), event_id=name) for name in names]
        else:
            found = [enqueue_in(outbox, engine, name, undoes=number % 4 == 1) for name in names]
    engine.dispose()
    return dict(zip(names, found, strict=True))


def enqueue_in(outbox: Outbox, engine: Engine, name: str, *, undoes: bool) -> int | None:
    """Enqueue in a transaction of the application, which it repeats if the database aborts it.

    If two transactions wait for one with the same id, and this rolls back, then MariaDB aborts one of the two.
    """
    while True:
        try:
            return enqueue_once_in(outbox, engine, name, undoes=undoes)
        except StorageError as error:
            if "Deadlock found" not in str(error):
                raise


def enqueue_once_in(outbox: Outbox, engine: Engine, name: str, *, undoes: bool) -> int | None:
    with Session(engine) as session:
        if undoes:
            outbox.enqueue(rule_fired(session_id="undone"), event_id=name, session=session)
            session.rollback()
        row_id = outbox.enqueue(rule_fired(), event_id=name, session=session)
        session.commit()
        return row_id


@can_fork
@beside_threads
@pytest.mark.programs
def test_eight_processes_that_enqueue_the_same_ids_get_the_same_rows(outbox: Outbox, url: str) -> None:
    fork = multiprocessing.get_context("fork")
    with fork.Manager() as manager, fork.Pool(8) as pool:
        found = pool.starmap(enqueue_all, zip(repeat(url), repeat(manager.Barrier(8)), range(8)), chunksize=1)
        pool.close()
        pool.join()

    rows = {one.event_id: one.id for one in outbox.find()}
    assert found == [rows] * 8
    assert set(rows) == set(NAMES)
    assert {one.session_id for one in outbox.find()} == {"s1"}

import logging
import re
from contextlib import closing

import msgspec
import pytest
from sqlalchemy import String, create_engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

from builders import NOON, NOON_MS, ScriptedClient, add_row, on_statement, refuse, row, rule_fired, statuses
from outbox import ConfigurationError, Event, InvalidEvent, Outbox, Policy, RuleFired, StorageError

pytestmark = pytest.mark.contract


class HostBase(DeclarativeBase):
    pass


class Order(HostBase):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


@pytest.fixture
def host(outbox: Outbox):
    """The application's own engine on the same database, with its settings as they come."""
    engine = create_engine(outbox.engine.url)
    HostBase.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_a_row_is_pending_and_due_at_once(outbox: Outbox, noon) -> None:
    row_id = outbox.enqueue(rule_fired(file_path="a.py"))
    written = row(outbox, row_id)
    assert row_id > 0
    assert (written.status, written.retry_count, written.last_error) == ("pending", 0, None)
    assert written.created_at_ms == written.next_attempt_at_ms == written.occurred_at_ms == NOON_MS
    assert (written.event_type, written.rule_ids_json, written.file_path) == ("rule_fired", '["r1"]', "a.py")
    assert (written.sent_at_ms, written.revived_at_ms) == (None, None)


def test_what_was_enqueued_is_there_for_others(outbox: Outbox, host) -> None:
    row_id = outbox.enqueue(rule_fired())
    with host.connect() as other:
        assert list(other.execute(text("SELECT id FROM observation_events"))) == [(row_id,)]


def test_many_events_get_their_ids_in_order(outbox: Outbox) -> None:
    ids = outbox.enqueue_many(rule_fired(session_id=f"s{number}") for number in range(2_500))
    assert ids == sorted(set(ids))
    assert [row(outbox, row_id).session_id for row_id in (ids[0], ids[1_234], ids[-1])] == ["s0", "s1234", "s2499"]


def test_many_events_are_written_all_or_none(outbox: Outbox) -> None:
    with pytest.raises(InvalidEvent, match="rule_ids"):
        outbox.enqueue_many([rule_fired(), rule_fired(rule_ids=7), rule_fired()])
    assert statuses(outbox) == []


def test_no_events_are_no_rows(outbox: Outbox) -> None:
    assert outbox.enqueue_many([]) == []


def test_ids_are_never_used_again(outbox: Outbox) -> None:
    first = outbox.enqueue(rule_fired())
    with outbox.engine.begin() as connection:
        connection.execute(text("DELETE FROM observation_events"))
    assert outbox.enqueue(rule_fired()) > first


def test_what_an_sql_injection_would_use_is_data(outbox: Outbox) -> None:
    nasty = "'); DROP TABLE observation_events; --\"\\ %s :x ? \x00"
    row_id = outbox.enqueue(rule_fired(session_id=nasty, file_path=nasty, rule_ids=[nasty]))
    kept = nasty.replace("\0", "\ufffd") if outbox.engine.dialect.name == "postgresql" else nasty
    assert row(outbox, row_id).session_id == row(outbox, row_id).file_path == kept
    client = ScriptedClient()
    outbox.flush(client)
    assert client.batches[0][0].event.session_id == nasty


@pytest.mark.parametrize("value", ["FALSE", "False", "0", "no", "off", "", " false", "false ", "true"])
def test_every_value_but_false_captures(outbox: Outbox, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("OUTBOX_CAPTURE", value)
    assert outbox.enqueue(rule_fired()) == 1


def test_capture_is_off_in_an_environment_of_the_programs_own_too(
    outbox: Outbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.environ", {"OUTBOX_CAPTURE": "false"})
    assert outbox.enqueue(rule_fired()) is None


def test_capture_false_writes_nothing(outbox: Outbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    assert outbox.enqueue(rule_fired()) is None
    assert outbox.enqueue_many([rule_fired(), rule_fired()]) == []
    with Session(outbox.engine) as session:
        assert outbox.enqueue(rule_fired(), session=session) is None
    assert statuses(outbox) == []


# Events without a class


@pytest.mark.parametrize("opener", [Outbox, Outbox.open])
@pytest.mark.parametrize("settings", [{"strict": True}, {"policy": Policy.original()}])
def test_a_strict_outbox_and_the_original_refuse_an_unknown_type(
    outbox: Outbox, url: str, opener, settings
) -> None:
    with opener(url, **settings) as strict:
        with pytest.raises(InvalidEvent, match="event_type is 'order_lost', expected one of .*rule_fired"):
            strict.enqueue({"order_id": "o-17"}, event_type="order_lost")
        strict.enqueue(rule_fired())
    assert statuses(outbox) == ["pending"]


@pytest.mark.contract
def test_an_event_without_a_class_is_delivered_as_it_is(outbox: Outbox) -> None:
    wire = '{"event_type":"order_lost","order_id":"o-17"}'
    row_id = outbox.enqueue({"event_type": "order_lost", "order_id": "o-17"})
    client = ScriptedClient()
    assert outbox.flush(client).sent == 1
    (item,) = client.batches[0]
    assert (item.payload_json, item.event) == (wire, {"event_type": "order_lost", "order_id": "o-17"})
    assert row(outbox, row_id).event_type == "order_lost"
    assert outbox.stats().by_type == {"order_lost": {"sent": 1}}


# Redact


def hide_file(event: Event) -> Event:
    return msgspec.structs.replace(event, file_path="hidden", session_id="")


@pytest.mark.parametrize("opener", [Outbox, Outbox.open])
def test_what_redact_returns_is_written_in_place_of_the_event(outbox: Outbox, url: str, opener) -> None:
    seen = []
    with opener(url, redact=lambda event: seen.append(event) or hide_file(event)) as redacting:
        secret = {"file_path": "/home/ann/secret.py", "session_id": "ann"}
        given = rule_fired(**secret)
        ids = [
            redacting.enqueue(given),
            *redacting.enqueue_many(
                [given, {"event_type": "rule_fired", "rule_ids": [], "fired_at": NOON, **secret}]
            ),
        ]
        with Session(redacting.engine) as session:
            ids.append(redacting.enqueue(given, session=session))
            session.commit()
        raw = redacting.engine.raw_connection()
        ids.append(redacting.enqueue(given, connection=raw.dbapi_connection))
        raw.commit()
        raw.close()
    assert len(ids) == len({*ids}) == len(seen) == 5
    assert {(type(event), event.file_path) for event in seen} == {(RuleFired, "/home/ann/secret.py")}
    for row_id in ids:
        written = row(outbox, row_id)
        assert (written.file_path, written.session_id) == ("hidden", "")
        assert "ann" not in written.payload_json
        assert msgspec.json.decode(written.payload_json)["file_path"] == "hidden"


def test_redact_may_return_a_mapping_and_another_type(outbox: Outbox, url: str) -> None:
    fields = {"rule_id": "r9", "session_id": "s9", "accepted": True, "occurred_at": NOON}
    with Outbox(url, redact=lambda _: {"event_type": "fix_outcome", "note": "kept", **fields}) as redacting:
        written = row(outbox, redacting.enqueue(rule_fired()))
    assert (written.event_type, written.rule_id, written.session_id) == ("fix_outcome", "r9", "s9")
    assert msgspec.json.decode(written.payload_json)["note"] == "kept"


def test_what_redact_did_not_see_is_not_written(outbox: Outbox, url: str) -> None:
    event = {"event_type": "rule_fired", "rule_ids": [], "session_id": "s1", "fired_at": NOON, "user": "ann"}
    with Outbox(url, redact=lambda event: event) as redacting:
        written = row(outbox, redacting.enqueue(event))
    assert "ann" not in written.payload_json
    assert "ann" in row(outbox, outbox.enqueue(event)).payload_json


def test_what_redact_changes_in_place_is_written_and_the_callers_event_stays(outbox: Outbox, url: str) -> None:
    given = rule_fired(rule_ids=["secret"])
    with Outbox(url, redact=lambda event: event.rule_ids.clear() or event) as redacting:
        written = row(outbox, redacting.enqueue(given))
    assert (written.rule_ids_json, given.rule_ids) == ("[]", ["secret"])
    assert "secret" not in written.payload_json


def fail(event: Event) -> Event:
    raise LookupError(f"no rule for {event.file_path}")


@pytest.mark.parametrize(
    ("redact", "words"),
    [
        (fail, "rule_fired: redact failed with LookupError"),
        (
            lambda _: None,
            "rule_fired: what redact returned is invalid: expected an Event, a mapping with event_type, a Pydantic model,",
        ),
        (
            lambda event: msgspec.structs.replace(event, session_id=None),
            "rule_fired: what redact returned is invalid: rule_fired: session_id: expected `str`, got `null`",
        ),
        (
            lambda event: {"event_type": 5},
            "rule_fired: what redact returned is invalid: event_type is 5, expected a printable text",
        ),
    ],
)
@pytest.mark.parametrize("where", ["alone", "session", "connection"])
def test_a_redact_that_fails_writes_nothing(outbox: Outbox, url: str, where: str, redact, words: str) -> None:
    with (
        Outbox(url, redact=lambda event: redact(event) if event.file_path else event) as redacting,
        Session(redacting.engine) as session,
    ):
        raw = redacting.engine.raw_connection()
        mine = {"alone": {}, "session": {"session": session}, "connection": {"connection": raw.dbapi_connection}}
        events = [rule_fired(), rule_fired(file_path="secret.py")]
        with pytest.raises(InvalidEvent, match=f"^{re.escape(words)}") as failure:
            redacting.enqueue_many(events, **mine[where])
        session.commit()
        raw.commit()
        raw.close()
    assert "secret" not in str(failure.value)
    assert isinstance(failure.value.__cause__, LookupError if redact is fail else type(None))
    assert statuses(outbox) == []


def test_an_interrupt_in_redact_reaches_the_caller(outbox: Outbox, url: str) -> None:
    def interrupt(_: Event) -> Event:
        raise KeyboardInterrupt

    with Outbox(url, redact=interrupt) as redacting, pytest.raises(KeyboardInterrupt):
        redacting.enqueue(rule_fired())
    assert statuses(outbox) == []


def test_while_capture_is_off_redact_sees_nothing(outbox: Outbox, url: str, monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    with Outbox(url, redact=fail) as redacting:
        assert redacting.enqueue(rule_fired(file_path="a.py")) is None


@pytest.mark.parametrize("opener", [Outbox, Outbox.open])
def test_a_redact_that_can_not_be_called_is_refused(outbox: Outbox, url: str, opener) -> None:
    with pytest.raises(ConfigurationError, match="redact is 'file_path', expected a function"):
        opener(url, redact="file_path")


# In the caller's transaction


def test_in_the_callers_session_the_row_comes_with_the_commit(outbox: Outbox, host) -> None:
    with Session(host) as session:
        session.add(Order(name="shoes"))
        row_id = outbox.enqueue(rule_fired(), session=session)
        assert statuses(outbox) == []
        session.commit()
    assert row(outbox, row_id).status == "pending"


def test_in_the_callers_session_the_row_goes_with_the_rollback(outbox: Outbox, host) -> None:
    with Session(host) as session:
        assert outbox.enqueue_many([rule_fired(), rule_fired()], session=session) == [1, 2]
        session.rollback()
    assert statuses(outbox) == []


def test_the_callers_session_is_not_flushed_expired_or_committed(outbox: Outbox, host) -> None:
    with Session(host) as session:
        shoes = Order(name="shoes")
        session.add(shoes)
        session.commit()
        loaded = shoes.name
        boots = Order(name="boots")
        session.add(boots)
        outbox.enqueue(rule_fired(), session=session)
        assert boots in session.new
        assert boots.id is None
        assert "name" in shoes.__dict__
        assert loaded == "shoes"
        assert session.in_transaction()
        assert list(session.connection().execute(text("SELECT name FROM orders"))) == [("shoes",)]


def test_a_scoped_session_and_a_nested_transaction_are_the_callers_too(outbox: Outbox, host) -> None:
    registry = scoped_session(sessionmaker(host))
    outbox.enqueue(rule_fired(), session=registry)
    nested = registry.begin_nested()
    outbox.enqueue(rule_fired(), session=registry)
    nested.rollback()
    registry.commit()
    registry.remove()
    assert statuses(outbox) == ["pending"]


def test_a_session_that_is_bound_by_models_can_be_joined(outbox: Outbox, host) -> None:
    with Session(binds={HostBase: host}) as session:
        outbox.enqueue(rule_fired(), session=session)
        assert statuses(outbox) == []
        session.commit()
    assert statuses(outbox) == ["pending"]


@pytest.fixture
def connection(host):
    """A connection of the driver, as a program without SQLAlchemy has one."""
    pooled = host.raw_connection()
    yield pooled.driver_connection
    pooled.close()


def test_on_the_callers_connection_the_row_comes_with_the_commit(outbox: Outbox, connection) -> None:
    row_id = outbox.enqueue(rule_fired(session_id="a\0b"), connection=connection)
    assert statuses(outbox) == []
    connection.commit()
    assert row(outbox, row_id).status == "pending"


def test_on_the_callers_connection_the_row_goes_with_the_rollback(outbox: Outbox, connection) -> None:
    assert outbox.enqueue_many([rule_fired(), rule_fired()], connection=connection) == [1, 2]
    connection.rollback()
    assert statuses(outbox) == []


def test_on_the_callers_connection_the_row_goes_with_its_savepoint(outbox: Outbox, connection) -> None:
    with closing(connection.cursor()) as cursor:
        outbox.enqueue(rule_fired(), connection=connection)
        cursor.execute("SAVEPOINT half")
        outbox.enqueue(rule_fired(), connection=connection)
        cursor.execute("ROLLBACK TO SAVEPOINT half")
    connection.commit()
    assert statuses(outbox) == ["pending"]


def test_what_the_database_refuses_to_the_caller_is_a_storage_error(outbox: Outbox, host, connection) -> None:
    refuse(outbox, "INSERT", "observation_events", "it is full")
    with pytest.raises(StorageError, match="it is full"):
        outbox.enqueue(rule_fired(), connection=connection)
    connection.rollback()
    with Session(host) as session, pytest.raises(StorageError, match="it is full"):
        outbox.enqueue(rule_fired(), session=session)


def test_an_invalid_event_leaves_the_callers_transaction_usable(outbox: Outbox, host) -> None:
    with Session(host) as session:
        session.add(Order(name="shoes"))
        with pytest.raises(InvalidEvent):
            outbox.enqueue(rule_fired(rule_ids=7), session=session)
        outbox.enqueue(rule_fired(), session=session)
        session.commit()
        assert session.query(Order).count() == 1
    assert statuses(outbox) == ["pending"]


def test_in_the_callers_session_the_queue_is_capped_by_the_next_one_of_our_own(url: str, host) -> None:
    with Outbox.open(url, policy=Policy(max_rows=2, when_full="trim")) as outbox:
        with Session(host) as session:
            outbox.enqueue_many([rule_fired()] * 5, session=session)
            session.commit()
        assert len(statuses(outbox)) == 5
        outbox.enqueue(rule_fired())
        assert [found.id for found in outbox.find()] == [5, 6]


def test_a_cap_that_fails_does_not_fail_the_enqueue(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with Outbox.open(url, policy=Policy(max_rows=1, when_full="trim")) as outbox:
        refuse(outbox, "DELETE", "observation_events", "no", on_sqlite="ROLLBACK")
        with caplog.at_level(logging.WARNING, "outbox"):
            ids = [outbox.enqueue(rule_fired()) for _ in range(3)]
        assert [found.id for found in outbox.find()] == ids
    assert "capping the queue failed, the events are kept" in caplog.text


@pytest.mark.sqlite
def test_a_row_whose_type_is_not_utf8_does_not_keep_others_out(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=1, when_full="trim")) as outbox:
        outbox.enqueue(rule_fired())
        with outbox.engine.begin() as connection:
            connection.execute(text("UPDATE observation_events SET event_type = CAST(x'ff' AS TEXT)"))
        assert [outbox.enqueue(rule_fired()), outbox.enqueue(rule_fired())] == [2, 3]
        assert outbox.stats().deleted[-1] == ("pending", "\ufffd", "cap", 1)


def test_an_insert_that_fails_is_an_error_and_writes_nothing(outbox: Outbox) -> None:
    refuse(outbox, "INSERT", "observation_events", "it is full")
    with pytest.raises(StorageError, match="it is full"):
        outbox.enqueue(rule_fired())
    assert statuses(outbox) == []


@pytest.mark.sqlite
def test_the_enqueue_and_its_cap_are_one_transaction(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=1, when_full="trim")) as outbox:
        outbox.enqueue(rule_fired())
        seen: list[str] = []
        on_statement(outbox, seen.append)
        outbox.enqueue(rule_fired())
        assert seen.count("BEGIN IMMEDIATE") == seen.count("COMMIT") == 1
        assert len(statuses(outbox)) == 1


@pytest.mark.sqlite
def test_at_the_cap_no_rows_are_counted_while_nobody_else_changes_any(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=5, when_full="trim")) as outbox:
        seen: list[str] = []
        on_statement(outbox, seen.append)
        outbox.enqueue_many([rule_fired()] * 5)
        outbox.enqueue(rule_fired())
        seen.clear()
        ids = [outbox.enqueue(rule_fired()) for _ in range(7)]
        assert [found.id for found in outbox.find()] == ids[-5:]
        assert not [statement for statement in seen if "count(" in statement]


def test_rows_that_others_enqueue_and_delete_count_at_the_cap(url: str) -> None:
    policy = Policy(max_rows=5, when_full="trim")
    with Outbox.open(url, policy=policy) as outbox, Outbox(url) as another:
        for _ in range(8):
            outbox.enqueue(rule_fired())
        for number, deleted in ((1, 0), (3, 0), (0, 2), (0, 2), (4, 1), (20, 0)):
            another.enqueue_many([rule_fired()] * number)
            with another.engine.begin() as connection:
                for found in [*another.find()][:deleted]:
                    connection.execute(text("DELETE FROM observation_events WHERE id = :id"), {"id": found.id})
            before = len(statuses(outbox))
            outbox.enqueue(rule_fired())
            assert len(statuses(outbox)) == min(before + 1, 5)


def test_rows_that_others_enqueue_below_the_cap_are_trimmed_before_the_enqueue_returns(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=5, when_full="trim")) as outbox, Outbox(url) as another:
        outbox.enqueue(rule_fired())
        another.enqueue_many([rule_fired()] * 9)
        outbox.enqueue(rule_fired())
        assert len(statuses(outbox)) == 5


def test_an_enqueue_far_over_the_cap_still_caps_all(url: str) -> None:
    with Outbox.open(url, policy=Policy(max_rows=10, when_full="trim")) as outbox:
        ids = outbox.enqueue_many([rule_fired()] * 3_500)
        assert [found.id for found in outbox.find()] == ids[-10:]


def test_a_host_engine_keeps_its_settings_and_stays_open(outbox: Outbox, host) -> None:
    with Outbox(host) as hosted:
        row_id = hosted.enqueue(rule_fired())
        assert hosted.flush(ScriptedClient()).sent == 1
        add_row(hosted, status="parked")
        assert hosted.retry_now() == 1
    with host.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM observation_events")).scalar() == 2
    assert row(outbox, row_id).status == "sent"

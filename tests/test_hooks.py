"""What the functions of a program are told of its flushes, and what they can't break."""

import logging

import pytest
from sqlalchemy import update

from builders import (
    DOWN,
    OK,
    REJECTED,
    REVOKED,
    SLOW_DOWN,
    ScriptedClient,
    add_row,
    rejecting,
    row,
    rule_fired,
    statuses,
)
from conditions import until
from outbox import (
    ConfigurationError,
    Hooks,
    ObservationEvent,
    Outbox,
    Policy,
    Settled,
    SettledEvent,
    Upload,
    Worker,
)
from outbox.policy import Verdict
from outbox.storage.engines import writing

NAMES = ("on_sent", "on_rescheduled", "on_parked", "on_abandoned", "on_released", "on_lost", "on_upload")


class Listener:
    """Hears everything, and looks into the database meanwhile."""

    def __init__(self, outbox: Outbox):
        self.heard = []
        self.seen = []
        self._outbox = outbox
        outbox.hooks.append(Hooks(**{name: self._hear(name) for name in NAMES}))

    def _hear(self, name):
        def hear(news) -> None:
            self.heard.append((name, news))
            self.seen.append(statuses(self._outbox))

        return hear

    def of(self, name):
        return [news for heard, news in self.heard if heard == name]


@pytest.fixture
def listener(outbox: Outbox) -> Listener:
    return Listener(outbox)


def steal(outbox: Outbox, *row_ids: int) -> None:
    """Let other flushers have the rows, as they may when a lease has run out."""
    table = ObservationEvent.__table__
    with writing(outbox.engine) as connection:
        connection.execute(
            update(table).where(table.c.id.in_(row_ids)).values(next_attempt_at_ms=table.c.next_attempt_at_ms + 1)
        )


@pytest.mark.contract
@pytest.mark.parametrize(
    ("failure", "name", "status"),
    [
        (OK, "on_sent", "sent"),
        (DOWN, "on_rescheduled", "pending"),
        (SLOW_DOWN, "on_rescheduled", "pending"),
        (REVOKED, "on_parked", "parked"),
    ],
)
def test_an_outcome_is_told_with_ids_types_and_reason_once_it_is_recorded(
    outbox: Outbox, listener: Listener, failure, name: str, status: str
) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 2)
    outbox.flush(ScriptedClient(failure))
    error = None if failure is OK else str(failure)
    events = tuple(SettledEvent(row_id, "rule_fired", error, row(outbox, row_id).event_id) for row_id in ids)
    told = Settled(events, recorded=2)
    assert listener.of(name) == [told]
    assert [heard for heard, _ in listener.heard] == ["on_upload", name]
    assert listener.seen == [[status] * 2] * 2


@pytest.mark.contract
def test_a_rejected_event_among_good_ones_is_told_as_abandoned_and_the_others_as_sent(
    outbox: Outbox, listener: Listener
) -> None:
    outbox.policy = Policy.original()
    first, bad, last = outbox.enqueue_many([rule_fired()] * 3, event_ids=["a", "b", None])
    outbox.flush(rejecting(bad))
    assert [event.id for told in listener.of("on_sent") for event in told.events] == [first, last]
    (abandoned,) = listener.of("on_abandoned")
    assert abandoned == Settled((SettledEvent(bad, "rule_fired", f"permanent: {REJECTED}", "b"),), recorded=1)
    # Not before the last one is settled: a slow hook can cost no lease.
    assert {tuple(seen) for seen in listener.seen} == {("sent", "abandoned", "sent")}


def test_what_can_not_be_decoded_is_told_without_an_upload(outbox: Outbox, listener: Listener) -> None:
    row_id = add_row(outbox, payload_json="{", event_type="odd")
    outbox.flush(ScriptedClient())
    ((name, told),) = listener.heard
    assert name == "on_abandoned"
    assert [(event.id, event.event_type) for event in told.events] == [(row_id, "odd")]
    assert told.events[0].error.startswith("permanent: decode observation event: ")


def test_each_request_is_told_with_its_size_its_time_and_what_came_of_it(
    outbox: Outbox, listener: Listener
) -> None:
    outbox.enqueue_many([rule_fired()] * 2)
    client = ScriptedClient(REJECTED, OK, REJECTED)
    outbox.flush(client)
    uploads = listener.of("on_upload")
    assert [(told.events, told.verdict, told.failure) for told in uploads] == [
        (2, Verdict.PERMANENT, str(REJECTED)),
        (1, None, None),
        (1, Verdict.PERMANENT, str(REJECTED)),
    ]
    assert all(isinstance(told, Upload) and told.duration_ms >= 0 for told in uploads)


@pytest.mark.contract
def test_an_outcome_of_which_nothing_was_recorded_is_not_told_but_the_loss_is(
    outbox: Outbox, listener: Listener
) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 2)

    def lose(_batch):
        steal(outbox, *ids)
        return DOWN

    assert outbox.flush(ScriptedClient(lose)).lost_leases == 2
    assert [name for name, _ in listener.heard] == ["on_upload", "on_lost"]
    assert listener.of("on_lost") == [2]


@pytest.mark.contract
def test_of_an_outcome_recorded_in_part_the_number_is_told(outbox: Outbox, listener: Listener) -> None:
    ids = outbox.enqueue_many([rule_fired()] * 3)

    def lose(_batch):
        steal(outbox, ids[1])
        return DOWN

    outbox.flush(ScriptedClient(lose))
    (told,) = listener.of("on_rescheduled")
    assert (len(told.events), told.recorded) == (3, 2)
    assert listener.of("on_lost") == [1]


@pytest.mark.contract
def test_what_two_flushers_delivered_is_told_once(outbox: Outbox, listener: Listener) -> None:
    row_id = outbox.enqueue(rule_fired())

    def deliver_again(_batch):
        table = ObservationEvent.__table__
        with writing(outbox.engine) as connection:
            connection.execute(update(table).values(next_attempt_at_ms=0))
        outbox.flush(ScriptedClient())

    assert outbox.flush(ScriptedClient(deliver_again)).sent == 1
    assert [event.id for told in listener.of("on_sent") for event in told.events] == [row_id]


@pytest.mark.parametrize(
    ("bug", "name"), [(ZeroDivisionError(), "on_rescheduled"), (KeyboardInterrupt(), "on_released")]
)
def test_after_an_exception_what_was_sent_and_what_was_not_is_told(
    outbox: Outbox, listener: Listener, bug: BaseException, name: str
) -> None:
    outbox.policy = Policy.original()
    ids = outbox.enqueue_many([rule_fired()] * 3)
    with pytest.raises(type(bug)):
        outbox.flush(ScriptedClient(REJECTED, OK, bug))
    assert [event.id for told in listener.of("on_sent") for event in told.events] == ids[:1]
    assert [event.id for told in listener.of(name) for event in told.events] == ids[1:]
    assert set(map(tuple, listener.seen)) == {("sent", "pending", "pending")}


def test_a_filter_of_the_log_that_raises_keeps_nothing_from_being_recorded_and_told(
    outbox: Outbox, listener: Listener
) -> None:
    outbox.policy = Policy.original()
    log = logging.getLogger("outbox")
    outbox.hooks.insert(0, Hooks(on_abandoned=lambda told: 1 / 0))
    _, bad = outbox.enqueue_many([rule_fired()] * 2)

    def broken(record: logging.LogRecord) -> bool:
        raise LookupError(record.getMessage())

    log.addFilter(broken)
    try:
        with pytest.raises(LookupError, match="abandoned: 1 of 1 events"):
            outbox.flush(ScriptedClient(REJECTED, OK, REJECTED))
    finally:
        log.removeFilter(broken)
    assert statuses(outbox) == ["sent", "abandoned"]
    assert [event.id for told in listener.of("on_abandoned") for event in told.events] == [bad]


def test_a_hook_that_raises_breaks_no_flush_and_is_logged_once(outbox: Outbox, listener: Listener, caplog) -> None:
    is_broken = True

    def tell(told: Settled) -> None:
        if is_broken:
            raise ZeroDivisionError(told)

    outbox.hooks.insert(0, Hooks(on_sent=tell, on_abandoned=tell))
    caplog.set_level(logging.DEBUG, "outbox")

    def flush() -> list[int]:
        caplog.clear()
        outbox.enqueue(rule_fired())
        assert outbox.flush(ScriptedClient()).sent == 1
        failed = [record for record in caplog.records if record.event_name == "outbox.hook_failed"]
        assert all(record.hook == "on_sent" for record in failed)
        return [(record.levelname, bool(record.exc_info)) for record in failed]

    assert flush() == [("WARNING", True)]
    assert flush() == [("DEBUG", False)]
    is_broken = False
    assert flush() == []
    is_broken = True
    assert flush() == [("WARNING", True)]
    assert statuses(outbox) == ["sent"] * 4
    assert len(listener.of("on_sent")) == 4


def test_an_interrupt_in_a_hook_reaches_the_caller_with_everything_recorded(outbox: Outbox) -> None:
    outbox.policy = Policy.original()

    def interrupt(_told) -> None:
        raise KeyboardInterrupt

    outbox.hooks.append(Hooks(on_sent=interrupt))
    _, bad, _ = outbox.enqueue_many([rule_fired()] * 3)
    with pytest.raises(KeyboardInterrupt):
        outbox.flush(rejecting(bad))
    assert statuses(outbox) == ["sent", "abandoned", "sent"]


def test_flush_all_and_a_worker_tell_too(outbox: Outbox, listener: Listener) -> None:
    outbox.enqueue_many([rule_fired()] * 65)
    outbox.flush_all(ScriptedClient())
    assert [told.recorded for told in listener.of("on_sent")] == [64, 1]
    with Worker(outbox, ScriptedClient(DOWN)):
        outbox.enqueue(rule_fired())
        until(lambda: listener.of("on_rescheduled"))


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="hooks: on_sent is 3, expected a function"):
        Hooks(on_sent=3)

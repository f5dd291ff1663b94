"""Each destination is on its own: trouble at one touches no row of another."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest.mock import ANY

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from builders import (
    DOWN,
    NOON_MS,
    REJECTED,
    REVOKED,
    SLOW_DOWN,
    ScriptedClient,
    add_row,
    columns_of,
)
from conditions import FOREVER_S, until, worker_threads
from outbox import (
    ConfigurationError,
    Hooks,
    Outbox,
    Policy,
    QueueFull,
    TransportFailure,
    UploadFailure,
    Worker,
)
from outbox.destinations import shown
from outbox.outcomes import deliver
from outbox.pauses import PROBE_AFTER, SharedPause
from outbox.storage.engines import reading
from outbox.storage.store import Store
from outbox.storage.tables import destinations_ledger, ledger

pytestmark = [pytest.mark.contract, pytest.mark.usefixtures("noon")]

MINUTE_MS = 60_000
LATER_MS = NOON_MS + 30 * MINUTE_MS
BILLING, DEFAULT = DESTINATIONS = ("billing", "")
TRIMMING = Policy(max_rows=1, max_sent=1, max_undelivered=1, when_full="trim")

PENDING: list[dict[str, Any]] = [{}, *({"waits_for": waits} for waits in ("service", "delay", "proof", "row"))]
OTHERS: list[dict[str, Any]] = [
    {"status": "sending"},
    {"status": "sending", "lost_leases": 1},
    {"status": "sent", "sent_at_ms": NOON_MS - MINUTE_MS},
    {"status": "sent", "sent_at_ms": NOON_MS},
    {"status": "parked"},
    {"status": "parked", "revived_at_ms": 1},
    {"status": "abandoned"},
]
KINDS = [*PENDING, *({**kind, "next_attempt_at_ms": LATER_MS} for kind in PENDING), *OTHERS]


@pytest.fixture
def places(outbox: Outbox) -> dict[int, tuple[str, int]]:
    """Rows of every kind for two destinations: by id, the destination and the number of the kind."""
    return {
        add_row(outbox, destination=destination, **kind): (destination, number)
        for number, kind in enumerate(KINDS)
        for destination in DESTINATIONS
    }


def claim(store: Store, destination: str, *, batch_size: int = 64, is_original: bool = False) -> list[int]:
    found = store.claims.claim(
        now_ms=NOON_MS,
        lease_until_ms=NOON_MS + MINUTE_MS,
        batch_size=batch_size,
        destination=destination,
        is_original=is_original,
    )
    return [row.id for row in found.rows]


def claim_all(store: Store, destination: str) -> None:
    while claim(store, destination):
        pass


def probe(store: Store, destination: str) -> None:
    store.pauses.change(destination, lambda pause: pause._replace(failures=PROBE_AFTER))
    assert len(claim(store, destination)) == 1


def trim_bounds(store: Store, destination: str) -> None:
    store.bounds.count_undelivered(destination)
    store.bounds.trim(TRIMMING, destination, now_ms=NOON_MS)


OPERATIONS: dict[str, Callable[[Store, str], object]] = {
    "claims in turns": claim_all,
    "claim of the original": lambda store, one: claim(store, one, is_original=True),
    "probe": probe,
    "revive": lambda store, one: store.revival.revive(one, now_ms=NOON_MS, policy=Policy(), ended_failures=3),
    "unpark": lambda store, one: store.revival.unpark(one, now_ms=NOON_MS, limit=256, spread_ms=5_000),
    "unpark one": lambda store, one: store.revival.unpark_one(one, now_ms=NOON_MS, spread_ms=1),
    "cap": lambda store, one: store.deletion.trim(TRIMMING, one, now_ms=NOON_MS),
    "bounds": trim_bounds,
    "retention": lambda store, one: store.deletion.expire(one, sent_before_ms=NOON_MS),
}


def rows_by_id(outbox: Outbox) -> dict[int, dict[str, Any]]:
    return {found.id: columns_of(found) for found in outbox.find(limit=1_000)}


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_done_for_one_destination_touches_no_row_of_another(
    outbox: Outbox, places: dict[int, tuple[str, int]], name: str
) -> None:
    touched: dict[str, set[int]] = {}
    for destination in DESTINATIONS:
        before = rows_by_id(outbox)
        OPERATIONS[name](outbox.store, destination)
        after = rows_by_id(outbox)
        changed = [places[row_id] for row_id in before if after.get(row_id) != before[row_id]]
        assert {owner for owner, _ in changed} == {destination}
        touched[destination] = {number for _, number in changed}
    assert touched[BILLING] == touched[DEFAULT]


@pytest.mark.parametrize("waits_for", [None, "service"])
def test_a_row_whose_time_is_invalid_is_claimed_for_its_destination(outbox: Outbox, waits_for: str | None) -> None:
    ids = {
        destination: add_row(outbox, destination=destination, waits_for=waits_for, next_attempt_at_ms=2**53)
        for destination in DESTINATIONS
    }
    for destination in DESTINATIONS:
        assert claim(outbox.store, destination) == [ids[destination]]


@pytest.mark.traced
def test_the_rows_of_each_destination_are_counted_apart(outbox: Outbox) -> None:
    for destination, number in ((BILLING, 3), (DEFAULT, 1)):
        for status in ("pending", "sending", "parked", "abandoned", "sent"):
            for _ in range(number):
                add_row(outbox, destination=destination, status=status, sent_at_ms=NOON_MS - number)
    store = outbox.store
    for destination, number in ((BILLING, 3), (DEFAULT, 1)):
        assert store.views.pending_count(destination) == 2 * number
        assert store.bounds.count_undelivered(destination) == 4 * number
        assert store.views.last_accepted_ms(destination) == NOON_MS - number
    assert outbox.pending_count() == 8


def test_each_destination_has_its_own_next_due_time(outbox: Outbox) -> None:
    times: dict[str, list[int]] = {destination: [] for destination in DESTINATIONS}
    for kind in [{"status": "sending"}, *PENDING]:
        for destination in DESTINATIONS:
            times[destination].append(NOON_MS - 100 + len(times[DEFAULT]) * 2 + (destination == DEFAULT))
            due = {"created_at_ms": times[destination][-1], "next_attempt_at_ms": times[destination][-1]}
            add_row(outbox, destination=destination, **due, **kind)
    for destination in DESTINATIONS:
        for due_ms in sorted(times[destination]):
            assert outbox.store.views.next_due_ms(destination, now_ms=NOON_MS) == due_ms
            (first,) = claim(outbox.store, destination, batch_size=1, is_original=True)
            outbox.store.claims.settle(
                [(first, deliver(sent_at_ms=NOON_MS))],
                lease_until_ms=NOON_MS + MINUTE_MS,
                created_at_ms={first: due_ms},
                destination=destination,
            )
        assert outbox.store.views.next_due_ms(destination, now_ms=NOON_MS) is None
    assert outbox.store.views.next_due_ms("search", now_ms=NOON_MS) is None


def test_each_destination_has_its_own_chores(outbox: Outbox) -> None:
    for kind in ({"status": "parked"}, {"status": "sent", "sent_at_ms": 1}, {"waits_for": "row"}):
        add_row(outbox, destination=BILLING, **kind)
    outbox.store.pauses.change(BILLING, lambda pause: pause._replace(failures=1))
    policy = Policy(keep_sent_ms=1)
    billing, default = (outbox.store.views.chores(policy, one, now_ms=NOON_MS) for one in DESTINATIONS)
    names = ("is_any_parked", "is_any_expired", "is_any_failed", "is_troubled")
    assert [getattr(billing, name) for name in names] == [True] * 4
    assert [getattr(default, name) for name in names] == [False] * 4


def test_a_pause_of_one_destination_holds_up_no_other(outbox: Outbox) -> None:
    ids = {destination: add_row(outbox, destination=destination) for destination in DESTINATIONS}
    outbox.store.pauses.change(BILLING, lambda _: SharedPause(failures=1, until_ms=NOON_MS + 1))
    assert claim(outbox.store, BILLING) == []
    assert claim(outbox.store, DEFAULT) == [ids[DEFAULT]]


def test_each_destination_has_its_own_turns(outbox: Outbox) -> None:
    ids = [
        (destination, add_row(outbox, destination=destination, waits_for=waits))
        for waits in (None, "service")
        for destination in DESTINATIONS
    ]
    assert [(one, *claim(outbox.store, one)) for _ in range(2) for one in DESTINATIONS] == ids


def test_a_full_destination_refuses_its_own_events_only(outbox: Outbox) -> None:
    policy = Policy(max_undelivered=2)
    for _ in range(2):
        add_row(outbox, destination=BILLING)
    outbox.store.bounds.refuse(policy, DEFAULT, own=2)
    with pytest.raises(QueueFull, match="^2 events of billing are not delivered yet"):
        outbox.store.bounds.refuse(policy, BILLING, own=1)


def test_deleted_rows_are_counted_by_destination_and_summed(outbox: Outbox) -> None:
    for destination, number in ((BILLING, 2), (DEFAULT, 1)):
        for _ in range(number):
            add_row(outbox, destination=destination, status="sent", sent_at_ms=1)
        outbox.store.deletion.expire(destination, sent_before_ms=2)
    with reading(outbox.engine) as connection:
        assert connection.execute(ledger.select()).all() == [("sent", "rule_fired", "retention", 1)]
        assert connection.execute(destinations_ledger.select()).all() == [
            (BILLING, "sent", "rule_fired", "retention", 2)
        ]
    assert outbox.stats().deleted == [("sent", "rule_fired", "retention", 3)]


# --- enqueue ---

ROUTES = {"order_placed": ["billing", "search"], "*": "default"}


def order(number: int = 0, event_type: str = "order_placed") -> dict[str, Any]:
    return {"event_type": event_type, "order": number}


def placed(outbox: Outbox) -> list[tuple[int, str, str | None]]:
    """Row id, destination and event id of all rows."""
    return sorted((found.id, found.destination, found.event_id) for found in outbox.find(limit=1_000))


def test_an_event_has_a_row_for_each_destination_and_one_id(outbox: Outbox) -> None:
    ids = outbox.enqueue(order(), to=["search", "default", "billing"])
    first = f"{outbox.store.views.outbox_id()}-{NOON_MS}-{ids[0]}"
    assert placed(outbox) == [(ids[0], "search", first), (ids[1], "", first), (ids[2], "billing", first)]
    sent = {name: ScriptedClient() for name in ("search", "default", "billing")}
    for name, client in sent.items():
        assert outbox.flush(client, destination=name).sent == 1
        assert [item.event_id for batch in client.batches for item in batch] == [first]


def test_one_name_gets_one_row_id(outbox: Outbox) -> None:
    row_id = outbox.enqueue(order(), to="billing")
    assert placed(outbox) == [(row_id, "billing", ANY)]
    assert outbox.enqueue(order(), to=["billing"]) == [row_id + 1]
    assert outbox.enqueue_many([order(), order()], to="billing") == [row_id + 2, row_id + 3]


def test_routes_name_the_destinations_unless_the_caller_does(outbox_url: str) -> None:
    with Outbox(outbox_url, routes=ROUTES) as outbox:
        events = [order(), order(1, "other"), order(2)]
        ids = outbox.enqueue_many(events)
        assert [(row_id, destination) for row_id, destination, _ in placed(outbox)] == sorted(
            zip(ids, ["billing", "search", "", "billing", "search"], strict=True)
        )
        first = outbox.enqueue(order())
        assert [destination for row_id, destination, _ in placed(outbox) if row_id >= first] == [
            "billing",
            "search",
        ]
        ids = outbox.enqueue_many(events, to=("default", "archive"))
        of = {row_id: destination for row_id, destination, _ in placed(outbox)}
        assert [of[row_id] for row_id in ids] == ["", "archive"] * 3


def test_a_destination_gets_the_events_of_one_call_in_their_order(outbox_url: str) -> None:
    routes = {"both": ["billing", "search"], "back": ["search", "billing"], "one": "search"}
    kinds = ["both", "one", "both", "both", "back", "one", "both"]
    with Outbox(outbox_url, routes=routes) as outbox:
        outbox.enqueue_many([order(number, kind) for number, kind in enumerate(kinds)])
        for name in ("billing", "search"):
            client = ScriptedClient()
            outbox.flush(client, destination=name)
            (batch,) = client.batches
            assert [item.event["order"] for item in batch] == [
                number for number, kind in enumerate(kinds) if name == "search" or kind != "one"
            ]


def test_the_callers_id_is_unique_in_each_destination(outbox: Outbox) -> None:
    (billing,) = outbox.enqueue(order(), event_id="o-1", to=["billing"])
    ids = outbox.enqueue(order(), event_id="o-1", to=["search", "billing", "default"])
    assert ids == [ANY, billing, ANY]
    assert outbox.enqueue(order(), event_id="o-1") == ids[2]
    assert (
        outbox.enqueue_many([order()] * 2, event_ids=["o-1", "o-1"], to=["search", "default"])
        == [ids[0], ids[2]] * 2
    )
    assert [(destination, event_id) for _, destination, event_id in placed(outbox)] == [
        ("billing", "o-1"),
        ("search", "o-1"),
        ("", "o-1"),
    ]


@pytest.mark.parametrize("event_id", [None, "o-1"])
def test_the_rows_of_an_event_are_part_of_the_callers_transaction(outbox: Outbox, event_id: str | None) -> None:
    def enqueue(**where: Any) -> list[int]:
        return outbox.enqueue(order(), event_id=event_id, to=["billing", "search"], **where)

    engine = create_engine(outbox.engine.url)
    with Session(engine) as session:
        enqueue(session=session)
        session.rollback()
        assert placed(outbox) == []
        in_session = enqueue(session=session)
        session.commit()
    with engine.begin() as connection:
        if event_id is None:
            on_connection = enqueue(connection=connection)
        else:
            assert enqueue(connection=connection) == in_session
            on_connection = []
    engine.dispose()
    assert [row_id for row_id, *_ in placed(outbox)] == in_session + on_connection
    assert len({event_id for *_, event_id in placed(outbox)}) == (1 if event_id else 2)


def test_an_event_that_one_destination_has_no_room_for_is_recorded_nowhere(outbox_url: str) -> None:
    with Outbox(outbox_url, policy=Policy(max_undelivered=2)) as outbox:
        outbox.enqueue_many([order()] * 2, to="billing", event_ids=["o-1", "o-2"])
        with pytest.raises(QueueFull, match="^2 events of billing are not delivered yet"):
            outbox.enqueue(order(), to=["search", "billing"])
        assert outbox.enqueue(order(), to=["search", "billing"], event_id="o-1")[1] == placed(outbox)[0][0]
        assert [destination for _, destination, _ in placed(outbox)] == ["billing", "billing", "search"]


def test_a_bound_trims_its_own_destination(outbox_url: str) -> None:
    with Outbox(outbox_url, policy=Policy(max_undelivered=2, when_full="trim")) as outbox:
        search = outbox.enqueue(order(), to="search")
        ids = [outbox.enqueue(order(), to=["billing", "archive"]) for _ in range(4)]
        assert [row_id for row_id, *_ in placed(outbox)] == [search, *ids[2], *ids[3]]
        assert [(one.status, one.events) for one in outbox.stats().deleted] == [("pending", 4)]


def test_nothing_is_recorded_while_capture_is_off(outbox: Outbox, monkeypatch) -> None:
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    assert outbox.enqueue(order(), to=["billing", "search"]) == []
    assert outbox.enqueue(order(), to="billing") is None


@pytest.mark.parametrize("to", [[], {}, 5, ["with blank"], ["billing", "billing"]])
def test_an_event_goes_nowhere_else(outbox: Outbox, to: Any) -> None:
    with pytest.raises(ConfigurationError):
        outbox.enqueue(order(), to=to)
    assert placed(outbox) == []


# --- flush ---


@pytest.mark.parametrize("name", ["billing", "default", None])
def test_a_flush_sends_the_events_of_its_destination_only(outbox: Outbox, name: str | None) -> None:
    ids = {
        destination: [add_row(outbox, destination=destination) for _ in range(2)] for destination in DESTINATIONS
    }
    heard: list[str] = []
    outbox.hooks.append(
        Hooks(
            on_sent=lambda settled: heard.append(settled.destination),
            on_upload=lambda upload: heard.append(upload.destination),
        )
    )
    client = ScriptedClient()
    assert outbox.flush_all(client, destination=name).sent == 2
    own = BILLING if name == BILLING else DEFAULT
    assert client.ids == [ids[own]]
    assert heard == [own or "default"] * 2
    assert outbox.flush(client, destination=name).claimed == 0


@pytest.mark.parametrize("name", ["", "with blank", "ü", "x" * 192, 5, ["billing"]])
def test_a_flush_names_a_destination_that_can_not_be(outbox: Outbox, name: Any) -> None:
    with pytest.raises(ConfigurationError, match="^the destination is .*, expected a name: 1 to 191 printable"):
        outbox.flush(ScriptedClient(), destination=name)


def test_a_destination_that_is_not_logged_in_is_named_until_it_is(outbox: Outbox) -> None:
    add_row(outbox, destination=BILLING)
    outbox.flush(ScriptedClient(logged_in=False), destination=BILLING)
    outbox.flush(ScriptedClient())
    assert str(outbox.stats().likely_cause).startswith(
        "billing: not logged in, the client has no credentials; 1 event is"
    )
    outbox.flush(ScriptedClient(), destination=BILLING)
    assert outbox.stats().likely_cause is None


def test_a_purge_counts_the_rows_of_each_destination(outbox: Outbox, places: dict[int, tuple[str, int]]) -> None:
    outbox.purge(event_type="rule_fired")
    entries = outbox.stats().deleted
    assert sum(entry.events for entry in entries) == len(places)
    with reading(outbox.engine) as connection:
        for table in (ledger, destinations_ledger):
            counted = connection.execute(table.select()).all()
            assert sum(entry.events for entry in counted) == len(places) // 2


# --- workers: trouble at A leaves B alone ---


class Gate:
    """A service that does not answer until it is opened."""

    logged_in = True

    def __init__(self) -> None:
        self.batches: list[object] = []
        self.is_open = threading.Event()

    def upload(self, batch: object) -> None:
        self.batches.append(batch)
        assert self.is_open.wait(FOREVER_S)


class SlowLogin(Gate):
    """A service whose credentials take long to get."""

    @property
    def logged_in(self) -> bool:
        self.upload(())
        return True


def sent_of(outbox: Outbox, destination: str) -> int:
    return sum(found.destination == destination for found in outbox.find(status="sent", limit=1_000))


@pytest.mark.parametrize("concurrency", [1, 3, 5])
@pytest.mark.parametrize("kind", [Gate, SlowLogin])
def test_uploads_that_hang_hold_up_no_other_destination(
    outbox: Outbox, kind: type[Gate], concurrency: int
) -> None:
    outbox.policy = Policy(batch_size=1)
    hung = {"a": kind(), "b": kind()}
    with Worker(outbox, {**hung, "default": ScriptedClient()}, concurrency=concurrency):
        outbox.enqueue_many([order()] * 5, to=["a", "b"])
        until(lambda: all(gate.batches for gate in hung.values()))
        for number in range(1, 4):
            outbox.enqueue(order())
            until(lambda number=number: sent_of(outbox, DEFAULT) == number)
        assert sent_of(outbox, "a") == sent_of(outbox, "b") == 0
        for gate in hung.values():
            gate.is_open.set()
        until(lambda: sent_of(outbox, "a") == sent_of(outbox, "b") == 5)


def test_a_destination_uses_the_threads_that_no_other_one_needs(outbox: Outbox) -> None:
    outbox.policy = Policy(batch_size=1)
    hung = Gate()
    with Worker(outbox, {"a": hung, "b": ScriptedClient(), "default": ScriptedClient()}, concurrency=5):
        outbox.enqueue_many([order()] * 5, to="a")
        until(lambda: len(hung.batches) == 3)
        outbox.enqueue(order(), to=["b", "default"])
        until(lambda: sent_of(outbox, "b") == sent_of(outbox, DEFAULT) == 1)
        assert len(hung.batches) == 3
        assert len(worker_threads()) == 5
        hung.is_open.set()


TROUBLE: dict[str, UploadFailure] = {
    "down": TransportFailure("connection refused"),
    "503": DOWN,
    "429": SLOW_DOWN,
    "401": REVOKED,
    "422": REJECTED,
}


class Failing:
    logged_in = True

    def __init__(self, failure: UploadFailure) -> None:
        self.failure = failure
        self.batches: list[object] = []

    def upload(self, batch: object) -> None:
        self.batches.append(batch)
        raise self.failure


@pytest.mark.parametrize("name", TROUBLE)
@pytest.mark.parametrize("troubled", DESTINATIONS)
def test_trouble_at_one_destination_changes_no_event_of_another(outbox: Outbox, name: str, troubled: str) -> None:
    outbox.policy = Policy(batch_size=2)
    other = BILLING if troubled == DEFAULT else DEFAULT
    failing = Failing(TROUBLE[name])
    clients = {troubled or "default": failing, other or "default": ScriptedClient()}
    with Worker(outbox, clients):
        outbox.enqueue_many([order()] * 3, to=[*clients])
        until(lambda: failing.batches)
        until(lambda: sent_of(outbox, other) == 3)
        outbox.enqueue_many([order()] * 3, to=[*clients])
        until(lambda: sent_of(outbox, other) == 6)
    rows = [columns_of(found) for found in outbox.find(limit=100) if found.destination == other]
    untouched = {
        "retry_count": 0,
        "last_error": None,
        "waits_for": None,
        "suspected_at_ms": None,
        "lost_leases": 0,
    }
    assert [{name: row[name] for name in untouched} for row in rows] == [untouched] * 6
    assert [pause.destination for pause in outbox.stats().pauses] in ([shown(troubled)], [])
    assert sent_of(outbox, troubled) == 0


def test_a_worker_leaves_the_events_of_other_destinations_alone(outbox: Outbox) -> None:
    client = ScriptedClient()
    outbox.enqueue(order(), to=["default", "search"])
    with Worker(outbox, {"billing": client}):
        outbox.enqueue(order(), to="billing")
        until(lambda: sent_of(outbox, BILLING) == 1)
    with Worker(outbox, client):
        until(lambda: sent_of(outbox, DEFAULT) == 1)
    assert sent_of(outbox, "search") == 0


@pytest.mark.parametrize("clients", [{}, {"with blank": ScriptedClient()}, {5: ScriptedClient()}])
@pytest.mark.traced
def test_a_worker_needs_clients_of_destinations(outbox: Outbox, clients: Any) -> None:
    with pytest.raises(ConfigurationError, match="expected a"):
        Worker(outbox, clients)


# --- conservation ---


def test_each_destination_keeps_or_counts_what_was_enqueued_to_it(outbox_url: str) -> None:
    enqueued = {"a": 7, "b": 4, "default": 9}
    policy = Policy(max_sent=2, max_undelivered=5, when_full="trim", batch_size=3)
    with Outbox(outbox_url, policy=policy) as outbox:
        for name, number in enqueued.items():
            for _ in range(number):
                outbox.enqueue(order(), to=name)
        outbox.flush_all(ScriptedClient(), destination="a")
        outbox.flush_all(Failing(DOWN), destination="b")
        outbox.flush_all(ScriptedClient())
        rows = Counter(found.destination for found in outbox.find(limit=100))
        with reading(outbox.engine) as connection:
            rows[DEFAULT] += sum(entry.events for entry in connection.execute(ledger.select()))
            for entry in connection.execute(destinations_ledger.select()):
                rows[entry.destination] += entry.events
    assert rows == {"a": 7, "b": 4, DEFAULT: 9}

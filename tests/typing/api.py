"""What type checkers say about programs that use the public names. `make check` checks this file; nothing runs it.

Each `ignore` states that both checkers find the error in its line: an ignore without an error is itself an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import attrs
import pydantic
from flask import Flask
from requests.auth import HTTPBasicAuth
from sqlalchemy import Connection, Engine
from sqlalchemy.orm import Session, scoped_session
from typing_extensions import assert_type

from outbox import (
    NO_AUTH,
    ActionReport,
    ApiKey,
    BatchItem,
    ClientCredentials,
    CloudEvents,
    DestinationStats,
    Event,
    EventCount,
    FlushReport,
    Format,
    Found,
    Hold,
    Hooks,
    HttpClient,
    HttpFailure,
    Instant,
    ObservationEvent,
    Outbox,
    OutboxError,
    Pause,
    Policy,
    PurgeReport,
    ReplaceReport,
    RequeueReport,
    RuleFired,
    Settled,
    SettledEvent,
    StandardWebhooks,
    Stats,
    Status,
    TransportFailure,
    Try,
    Upload,
    UploadClient,
    UploadFailure,
    Verdict,
    Where,
    Worker,
    schema,
)
from outbox.meter import OutboxMeter
from outbox.metrics import OutboxMetrics
from outbox.testing import Received, ScriptedServer, TimeMachine, time_machine
from outbox.web import create_app


class OrderShipped(Event, tag="order_shipped"):
    order_id: str
    occurred_at: Instant


class OrderNoted(Event, tag="order_noted", frozen=True, kw_only=True):
    order_id: str
    note: str | None = None
    occurred_at: Instant


class OrderLost(pydantic.BaseModel):
    order_id: str


@dataclass
class OrderFound:
    order_id: str


@attrs.define
class OrderReturned:
    order_id: str


class Tagged(Format):
    def part(self, item: BatchItem, /) -> bytes:
        return item.event_type.encode()


def sign(body: bytes, message_id: str, now_ms: int, /) -> dict[str, str]:
    return {message_id: f"{len(body)} {now_ms}"}


class Printer:
    """A client of one's own; it need not inherit anything."""

    @property
    def logged_in(self) -> bool:
        return True

    def upload(self, batch: tuple[BatchItem, ...], /) -> None:
        for item in batch:
            assert_type(item.id, int)
            assert_type(item.event_id, str)
            assert_type(item.event, Event | Mapping[str, Any])
        raise HttpFailure(503, "Service Unavailable", retry_after_ms=1_000)


def events(now: datetime) -> None:
    shipped = OrderNoted(order_id="o-17", occurred_at=now)
    assert_type(shipped.order_id, str)
    assert_type(shipped.note, str | None)
    assert_type(shipped.occurred_at, datetime)
    placed = OrderShipped("o-17", occurred_at=now)
    placed.order_id = "o-18"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    shipped.note = "late"  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    OrderShipped(occurred_at=now)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RuleFired(rule_ids=["r1"], session_id="s1", fired_at=now)
    OrderNoted(order_id=17, occurred_at=now)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    OrderNoted(occurred_at=now)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


ROUTES: dict[str, list[str]] = {"order_placed": ["billing", "search"], "*": ["default"]}


def opening(engine: Engine, path: Path) -> None:
    policy = Policy(
        max_rows=1_000, when_full="reject", backoff_ms=(5_000, 60_000), verdicts={409: Verdict.TRANSIENT}
    )
    with Outbox.open(
        f"sqlite:///{path}", policy=policy, synchronous="NORMAL", strict=True, routes=ROUTES
    ) as opened:
        assert_type(opened, Outbox)
    assert_type(Outbox(engine).engine, Engine)
    assert_type(schema.upgrade(engine), str | None)
    Outbox.open()
    Outbox.open(path)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Policy(when_full="drop")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def enqueueing(
    outbox: Outbox, event: OrderNoted, session: Session, scoped: scoped_session[Session], connection: Connection
) -> None:
    assert_type(outbox.enqueue(event), int | None)
    assert_type(outbox.enqueue({"event_type": "order_shipped", "order_id": "o-17"}, session=session), int | None)
    assert_type(outbox.enqueue(OrderLost(order_id="o-17"), event_type="order_lost"), int | None)
    outbox.enqueue(OrderFound("o-17"), event_type="order_found")
    outbox.enqueue(OrderReturned("o-17"), event_type="order_returned")
    outbox.enqueue_many([OrderLost(order_id="o-17"), OrderFound("o-17"), OrderReturned("o-17"), event, {}])
    assert_type(outbox.enqueue_many([event, event], session=scoped), list[int])
    assert_type(outbox.enqueue_many(iter([event]), connection=connection), list[int])
    assert_type(outbox.enqueue(event, event_id="order-17"), int | None)
    assert_type(outbox.enqueue_many([event] * 2, event_ids=["order-17", None]), list[int])
    assert_type(outbox.enqueue(event, to="billing"), int | None)
    assert_type(outbox.enqueue(event, to=["billing", "search"]), list[int])
    assert_type(outbox.enqueue(event, to=("billing", "search")), list[int])
    assert_type(outbox.enqueue_many([event], to="billing", not_before=1_795_521_600_000), list[int])
    assert_type(outbox.abandon(17, "the order was cancelled"), bool)
    outbox.enqueue(event, to={"billing"})  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    outbox.enqueue(event, event_id=17)  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]
    outbox.enqueue("order_shipped")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType]


def refused(_status: int, _headers: Mapping[str, str], _body: bytes) -> dict[str, HttpFailure]:
    return {"order-17": HttpFailure(422)}


def delivering(outbox: Outbox) -> None:
    own: UploadClient = Printer()
    assert_type(outbox.flush(own), FlushReport)
    assert_type(outbox.flush(own, destination="billing"), FlushReport)
    HttpClient("https://ingest.example.com", path="", auth=NO_AUTH, format=Tagged(), cert=("a", Path("b")))
    HttpClient("https://ingest.example.com", auth=("user", lambda: "password"), sign=StandardWebhooks("a"))
    HttpClient("https://ingest.example.com", auth=ApiKey("X-Api-Key", lambda: None), headers={"X-Shop": "17"})
    HttpClient("https://ingest.example.com", auth=HTTPBasicAuth("user", "password"), format="ndjson", zstd=True)
    HttpClient(
        "https://ingest.example.com", sign=sign, format=CloudEvents("/shop", subject="order_id", batch=True)
    )
    HttpClient("https://ingest.example.com", read_answer=refused)
    HttpClient("https://ingest.example.com", auth=ClientCredentials("https://login.example.com", "a", lambda: "b"))
    with HttpClient("https://ingest.example.com", token=lambda: None, gzip=True) as client:
        assert_type(client, HttpClient)
        report = outbox.flush_all(client, progress=print)
        assert_type(report + report, FlushReport)
        assert_type(report.sent, int)
        assert_type(report.skipped, str | None)
        Worker(outbox, {"billing": client, "default": own})
        with Worker(outbox, client, concurrency=2, heartbeat=Path("alive")) as worker:
            assert_type(worker.is_alive, bool)
            assert_type(worker.silent_ms, int | None)
            worker.stop(2.5)
    outbox.flush(object())  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def operating(outbox: Outbox, now: datetime) -> None:
    assert_type(outbox.retry_now(), int)
    assert_type(outbox.retry_now(destination="billing"), int)
    assert_type(outbox.requeue_abandoned(older_than=now, dry_run=True), RequeueReport)
    assert_type(outbox.purge(event_type="order_shipped", older_than=1), PurgeReport)
    assert_type(outbox.overdue_ms(), int)
    found = outbox.find(status=Status.ABANDONED, older_than=now, limit=5)
    assert_type(found, Found)
    assert_type(found[0], ObservationEvent)
    assert_type(found.next, int | None)
    these = Where(status=["parked", Status.ABANDONED], contains="order-17", newer_than=now)
    assert_type(outbox.find(these, newest_first=True, before=found.next), Found)
    assert_type(outbox.count(these), EventCount)
    assert_type(outbox.retry(these), ActionReport)
    assert_type(outbox.requeue(where=Where(), dry_run=True), ActionReport)
    assert_type(outbox.abandon(where=these, reason="wrong price"), ActionReport)
    assert_type(outbox.abandon(17, "wrong price"), bool)
    assert_type(outbox.purge(where=these, progress=print), PurgeReport)
    assert_type(outbox.replace({17: {"event_type": "order_shipped"}}), ReplaceReport)
    row = outbox.get(found[0].id)
    assert_type(row, ObservationEvent | None)
    if row is not None:
        assert_type(row.last_error, str | None)
        assert_type(row.sent_at_ms, int | None)
    stats = outbox.stats()
    assert_type(stats, Stats)
    assert_type(stats.by_type, dict[str, dict[str, int]])
    assert_type(stats.by_destination, dict[str, DestinationStats])
    assert_type(stats.by_destination["billing"].paused_until_ms, int | None)
    assert_type(stats.waits_for, dict[str, int])
    assert_type(stats.pauses, list[Pause])
    assert_type(stats.holds, list[Hold])
    assert_type(outbox.tries(found[0].id), list[Try])
    assert_type(outbox.hold("billing", why="billing moves", for_ms=7_200_000), Hold)
    assert_type(outbox.hold("billing", why="billing moves", until=now).until_ms, int | None)
    assert_type(outbox.resume("billing"), bool)
    assert_type(stats.likely_cause, str | None)


def watching(outbox: Outbox) -> None:
    def on_abandoned(settled: Settled) -> None:
        assert_type(settled.events, tuple[SettledEvent, ...])

    def on_upload(upload: Upload) -> None:
        assert_type(upload.duration_ms, float)

    outbox.hooks.append(Hooks(on_abandoned=on_abandoned, on_upload=on_upload, on_lost=print))
    OutboxMetrics(outbox)
    OutboxMeter(outbox)
    Hooks(on_abandoned=lambda: None)  # type: ignore[arg-type, misc]  # pyright: ignore[reportArgumentType]


def failing(error: OutboxError) -> None:
    if isinstance(error, HttpFailure):
        assert_type(error.status, int)
        assert_type(error.retry_after_ms, int | None)
    elif isinstance(error, TransportFailure):
        assert_type(error.message, str)
    elif isinstance(error, UploadFailure):
        assert_type(str(error), str)


def testing(event: OrderNoted) -> None:
    with ScriptedServer() as server, time_machine() as machine:
        server.script(503, 200)
        server.set_mode("ok")
        assert_type(server.url, str)
        assert_type(server.received(event), Received)
        assert_type(server.received({"order_id": "o-17"}), Received)
        assert_type(machine, TimeMachine)
        machine.travel(minutes=5)


def console(outbox: Outbox) -> None:
    assert_type(create_app(outbox, may_enter=lambda environ: environ.get("REMOTE_USER") == "ada"), Flask)
    create_app(outbox, secret="a-secret-of-the-tests", host_names=["a.example.com"], read_only=True)
    create_app(outbox, secret="a-secret-of-the-tests", secret_key=b"key", hide_payloads=True)

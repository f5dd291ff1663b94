"""MariaDB with very many rows that wait for their next try."""

from __future__ import annotations

import time
from statistics import median

import pytest

from builders import ScriptedClient, rule_fired
from outbox import Outbox
from rigs.load import IS_FULL, Load, events
from servers import Servers

pytestmark = [pytest.mark.rig, pytest.mark.slow]

FLUSHERS = 8
BACKED_OFF = """
INSERT INTO observation_events (event_type, occurred_at_ms, payload_json, created_at_ms, next_attempt_at_ms, retry_count,
    waits_for, last_error)
SELECT 'rule_fired', {now} - seq, '{payload}', {now} - seq, {now} + 3600000, 3, '{waits_for}', '503 Service Unavailable'
FROM seq_1_to_{number}
"""


@pytest.mark.parametrize("waits_for", ["delay", "row"])  # a success brings back rows that wait for the service
def test_flushers_pass_many_rows_that_are_backed_off(servers: Servers, waits_for: str) -> None:
    number = 1_000_000 if IS_FULL else 50_000
    load = Load()
    with servers.get("mariadb").database() as url, Outbox.open(url) as outbox:
        payload = (
            '{"event_type":"rule_fired","rule_ids":["r1"],"session_id":"s1","fired_at":"2026-11-24T12:00:00Z"}'
        )
        values = {"now": outbox.store.now_ms(), "payload": payload, "waits_for": waits_for, "number": number}
        with outbox.engine.begin() as connection:
            connection.exec_driver_sql(BACKED_OFF.format(**values))
        for name in range(FLUSHERS):
            load.flush(url, f"f{name}")
        load.enqueue(url, "e", events(50, 300))
        load.until(lambda: len(load.uploaded) == events(50, 300))
        load.stop()
        took_ms = []
        for _ in range(20):
            outbox.enqueue(rule_fired())
            began = time.monotonic()
            outbox.flush(ScriptedClient(lambda _, began=began: took_ms.append((time.monotonic() - began) * 1_000)))
    load.show(f"{number} rows that wait for {waits_for}", f", a claim takes {median(took_ms):.1f} ms")
    assert load.errors == []
    assert load.uploaded == dict.fromkeys(load.accepted, 1)
    assert median(took_ms) < 20 or not IS_FULL

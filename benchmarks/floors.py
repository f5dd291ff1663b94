"""The least that the promises need, on the driver alone and on our own table."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any

import psycopg

NOW_MS = 1_900_000_000_000
_LEASE_MS = NOW_MS + 60_000

# The conditions are those of our index of fresh rows, with its plus. No row was tried before.
CLAIM_ON_SQLITE = """
    UPDATE observation_events SET status = 'sending', next_attempt_at_ms = ?
    WHERE id IN (
        SELECT id FROM observation_events
        WHERE +status = 'pending' AND next_attempt_at_ms <= created_at_ms AND next_attempt_at_ms <= ?
        ORDER BY created_at_ms, id LIMIT 64
    )
    RETURNING id, payload_json
"""
CLAIM_ON_DIFFLORES = """
    UPDATE observation_events SET status = 'sending', next_attempt_at_ms = ?
    WHERE id IN (
        SELECT id FROM observation_events
        WHERE status IN ('pending', 'sending') AND next_attempt_at_ms <= ?
        ORDER BY created_at_ms, id LIMIT 64
    )
    RETURNING id, payload_json
"""
"""The claim on difflore's table with its two indexes, as a program of a few lines has them, too."""
_CLAIM_ON_POSTGRESQL = """
    WITH chosen AS MATERIALIZED (
        SELECT id FROM observation_events WHERE status IN ('pending', 'sending') AND next_attempt_at_ms <= %s
        ORDER BY created_at_ms, id LIMIT 64 FOR UPDATE SKIP LOCKED
    )
    UPDATE observation_events e SET status = 'sending', next_attempt_at_ms = %s FROM chosen
    WHERE e.id = chosen.id RETURNING e.id, e.payload_json
"""


def drain_on_sqlite(
    connection: sqlite3.Connection,
    claim: str = CLAIM_ON_SQLITE,
    upload: Callable[[list[str]], object] | None = None,
) -> int:
    """Claim 64, send their payloads and mark them sent, again and again; return how many there were."""
    drained = 0
    while rows := connection.execute(claim, (_LEASE_MS, NOW_MS)).fetchall():
        connection.commit()
        if upload is not None:
            upload([row[1] for row in rows])
        ids = [row[0] for row in rows]
        marks = ", ".join("?" * len(ids))
        connection.execute(
            f"UPDATE observation_events SET status = 'sent', sent_at_ms = ? WHERE id IN ({marks})", (NOW_MS, *ids)
        )
        connection.commit()
        drained += len(ids)
    connection.rollback()
    return drained


def drain_on_postgresql(connection: psycopg.Connection[Any]) -> int:
    """The same, beside others who do it too."""
    drained = 0
    while rows := connection.execute(_CLAIM_ON_POSTGRESQL, (NOW_MS, _LEASE_MS)).fetchall():
        connection.commit()
        connection.execute(
            "UPDATE observation_events SET status = 'sent', sent_at_ms = %s WHERE id = ANY(%s)",
            (NOW_MS, [row[0] for row in rows]),
        )
        connection.commit()
        drained += len(rows)
    connection.rollback()
    return drained

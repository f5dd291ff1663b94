"""Why a row waits, since when it is suspected, and how often its sender died; and what flushers share of a pause.

A column that is nullable or has a constant default is added without a copy of the table. Rows that failed before
this revision have no `waits_for`: claims take them with the rows that did not fail, until they fail again.
"""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "outbox_0006"
down_revision = "outbox_0005"
branch_labels = None
depends_on = None

EVENTS, DESTINATIONS = "observation_events", "observation_destinations"
ZERO: dict[str, Any] = {"nullable": False, "server_default": sa.text("0")}
SHORT_TEXT = sa.Text().with_variant(sa.String(16), "mysql", "mariadb")
COLUMNS: dict[str, tuple[tuple[str, Any, dict[str, Any]], ...]] = {
    EVENTS: (
        ("suspected_at_ms", sa.BigInteger(), {}),
        ("waits_for", SHORT_TEXT, {}),
        ("lost_leases", sa.Integer(), ZERO),
    ),
    DESTINATIONS: (
        ("pauses", sa.Integer(), ZERO),
        ("is_asked", sa.Integer(), ZERO),
        ("probe_failed_before", sa.Integer(), ZERO),
        ("unparked_at_ms", sa.BigInteger(), ZERO),
    ),
}

IN_ORDER = ["created_at_ms", "id", "next_attempt_at_ms", "status"]
BY_DUE_TIME = ["next_attempt_at_ms", "created_at_ms", "id", "status"]
PENDING = "+status = 'pending' AND"
UNDELIVERED = "status IN ('pending', 'sending') AND"
# By dialect: what is dropped, and what is created instead.
REPLACED = {
    "sqlite": (
        ("fresh", IN_ORDER, f"{PENDING} next_attempt_at_ms <= created_at_ms"),
        ("tried", IN_ORDER, f"{PENDING} next_attempt_at_ms > created_at_ms"),
        ("due", BY_DUE_TIME, f"{PENDING} next_attempt_at_ms > created_at_ms"),
    ),
    "postgresql": (("claim", IN_ORDER, "status IN ('pending', 'sending')"),),
    "mysql": (),
}
CREATED = {
    "sqlite": (
        (
            "fresh",
            [*IN_ORDER, "waits_for"],
            f"{PENDING} waits_for IS NULL AND next_attempt_at_ms <= created_at_ms",
        ),
        ("tried", [*IN_ORDER, "waits_for"], f"{PENDING} waits_for IS NULL AND next_attempt_at_ms > created_at_ms"),
        (
            "due",
            [*BY_DUE_TIME, "waits_for"],
            f"{PENDING} waits_for IS NULL AND next_attempt_at_ms > created_at_ms",
        ),
        ("failed", ["waits_for", *IN_ORDER], f"{PENDING} waits_for IS NOT NULL"),
        ("retry", ["waits_for", *BY_DUE_TIME, "suspected_at_ms"], f"{PENDING} waits_for IS NOT NULL"),
    ),
    "postgresql": (
        ("claim", IN_ORDER, f"{UNDELIVERED} waits_for IS NULL"),
        ("others", [*IN_ORDER, "waits_for"], f"{UNDELIVERED} waits_for <> 'row'"),
        ("later", ["waits_for", *BY_DUE_TIME], f"{UNDELIVERED} waits_for IS NOT NULL"),
        ("lost", ["created_at_ms", "id"], "lost_leases > 0"),
    ),
    "mysql": (("waiting", ["status", "waits_for", "created_at_ms", "id", "next_attempt_at_ms"], ""),),
}


def dialect() -> str:
    name = op.get_context().dialect.name
    return "mysql" if name == "mariadb" else name


def present(table: str, what: str) -> set[str]:
    # On MySQL an upgrade that failed may have done a part of this; elsewhere the version may have been lost.
    if context.is_offline_mode():
        return set()
    return {found["name"] for found in getattr(sa.inspect(op.get_bind()), f"get_{what}")(table)}


def drop_indexes(indexes: tuple[tuple[str, list[str], str], ...]) -> None:
    for name, *_ in indexes:
        op.drop_index(f"observation_events_{name}_idx", table_name=EVENTS)


def create_indexes(indexes: tuple[tuple[str, list[str], str], ...]) -> None:
    there = present(EVENTS, "indexes")
    for name, columns, rows in indexes:
        full_name = f"observation_events_{name}_idx"
        if full_name not in there:
            op.create_index(full_name, EVENTS, columns, sqlite_where=sa.text(rows), postgresql_where=sa.text(rows))


def upgrade() -> None:
    for table, columns in COLUMNS.items():
        there = present(table, "columns")
        for name, type_, options in columns:
            if name not in there:
                op.add_column(table, sa.Column(name, type_, **options))
    # They were pauses of clients; now all clients share the default destination.
    op.execute(sa.delete(sa.table(DESTINATIONS)))
    drop_indexes(REPLACED[dialect()])
    create_indexes(CREATED[dialect()])


def downgrade() -> None:
    drop_indexes(CREATED[dialect()])
    create_indexes(REPLACED[dialect()])
    # To an older version, a row is a pause.
    op.execute(sa.delete(sa.table(DESTINATIONS)))
    for table, columns in COLUMNS.items():
        for name, *_ in columns:
            op.drop_column(table, name)

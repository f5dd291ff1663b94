"""Destinations, event ids, times before which events must not be sent, and traces; holds, failed tries, and an id.

A column that is nullable or has a constant default is added without a copy of the table. Every index for claims or
chores now starts with the destination. The indexes keep their names, because on MySQL statements of older versions
name them.
"""

from typing import Any
from uuid import uuid4

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql

from outbox.failures import SchemaError

revision = "outbox_0007"
down_revision = "outbox_0006"
branch_labels = None
depends_on = None

EVENTS = "observation_events"
MYSQL = ("mysql", "mariadb")
KEY = sa.BigInteger().with_variant(sa.Integer, "sqlite")
NAME = sa.Text().with_variant(sa.String(191), *MYSQL)
SHORT_TEXT = sa.Text().with_variant(sa.String(16), *MYSQL)
LONG_TEXT = sa.Text().with_variant(mysql.MEDIUMTEXT(), *MYSQL)
COLUMNS: tuple[tuple[str, Any, dict[str, Any]], ...] = (
    ("destination", NAME, {"nullable": False, "server_default": sa.text("''")}),
    ("event_id", NAME, {}),
    ("not_before_ms", sa.BigInteger(), {}),
    ("trace_context", LONG_TEXT, {}),
)
IDENTITY, HOLDS, TRIES = "observation_outbox", "observation_holds", "observation_tries"
LEDGER = "observation_destinations_ledger"

IN_ORDER = ["created_at_ms", "id", "next_attempt_at_ms", "status"]
BY_DUE_TIME = ["next_attempt_at_ms", "created_at_ms", "id", "status"]
DID_NOT_FAIL = "+status = 'pending' AND waits_for IS NULL AND next_attempt_at_ms"
FAILED = "+status = 'pending' AND waits_for IS NOT NULL"
UNDELIVERED = "status IN ('pending', 'sending') AND waits_for"
# By dialect: the columns behind the destination, and the condition of the rows.
INDEXES: dict[str, tuple[tuple[str, list[str], str | None], ...]] = {
    "sqlite": (
        ("fresh", [*IN_ORDER, "waits_for"], f"{DID_NOT_FAIL} <= created_at_ms"),
        ("tried", [*IN_ORDER, "waits_for"], f"{DID_NOT_FAIL} > created_at_ms"),
        ("due", [*BY_DUE_TIME, "waits_for"], f"{DID_NOT_FAIL} > created_at_ms"),
        ("failed", ["waits_for", *IN_ORDER], FAILED),
        ("retry", ["waits_for", *BY_DUE_TIME, "suspected_at_ms"], FAILED),
        ("sent", ["sent_at_ms", "id", "status"], "+status = 'sent'"),
        ("parked", ["created_at_ms", "id", "status"], "+status = 'parked'"),
        ("abandoned", ["created_at_ms", "id", "status"], "+status = 'abandoned'"),
    ),
    "postgresql": (
        ("claim", IN_ORDER, f"{UNDELIVERED} IS NULL"),
        ("others", [*IN_ORDER, "waits_for"], f"{UNDELIVERED} <> 'row'"),
        ("later", ["waits_for", *BY_DUE_TIME], f"{UNDELIVERED} IS NOT NULL"),
        ("lost", ["created_at_ms", "id"], "lost_leases > 0"),
        ("sent", ["sent_at_ms", "id", "status"], "status = 'sent'"),
        ("parked", ["created_at_ms", "id", "status"], "status = 'parked'"),
        ("abandoned", ["created_at_ms", "id", "status"], "status = 'abandoned'"),
    ),
    "mysql": (
        ("queue", ["status", "created_at_ms", "id", "next_attempt_at_ms"], None),
        ("waiting", ["status", "waits_for", "created_at_ms", "id", "next_attempt_at_ms"], None),
        ("delivered", ["status", "sent_at_ms", "id"], None),
    ),
}
EVENT_ID_INDEX = "observation_events_event_id_idx"
TRIES_INDEX = "observation_tries_event_idx"


def create_tables() -> None:
    create_table(IDENTITY, sa.Column("id", NAME, primary_key=True))
    create_table(
        HOLDS,
        sa.Column("destination", NAME, primary_key=True),
        sa.Column("why", LONG_TEXT, nullable=False),
        sa.Column("since_ms", sa.BigInteger, nullable=False),
        sa.Column("until_ms", sa.BigInteger),
    )
    create_table(
        TRIES,
        sa.Column("id", KEY, primary_key=True, autoincrement=True),
        sa.Column("row_id", sa.BigInteger, nullable=False),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("tried_at_ms", sa.BigInteger, nullable=False),
        sa.Column("duration_ms", sa.BigInteger, nullable=False),
        sa.Column("host", NAME, nullable=False),
        sa.Column("verdict", SHORT_TEXT, nullable=False),
        sa.Column("failure", LONG_TEXT, nullable=False),
        sqlite_autoincrement=True,
    )
    create_index(TRIES_INDEX, TRIES, ["row_id", "created_at_ms", "id"])
    create_table(
        LEDGER,
        sa.Column("destination", NAME, primary_key=True),
        sa.Column("status", SHORT_TEXT, primary_key=True),
        sa.Column("event_type", NAME, primary_key=True),
        sa.Column("reason", NAME, primary_key=True),
        sa.Column("events", sa.BigInteger, nullable=False),
    )


def create_table(name: str, *columns: Any, **options: Any) -> None:
    on_mysql = {"engine": "InnoDB", "charset": "utf8mb4", "collate": "utf8mb4_bin"}
    options.update({f"{one}_{option}": value for one in MYSQL for option, value in on_mysql.items()})
    if not is_there(name):
        op.create_table(name, *columns, **options)


def create_index(
    name: str, table: str, columns: list[str], *, rows: str | None = None, unique: bool = False
) -> None:
    if name not in columns_of_indexes(table):
        condition = None if rows is None else sa.text(rows)
        op.create_index(name, table, columns, unique=unique, sqlite_where=condition, postgresql_where=condition)


def replace_indexes(*first: str) -> None:
    """Let each index begin with these columns."""
    there = columns_of_indexes(EVENTS)
    dialect = "mysql" if op.get_context().dialect.name in MYSQL else op.get_context().dialect.name
    replaced = [
        (f"{EVENTS}_{name}_idx", [*first, *columns], rows)
        for name, columns, rows in INDEXES[dialect]
        if there.get(f"{EVENTS}_{name}_idx") != [*first, *columns]
    ]
    if dialect == "mysql":
        # In one statement: in between, statements that name an index would fail.
        changes = [f"DROP INDEX {name}, ADD INDEX {name} ({', '.join(columns)})" for name, columns, _ in replaced]
        if changes:
            op.execute(f"ALTER TABLE {EVENTS} {', '.join(changes)}")
        return
    for name, columns, rows in replaced:
        op.drop_index(name, table_name=EVENTS)
        create_index(name, EVENTS, columns, rows=rows)


# On MySQL an upgrade that failed may have done a part of this; elsewhere the version may have been lost.


def is_there(table: str) -> bool:
    return not context.is_offline_mode() and sa.inspect(op.get_bind()).has_table(table)


def columns_of_indexes(table: str) -> dict[str | None, list[str | None]]:
    if not is_there(table):
        return {}
    return {found["name"]: found["column_names"] for found in sa.inspect(op.get_bind()).get_indexes(table)}


def give_an_id() -> None:
    identity = sa.table(IDENTITY, sa.column("id", sa.Text))
    if context.is_offline_mode() or op.get_bind().scalar(sa.select(identity.c.id)) is None:
        op.execute(sa.insert(identity).values(id=str(uuid4())))


def refuse_other_destinations() -> None:
    """Keep an older version from sending the events of all destinations to one service."""
    if context.is_offline_mode():
        return
    row = sa.table(EVENTS, sa.column("destination"), sa.column("status")).c
    others = sa.select(sa.func.count(), sa.func.min(row.destination))
    events, destination = op.get_bind().execute(others.where(row.destination != "", row.status != "sent")).one()
    if events:
        raise SchemaError(
            f"{events} undelivered events belong to destinations such as {destination!a}; an older version would"
            " send them to the default destination. Deliver or purge them, then downgrade"
        )


def upgrade() -> None:
    there = [] if context.is_offline_mode() else sa.inspect(op.get_bind()).get_columns(EVENTS)
    names = {found["name"] for found in there}
    for name, type_, options in COLUMNS:
        if name not in names:
            op.add_column(EVENTS, sa.Column(name, type_, **options))
    create_index(EVENT_ID_INDEX, EVENTS, ["destination", "event_id"], rows="event_id IS NOT NULL", unique=True)
    replace_indexes("destination")
    create_tables()
    give_an_id()


def downgrade() -> None:
    """Leave the id and the ledger: what was counted stays known. A later upgrade goes on with them."""
    refuse_other_destinations()
    replace_indexes()
    op.drop_index(EVENT_ID_INDEX, table_name=EVENTS)
    for name, *_ in COLUMNS:
        op.drop_column(EVENTS, name)
    op.drop_table(HOLDS)
    op.drop_table(TRIES)

"""When a row was revived, and an index for each order in which rows are taken.

The claim's index holds the undelivered rows alone, in the order of the claim and with the due time in it: a claim
looks at nothing else. MySQL has no partial indexes: there each order has an index that starts with the status.
"""

import sqlalchemy as sa
from alembic import context, op

revision = "outbox_0002"
down_revision = "outbox_0001"
branch_labels = None
depends_on = None

INDEXES = (
    (
        "observation_events_claim_idx",
        ["created_at_ms", "id", "next_attempt_at_ms", "status"],
        "status IN ('pending', 'sending')",
    ),
    ("observation_events_sent_idx", ["sent_at_ms", "id"], "status = 'sent'"),
    ("observation_events_parked_idx", ["created_at_ms", "id"], "status = 'parked'"),
    ("observation_events_abandoned_idx", ["created_at_ms", "id"], "status = 'abandoned'"),
)

INDEXES_ON_MYSQL = (
    ("observation_events_queue_idx", ["status", "created_at_ms", "id", "next_attempt_at_ms"], ""),
    ("observation_events_delivered_idx", ["status", "sent_at_ms", "id"], ""),
)


def indexes() -> tuple[tuple[str, list[str], str], ...]:
    return INDEXES_ON_MYSQL if op.get_context().dialect.name in ("mysql", "mariadb") else INDEXES


def upgrade() -> None:
    columns, present = set(), set()
    if not context.is_offline_mode():  # on MySQL an upgrade that failed may have done half of this
        inspector = sa.inspect(op.get_bind())
        columns = {column["name"] for column in inspector.get_columns("observation_events")}
        present = {index["name"] for index in inspector.get_indexes("observation_events")}
    if "revived_at_ms" not in columns:
        op.add_column("observation_events", sa.Column("revived_at_ms", sa.BigInteger))
    for name, indexed, rows in indexes():
        if name not in present:
            op.create_index(
                name,
                "observation_events",
                indexed,
                # The plus keeps SQLite's planner from the baseline's status index, which it would always take.
                sqlite_where=sa.text(f"+{rows}"),
                postgresql_where=sa.text(rows),
            )


def downgrade() -> None:
    for name, *_ in indexes():
        op.drop_index(name, table_name="observation_events")
    op.drop_column("observation_events", "revived_at_ms")

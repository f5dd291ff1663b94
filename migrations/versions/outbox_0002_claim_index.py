"""When a row was revived, and an index for each order in which rows are taken.

The claim's index holds the undelivered rows alone, in the order of the claim and with the due time in it: a claim
looks at nothing else.
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


def upgrade() -> None:
    if context.is_offline_mode() or "revived_at_ms" not in {
        column["name"] for column in sa.inspect(op.get_bind()).get_columns("observation_events")
    }:
        op.add_column("observation_events", sa.Column("revived_at_ms", sa.BigInteger))
    for name, columns, rows in INDEXES:
        op.create_index(
            name,
            "observation_events",
            columns,
            if_not_exists=True,
            # The plus keeps SQLite's planner from the baseline's status index, which it would always take.
            sqlite_where=sa.text(f"+{rows}"),
            postgresql_where=sa.text(rows),
        )


def downgrade() -> None:
    for name, *_ in INDEXES:
        op.drop_index(name, table_name="observation_events")
    op.drop_column("observation_events", "revived_at_ms")

"""On SQLite, indexes that find what is due at the same cost, however many rows wait and whatever they wait for.

An index in the order of the claim has to be walked past every older row that is backed off. So rows that were
never tried have one of their own, which a claim walks from its start. Rows that were tried before have two: one
in the order of the claim, which serves while its head is due, and one by the due time, which serves while few are
due. The status stands in each, for a claim compares it, and so needs to look at nothing else.
"""

import sqlalchemy as sa
from alembic import op

revision = "outbox_0005"
down_revision = "outbox_0004"
branch_labels = None
depends_on = None

TABLE = "observation_events"
WAITING = "+status = 'pending' AND next_attempt_at_ms"
INDEXES = (
    (
        "observation_events_fresh_idx",
        ["created_at_ms", "id", "next_attempt_at_ms", "status"],
        f"{WAITING} <= created_at_ms",
    ),
    (
        "observation_events_tried_idx",
        ["created_at_ms", "id", "next_attempt_at_ms", "status"],
        f"{WAITING} > created_at_ms",
    ),
    (
        "observation_events_due_idx",
        ["next_attempt_at_ms", "created_at_ms", "id", "status"],
        f"{WAITING} > created_at_ms",
    ),
)
REPLACED = (
    "observation_events_claim_idx",
    ["created_at_ms", "id", "next_attempt_at_ms", "status"],
    "+status IN ('pending', 'sending')",
)


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        for name, columns, rows in INDEXES:
            op.create_index(name, TABLE, columns, sqlite_where=sa.text(rows), if_not_exists=True)
        op.drop_index(REPLACED[0], table_name=TABLE)


def downgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        name, columns, rows = REPLACED
        op.create_index(name, TABLE, columns, sqlite_where=sa.text(rows))
        for name, *_ in INDEXES:
            op.drop_index(name, table_name=TABLE)

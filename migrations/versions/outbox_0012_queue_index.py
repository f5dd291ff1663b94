"""On MariaDB and MySQL, the index of the queue has no status, and finds events whose senders died.

Both this index and that of the waiting events began with the status, so each claim and each delivery moved its
events in both. The index of the waiting events serves the queries of both. An index of this name stays, because
programs of older versions name it in their queries.
"""

import sqlalchemy as sa
from alembic import context, op

revision = "outbox_0012"
down_revision = "outbox_0011"
branch_labels = None
depends_on = None

TABLE = "observation_events"
INDEX = "observation_events_queue_idx"
COLUMNS = ["destination", "lost_leases", "created_at_ms", "id"]
REPLACED = ["destination", "status", "created_at_ms", "id", "next_attempt_at_ms"]


def replace(columns: list[str]) -> None:
    if op.get_context().dialect.name not in ("mysql", "mariadb"):
        return
    if not context.is_offline_mode():
        there = {found["name"]: found["column_names"] for found in sa.inspect(op.get_bind()).get_indexes(TABLE)}
        if there[INDEX] == columns:  # an earlier upgrade failed after this step
            return
    # In one statement, because queries of older versions name the index, and fail while it is missing.
    op.execute(f"ALTER TABLE {TABLE} DROP INDEX {INDEX}, ADD INDEX {INDEX} ({', '.join(columns)})")


def upgrade() -> None:
    replace(COLUMNS)


def downgrade() -> None:
    replace(REPLACED)

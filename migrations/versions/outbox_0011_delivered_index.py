"""On MariaDB and MySQL, the index of delivered events has no status.

The index holds all events, because there are no partial indexes. With the status in it, each claim moved its
events in it.
"""

import sqlalchemy as sa
from alembic import context, op

revision = "outbox_0011"
down_revision = "outbox_0010"
branch_labels = None
depends_on = None

TABLE = "observation_events"
INDEX = "observation_events_delivered_idx"
COLUMNS = ["destination", "sent_at_ms", "id"]
REPLACED = ["destination", "status", "sent_at_ms", "id"]


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

"""On SQLite, a small index of the events that are being sent replaces one of all events by their status.

Each claim and each delivery moved its events in the index of all events, which took a third of the time. difflore
created that index, and creates it again when it opens the file.
"""

import sqlalchemy as sa
from alembic import op

revision = "outbox_0010"
down_revision = "outbox_0009"
branch_labels = None
depends_on = None

TABLE = "observation_events"
CREATED = "observation_events_sending_idx"
DROPPED = "observation_events_pending_idx"


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        columns = ["destination", "next_attempt_at_ms", "created_at_ms", "id", "status", "waits_for"]
        op.create_index(CREATED, TABLE, columns, sqlite_where=sa.text("+status = 'sending'"), if_not_exists=True)
        op.drop_index(DROPPED, table_name=TABLE, if_exists=True)


def downgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        op.create_index(DROPPED, TABLE, ["status", "next_attempt_at_ms", "created_at_ms"], if_not_exists=True)
        op.drop_index(CREATED, table_name=TABLE)

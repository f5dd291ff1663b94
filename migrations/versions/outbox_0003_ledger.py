"""The ledger: how many events were deleted, by status, event type and reason."""

import sqlalchemy as sa
from alembic import context, op

revision = "outbox_0003"
down_revision = "outbox_0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if not context.is_offline_mode() and sa.inspect(op.get_bind()).has_table("observation_events_ledger"):
        return
    name = sa.Text().with_variant(sa.String(191), "mysql", "mariadb")
    op.create_table(
        "observation_events_ledger",
        sa.Column("status", name, primary_key=True),
        sa.Column("event_type", name, primary_key=True),
        sa.Column("reason", name, primary_key=True),
        sa.Column("events", sa.BigInteger, nullable=False),
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        mariadb_engine="InnoDB",
        mariadb_charset="utf8mb4",
        mariadb_collate="utf8mb4_bin",
    )


def downgrade() -> None:
    """Leave the ledger: what was counted stays known. A later upgrade goes on with it."""

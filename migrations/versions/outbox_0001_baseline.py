"""The table of events, as difflore's observation uploader creates it.

A database that already holds the table is adopted: nothing in it changes, it is only stamped. Its indexes are for
SQLite alone: on servers the first one leads planners astray, and the second one can't hold a long session.
"""

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql

from outbox.failures import SchemaError

revision = "outbox_0001"
down_revision = None
branch_labels = None
depends_on = None

COLUMNS = (
    "id",
    "event_type",
    "rule_id",
    "rule_ids_json",
    "session_id",
    "file_path",
    "occurred_at_ms",
    "payload_json",
    "status",
    "retry_count",
    "next_attempt_at_ms",
    "last_error",
    "created_at_ms",
    "sent_at_ms",
)


def upgrade() -> None:
    if not context.is_offline_mode():
        inspector = sa.inspect(op.get_bind())
        if inspector.has_table("observation_events"):
            present = {column["name"] for column in inspector.get_columns("observation_events")}
            missing = [name for name in COLUMNS if name not in present]
            if missing:
                raise SchemaError(f"the table observation_events is there, but without {', '.join(missing)}")
            return
    dialect = op.get_context().dialect.name
    is_mysql = dialect in ("mysql", "mariadb")
    key = sa.BigInteger().with_variant(sa.Integer, "sqlite")
    name = sa.String(191) if is_mysql else sa.Text()
    text = mysql.MEDIUMTEXT() if is_mysql else sa.Text()
    default = "({})" if is_mysql else "{}"
    op.create_table(
        "observation_events",
        sa.Column("id", key, primary_key=True, autoincrement=True),
        sa.Column("event_type", name, nullable=False),
        sa.Column("rule_id", text),
        sa.Column("rule_ids_json", text, nullable=False, server_default=sa.text(default.format("'[]'"))),
        sa.Column("session_id", text, nullable=False, server_default=sa.text(default.format("''"))),
        sa.Column("file_path", text),
        sa.Column("occurred_at_ms", sa.BigInteger, nullable=False),
        sa.Column("payload_json", text, nullable=False),
        sa.Column("status", name, nullable=False, server_default=sa.text("'pending'")),
        sa.Column("retry_count", sa.Integer, nullable=False, server_default=sa.text("0")),
        sa.Column("next_attempt_at_ms", sa.BigInteger, nullable=False, server_default=sa.text("0")),
        sa.Column("last_error", text),
        sa.Column("created_at_ms", sa.BigInteger, nullable=False),
        sa.Column("sent_at_ms", sa.BigInteger),
        sa.CheckConstraint(
            "status IN ('pending', 'sending', 'sent', 'parked', 'abandoned')",
            name="observation_events_status_check",
        ),
        sqlite_autoincrement=True,
        mysql_engine="InnoDB",
        mysql_charset="utf8mb4",
        mysql_collate="utf8mb4_bin",
        mariadb_engine="InnoDB",
        mariadb_charset="utf8mb4",
        mariadb_collate="utf8mb4_bin",
    )
    if dialect == "sqlite":
        op.create_index(
            "observation_events_pending_idx",
            "observation_events",
            ["status", "next_attempt_at_ms", "created_at_ms"],
        )
        op.create_index(
            "observation_events_recent_idx", "observation_events", ["event_type", "session_id", "occurred_at_ms"]
        )


def downgrade() -> None:
    """Leave the table: it may be difflore's, and it holds events. A later upgrade adopts it again."""

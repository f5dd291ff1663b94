"""The services that are paused; and on PostgreSQL, settings of a table whose rows come and go."""

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import mysql

revision = "outbox_0004"
down_revision = "outbox_0003"
branch_labels = None
depends_on = None

# By the server's defaults a table of millions of delivered rows waits until a fifth of it is dead, and is then
# cleaned slowly. A fillfactor would be wasted: every move changes what the partial indexes select by, so no update
# is HOT.
SETTINGS = {"autovacuum_vacuum_scale_factor": "0.01", "autovacuum_vacuum_cost_delay": "0"}


def upgrade() -> None:
    if context.is_offline_mode() or not sa.inspect(op.get_bind()).has_table("observation_destinations"):
        name = sa.Text().with_variant(sa.String(191), "mysql", "mariadb")
        op.create_table(
            "observation_destinations",
            sa.Column("destination", name, primary_key=True),
            sa.Column("failures", sa.Integer, nullable=False),
            sa.Column("paused_until_ms", sa.BigInteger, nullable=False),
            sa.Column("probe_until_ms", sa.BigInteger, nullable=False),
            sa.Column(
                "last_error", sa.Text().with_variant(mysql.MEDIUMTEXT(), "mysql", "mariadb"), nullable=False
            ),
            mysql_engine="InnoDB",
            mysql_charset="utf8mb4",
            mysql_collate="utf8mb4_bin",
            mariadb_engine="InnoDB",
            mariadb_charset="utf8mb4",
            mariadb_collate="utf8mb4_bin",
        )
    if op.get_context().dialect.name == "postgresql":
        changed = ", ".join(f"{name} = {value}" for name, value in SETTINGS.items())
        op.execute(f"ALTER TABLE observation_events SET ({changed})")


def downgrade() -> None:
    if op.get_context().dialect.name == "postgresql":
        op.execute(f"ALTER TABLE observation_events RESET ({', '.join(SETTINGS)})")
    op.drop_table("observation_destinations")

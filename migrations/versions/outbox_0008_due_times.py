"""On servers, indexes that find what is due at the same cost, however many events wait for a time.

On PostgreSQL, three indexes replace the one for claims: one of events that were never tried; two of events that
wait for a time or were brought back, in the order of a claim and by the due time. MySQL gets one by the due time.
"""

import sqlalchemy as sa
from alembic import context, op

revision = "outbox_0008"
down_revision = "outbox_0007"
branch_labels = None
depends_on = None

TABLE = "observation_events"
IN_ORDER = ["destination", "created_at_ms", "id", "next_attempt_at_ms", "status"]
PENDING = "status = 'pending' AND waits_for IS NULL AND next_attempt_at_ms"
# By dialect: the columns, and the condition of the rows.
CREATED: dict[str, tuple[tuple[str, list[str], str | None], ...]] = {
    "postgresql": (
        ("untried", IN_ORDER, f"{PENDING} <= created_at_ms"),
        ("again", IN_ORDER, f"{PENDING} > created_at_ms"),
        (
            "timed",
            ["destination", "status", "next_attempt_at_ms", "created_at_ms", "id"],
            f"waits_for IS NULL AND (status = 'sending' OR ({PENDING} > created_at_ms))",
        ),
    ),
    "mysql": (
        (
            "times",
            ["destination", "status", "waits_for", "next_attempt_at_ms", "created_at_ms", "id"],
            None,
        ),
    ),
}
REPLACED: dict[str, tuple[tuple[str, list[str], str | None], ...]] = {
    "postgresql": (("claim", IN_ORDER, "status IN ('pending', 'sending') AND waits_for IS NULL"),),
}


def dialect() -> str:
    name = op.get_context().dialect.name
    return "mysql" if name == "mariadb" else name


def present() -> set[str | None]:
    # On MySQL an upgrade that failed may have done a part of this; elsewhere the version may have been lost.
    if context.is_offline_mode():
        return set()
    return {found["name"] for found in sa.inspect(op.get_bind()).get_indexes(TABLE)}


def create(indexes: tuple[tuple[str, list[str], str | None], ...]) -> None:
    there = present()
    for name, columns, rows in indexes:
        if f"{TABLE}_{name}_idx" not in there:
            condition = None if rows is None else sa.text(rows)
            op.create_index(f"{TABLE}_{name}_idx", TABLE, columns, postgresql_where=condition)


def drop(indexes: tuple[tuple[str, list[str], str | None], ...]) -> None:
    there = present()
    for name, *_ in indexes:
        if context.is_offline_mode() or f"{TABLE}_{name}_idx" in there:
            op.drop_index(f"{TABLE}_{name}_idx", table_name=TABLE)


def upgrade() -> None:
    # The old index is dropped last: PostgreSQL lets others read the table while the new ones are built.
    create(CREATED.get(dialect(), ()))
    drop(REPLACED.get(dialect(), ()))


def downgrade() -> None:
    create(REPLACED.get(dialect(), ()))
    drop(CREATED.get(dialect(), ()))

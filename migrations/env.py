"""Run the migrations: on the connection that is handed over, or on a database named on the command line."""

import os

from alembic import context
from sqlalchemy import Connection, Index
from sqlalchemy.schema import SchemaItem

from outbox.schema import include_name
from outbox.storage.dialects import dialect_of
from outbox.storage.engines import default_url, migrating, open_engine
from outbox.storage.tables import VERSION_TABLE, Base, ObservationEvent


def run(connection: Connection) -> None:
    def is_meant_for_it(item: SchemaItem, *_: object) -> bool:
        if not isinstance(item, Index) or item.table is None or item.table.name != ObservationEvent.__tablename__:
            return True
        return item.name in dialect_of(connection).indexes

    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        version_table=VERSION_TABLE,
        include_name=include_name,
        include_object=is_meant_for_it,
    )
    with context.begin_transaction():
        context.run_migrations()


def named_url() -> str:
    named = context.get_x_argument(as_dictionary=True).get("database")
    return (
        named
        or os.environ.get("OUTBOX_DATABASE_URL")
        or context.config.get_main_option("sqlalchemy.url")
        or default_url().render_as_string(hide_password=False)
    )


if context.is_offline_mode():
    context.configure(url=named_url(), version_table=VERSION_TABLE, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif (handed_over := context.config.attributes.get("connection")) is not None:
    run(handed_over)
else:
    engine = open_engine(named_url())
    dialect_of(engine).create_file(engine.url)
    with migrating(engine) as own:
        run(own)
    engine.dispose()

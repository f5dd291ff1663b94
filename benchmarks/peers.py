"""Other libraries, each with what comes nearest to our enqueue and drain."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import asyncpg
from huey import SqliteHuey
from litequeue import LiteQueue
from persistqueue import SQLiteAckQueue
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode
from procrastinate import App, PsycopgConnector, SyncPsycopgConnector

logging.getLogger("procrastinate").setLevel(logging.ERROR)
logging.getLogger("pgqueuer").setLevel(logging.ERROR)


class Huey:
    """Its queue holds pickled tasks; a task that is taken is deleted, so it is lost when the worker dies."""

    name = "huey"

    def __init__(self, path: Path, synchronous: str) -> None:
        self._huey = SqliteHuey("bench", filename=str(path), fsync=True, results=False)
        self._huey.storage.conn.execute(f"PRAGMA synchronous = {synchronous}")
        self.put: Callable[[str], object] = self._huey.task()(_nothing)

    def drain(self) -> None:
        while (task := self._huey.dequeue()) is not None:
            self._huey.execute(task)

    def close(self) -> None:
        self._huey.storage.close()


class PersistQueue:
    name = "persist-queue"

    def __init__(self, path: Path, synchronous: str) -> None:
        self._queue = SQLiteAckQueue(str(path.parent), multithreading=True)
        for connection in (self._queue._getter, self._queue._putter):  # noqa: SLF001 - it has no setting for it
            connection.execute(f"PRAGMA synchronous = {synchronous}")
        self.put = self._queue.put

    def drain(self) -> None:
        for _ in range(self._queue.size):
            self._queue.ack(self._queue.get())

    def close(self) -> None:
        self._queue.close()


class Lite:
    name = "litequeue"

    def __init__(self, path: Path, synchronous: str) -> None:
        self._queue = LiteQueue(str(path))
        self._queue.conn.execute(f"PRAGMA synchronous = {synchronous}")
        self.put = self._queue.put

    def drain(self) -> None:
        while (message := self._queue.pop()) is not None:
            self._queue.done(message.message_id)

    def close(self) -> None:
        self._queue.close()


ON_SQLITE = (Huey, PersistQueue, Lite)


def _nothing(payload: str) -> None:
    """What the tasks do: an upload that costs nothing."""


class Procrastinate:
    name = "procrastinate"

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        with App(connector=SyncPsycopgConnector(conninfo=conninfo)).open() as app:
            app.schema_manager.apply_schema()

    def put_each(self, payloads: Iterable[str]) -> None:
        with App(connector=SyncPsycopgConnector(conninfo=self._conninfo)).open() as app:
            task = app.task(name="upload")(_nothing)
            for payload in payloads:
                task.defer(payload=payload)

    def put_many(self, payloads: Iterable[str]) -> None:
        with App(connector=SyncPsycopgConnector(conninfo=self._conninfo)).open() as app:
            app.task(name="upload")(_nothing).batch_defer(*({"payload": payload} for payload in payloads))

    def drain(self) -> None:
        app = App(connector=PsycopgConnector(conninfo=self._conninfo))

        @app.task(name="upload")
        async def upload(payload: str) -> None:
            pass

        app.run_worker(wait=False, concurrency=16, listen_notify=False, install_signal_handlers=False)


class Pgqueuer:
    name = "pgqueuer"

    def __init__(self, conninfo: str) -> None:
        self._conninfo = conninfo
        self._run(lambda queries, _: queries.install())

    def put_each(self, payloads: Iterable[str]) -> None:
        async def put(queries: Queries, _: Any) -> None:
            for payload in payloads:
                await queries.enqueue("upload", payload.encode())

        self._run(put)

    def put_many(self, payloads: Iterable[str]) -> None:
        encoded = [payload.encode() for payload in payloads]
        self._run(lambda queries, _: queries.enqueue(["upload"] * len(encoded), encoded, [0] * len(encoded)))

    def drain(self) -> None:
        async def drain(_: Queries, connection: Any) -> None:
            queue = PgQueuer.from_asyncpg_connection(connection)

            @queue.entrypoint("upload")
            async def upload(job: object) -> None:
                pass

            await queue.qm.run(batch_size=64, mode=QueueExecutionMode.drain)

        self._run(drain)

    def _run(self, operation: Callable[[Queries, Any], Any]) -> None:
        async def run() -> None:
            connection = await asyncpg.connect(self._conninfo)
            try:
                await operation(Queries(AsyncpgDriver(connection)), connection)
            finally:
                await connection.close()

        asyncio.run(run())


ON_POSTGRESQL = (Procrastinate, Pgqueuer)

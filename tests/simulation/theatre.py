"""What the theatres of all databases have in common: seats for the processes, and connections that stop at each step."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from sqlalchemy import Engine, create_engine, event

from outbox.storage.engines import open_engine

from .facts import Violation
from .stage import AFTER_COMMIT, BEFORE_COMMIT, Fault, Process


class Stopping:
    """A driver's connection that stops at every step, may be told to fail, and shows the model what it commits."""

    seat: Seat | None = None

    @property
    def process(self) -> Process | None:
        return self.seat.process if self.seat else None

    def fail(self, fault: Fault) -> None:
        """Raise what the driver raises for it."""
        raise NotImplementedError

    def fail_if_told(self, process: Process, step: str) -> None:
        fault = process.stage.director.database_fault(process, step)
        if fault is not None:
            self._note_and_fail(process, fault)

    def commit_in_steps(self, process: Process, commit: Callable[[], None], *, wrote: bool) -> None:
        process.pause(BEFORE_COMMIT)
        self.fail_if_told(process, "COMMIT")
        commit()
        if wrote:
            try:
                process.stage.model.observe(process, process.stage)
            except Violation as violation:
                process.stage.fail(violation)
        process.pause(AFTER_COMMIT)
        fault = process.stage.director.lost_commit(process) if wrote else None
        if fault is not None:
            process.operation.commit_lost = True
            self._note_and_fail(process, fault)

    def _note_and_fail(self, process: Process, fault: Fault) -> None:
        process.operation.troubled = process.operation.gives_back = True
        process.stage.note(process.name, "fails", fault.message)
        self.fail(fault)


class Seat:
    """An engine that outlives the runs, for its statements are compiled once only."""

    def __init__(self, engine: Engine, connect: Callable[..., Any]) -> None:
        self.engine = engine
        self.process: Process | None = None
        self._connect_to = connect
        self._connections: list[Any] = []
        event.listen(engine, "do_connect", self._connect)
        with engine.connect():
            pass  # what SQLAlchemy asks at its first connection belongs to no run
        self.close_connections()

    def close_connections(self) -> None:
        if self._connections:
            for connection in self._connections:
                connection.close()
            self._connections.clear()
            self.engine.dispose()

    def _connect(self, _dialect: object, _record: object, arguments: Any, options: dict[str, Any]) -> Any:
        connection = self._connect_to(*arguments, **options)
        connection.seat = self
        self._connections.append(connection)
        return connection


class Theatre:
    """One database, used again and again, and the seats at it."""

    is_shared = False
    """Whether it is a server."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._seats: dict[tuple[str, bool], Seat] = {}

    def seat(self, name: str, *, of_host: bool = False) -> Seat:
        """Return the seat of that name; a host's engine has SQLAlchemy's settings, not ours."""
        key = name, of_host
        if key not in self._seats:
            engine = create_engine(self._url) if of_host else open_engine(self._url)
            self._seats[key] = Seat(engine, self.connect)
        return self._seats[key]

    def connect(self, *arguments: Any, **options: Any) -> Any:
        """Return a connection for a seat."""
        raise NotImplementedError

    def empty_database(self) -> AbstractContextManager[Any]:
        """Put an empty database in place; yield a driver's connection that watches it."""
        raise NotImplementedError

    def _leave_seats(self) -> None:
        for seat in self._seats.values():
            seat.close_connections()

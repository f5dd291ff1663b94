"""A connection to the database that is cut during a commit: the result is found out, or said to be unknown."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from sqlalchemy import make_url

from builders import rule_fired
from outbox import Outbox, OutcomeUnknown, StorageError

pytestmark = pytest.mark.servers


class Cut:
    """A way to a database server on loopback that ends once, when a commit comes by: before or behind the server.

    PostgreSQL commits an INSERT that stands alone by itself. There, an INSERT has a notification.
    """

    def __init__(self, host: str, port: int, *, before: bool) -> None:
        self._server = (host, port)
        self.before = before
        self.is_armed = False
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for one in self._open:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                self._open += [client, server]
                is_lost = threading.Event()
                for way in (
                    (self._to_server, client, server, is_lost),
                    (self._to_client, server, client, is_lost),
                ):
                    self._threads.append(threading.Thread(target=way[0], args=way[1:]))
                    self._threads[-1].start()

    def _to_server(self, client: socket.socket, server: socket.socket, is_lost: threading.Event) -> None:
        with suppress(OSError):
            while told := client.recv(65_536):
                if self.is_armed and re.search(b"COMMIT(?!TED)|pg_notify", told):
                    self.is_armed = False
                    self.cuts += 1
                    is_lost.set()
                    if self.before:
                        break
                server.sendall(told)
        _end(client, server)

    def _to_client(self, server: socket.socket, client: socket.socket, is_lost: threading.Event) -> None:
        with suppress(OSError):
            while (answer := server.recv(65_536)) and not is_lost.is_set():
                client.sendall(answer)
        _end(client, server)


def _end(*connections: socket.socket) -> None:
    for one in connections:
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


@pytest.fixture(params=["before the server got it", "after the server got it"])
def cut(request: pytest.FixtureRequest, url: str) -> Iterator[Cut]:
    there = make_url(url)
    way = Cut(there.host or "127.0.0.1", there.port or 0, before=request.param.startswith("before"))
    yield way
    way.close()


@pytest.fixture
def cut_off(outbox: Outbox, url: str, cut: Cut) -> Iterator[Outbox]:
    """An outbox behind the cut."""
    with Outbox(make_url(url).set(host="127.0.0.1", port=cut.port)) as behind:
        behind.enqueue(rule_fired())
        cut.is_armed = True
        yield behind
    assert cut.cuts == 1


def test_without_an_id_the_outcome_is_unknown(outbox: Outbox, cut_off: Outbox, cut: Cut) -> None:
    with pytest.raises(
        OutcomeUnknown, match="broke during the commit, it is not known whether that was done"
    ) as told:
        cut_off.enqueue(rule_fired())
    assert isinstance(told.value, StorageError)
    assert outbox.pending_count() == 1 + (not cut.before)


def test_with_an_id_the_event_is_recorded_once(outbox: Outbox, cut_off: Outbox) -> None:
    row_id = cut_off.enqueue(rule_fired(), event_id="order-17")
    assert [found.id for found in outbox.find() if found.event_id == "order-17"] == [row_id]

"""MariaDB as a Galera cluster of three servers, with haproxy in front."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Connection

from builders import ScriptedClient, rule_fired, statuses
from crowd import Crowd
from outbox import Outbox
from rigs.galera import Cluster, cluster
from rigs.load import IS_FULL, SHORT_LEASE, Load, events
from servers import MissingError, skip

pytestmark = [pytest.mark.rig, pytest.mark.slow]


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    try:
        with cluster() as started:
            yield started
    except MissingError as missing:
        skip(missing)


@pytest.fixture
def three(running: Cluster) -> Cluster:
    """A cluster without an outbox."""
    running.empty()
    return running


def test_eight_upgrades_at_once_on_three_servers_succeed(three: Cluster) -> None:
    for _ in range(6 if IS_FULL else 1):
        three.empty()
        crowd = Crowd()
        for number in range(8):
            crowd.start(str(number), lambda url=three.urls[number % 3]: Outbox.open(url).close())
        assert crowd.join() == dict.fromkeys(map(str, range(8)))


def start(load: Load, three: Cluster) -> None:
    Outbox.open(three.urls[0]).close()
    for number in range(3):
        load.enqueue(three.urls[number], f"e{number}", every_s=0.02)
    for number in range(6):
        load.flush(three.urls[number % 3], f"f{number}")
    load.until_more(events(60, 300))


def test_a_cluster_that_loses_a_server_loses_no_event(three: Cluster) -> None:
    load = Load(SHORT_LEASE)
    start(load, three)
    three.nodes[2].kill()
    load.until_more(events(60, 300))
    three.nodes[2].rejoin()
    load.until_more(events(60, 300))
    load.enough()
    load.until_sent(three.urls[0])
    load.show("Galera, a server killed and joined again")
    assert load.errors == []
    assert load.uploaded == dict.fromkeys(load.accepted, 1)


def test_a_cluster_with_an_isolated_server_loses_no_event(three: Cluster) -> None:
    load = Load(SHORT_LEASE)
    start(load, three)
    three.nodes[2].isolate()
    load.until_more(events(60, 300))
    three.nodes[2].come_back()
    load.until_more(events(60, 300))
    load.enough()
    load.until_sent(three.urls[0])
    load.show("Galera, a server isolated")
    assert load.errors == []
    assert not load.lost


def test_behind_a_round_robin_no_row_waits_for_the_end_of_its_lease(three: Cluster) -> None:
    load = Load()
    Outbox.open(three.urls[0]).close()
    with Outbox(three.round_robin) as shared:  # so that a thread seldom claims and settles by the same connection
        for number in range(3):
            load.enqueue(three.round_robin, f"e{number}", events(40, 1_000))
        for number in range(6):
            load.flush(shared, f"f{number}")
        load.until_sent(three.urls[0])
    load.show("Galera behind a round robin")
    assert load.errors == []
    assert load.uploaded == dict.fromkeys(load.accepted, 1)


def port(connection: Connection) -> int:
    return connection.exec_driver_sql("SELECT @@port").scalar_one()


def test_an_outcome_finds_its_row_on_a_server_that_is_behind(three: Cluster) -> None:
    held: list[Connection] = []

    def settle_elsewhere(_batch) -> None:
        held.append(outbox.engine.connect())  # the only connection: the next one leads to the next server

    Outbox.open(three.round_robin).close()
    with Outbox(three.round_robin) as outbox:
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient())
        with outbox.engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE much (id INT PRIMARY KEY, text CHAR(200))")
            connection.exec_driver_sql("INSERT INTO much SELECT seq, 'x' FROM seq_1_to_100000")
        outbox.enqueue(rule_fired())
        outbox.flush(ScriptedClient(settle_elsewhere))
        with outbox.engine.connect() as settled:
            assert port(settled) != port(held[0])
        held[0].close()
        assert statuses(outbox) == ["sent", "sent"]

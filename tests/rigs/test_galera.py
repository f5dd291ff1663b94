"""MariaDB as a Galera cluster of three servers, with haproxy in front."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from crowd import Crowd
from outbox import Outbox
from rigs.galera import Cluster, cluster
from rigs.load import IS_FULL, Load, events
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


def start(load: Load, three: Cluster, urls: list[str]) -> None:
    Outbox.open(three.urls[0]).close()
    for number in range(3):
        load.enqueue(urls[number], f"e{number}", 1_000, every_s=0.01)
    for number in range(6):
        load.flush(urls[number % 3], f"f{number}")
    load.until_more(events(60, 300))


def test_a_cluster_that_loses_a_server_loses_no_event(three: Cluster) -> None:
    load = Load()
    start(load, three, three.urls)
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
    load = Load()
    start(load, three, three.urls)
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
    start(load, three, [three.round_robin] * 3)
    load.until_more(events(60, 600))
    load.enough()
    load.until_sent(three.urls[0])
    load.show("Galera, round robin")
    assert load.errors == []
    assert load.uploaded == dict.fromkeys(load.accepted, 1)

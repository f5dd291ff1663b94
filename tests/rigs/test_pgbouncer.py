"""PgBouncer, which gives each transaction or each statement any of its connections."""

from __future__ import annotations

import pytest
from sqlalchemy import URL

from builders import rule_fired, statuses
from outbox import Outbox, StorageError
from rigs.load import Load, events
from servers import Servers

pytestmark = [pytest.mark.rig, pytest.mark.slow, pytest.mark.servers("postgresql")]


def test_enqueuers_and_flushers_share_the_connections_of_a_pooler(outbox: Outbox, servers: Servers) -> None:
    load = Load()
    with servers.pgbouncer(connections=3) as pooler:
        through = pooler.set(database=outbox.engine.url.database)
        for number in range(2):
            load.enqueue(through, f"e{number}", events(300, 1_500))
        for number in range(4):
            load.flush(through, f"f{number}")
        load.until_sent(outbox.engine.url)
    load.show("PgBouncer, transaction mode")
    assert load.errors == []
    assert load.uploaded == dict.fromkeys(load.accepted, 1)


def test_statement_mode_is_refused_before_anything_is_recorded(outbox: Outbox, servers: Servers) -> None:
    with servers.pgbouncer(connections=3, mode="statement") as pooler:
        through: URL = pooler.set(database=outbox.engine.url.database)
        with pytest.raises(StorageError, match="not allowed in statement pooling mode"), Outbox(through) as opened:
            opened.enqueue(rule_fired())
    assert statuses(outbox) == []

"""A PostgreSQL primary and its standby."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from conditions import until
from servers import PrivatePostgresql, Server

# So many looks at a server in a row tell that nobody writes any more.
_LOOKS = 50


class Standby(PrivatePostgresql):
    """A PostgreSQL that follows a primary until it is promoted."""

    def __init__(self, primary: PrivatePostgresql) -> None:
        super().__init__()
        self._primary = primary

    def _fill(self) -> None:
        name = f"host=127.0.0.1 port={self._primary._port} user=postgres application_name=standby"
        backup = self._initdb.with_name("pg_basebackup")
        self._run(backup, "-d", name, "-D", self.data, "-R", "-c", "fast", "-X", "stream", "--no-sync")

    def promote(self) -> None:
        self._run(self._pg_ctl, "-D", self.data, "-w", "promote")


class Pair:
    """A primary and its standby. The URL names both, and leads to the one that takes writes."""

    def __init__(self, primary: PrivatePostgresql, standby: Standby) -> None:
        self._primary = primary
        self._standby = standby
        hosts = "&".join(f"host=127.0.0.1:{one._port}" for one in (primary, standby))
        self.url = f"postgresql+psycopg://postgres@/postgres?{hosts}&target_session_attrs=read-write"
        self.standby_url = standby.url
        self.promote = standby.promote

    def catch_up(self) -> None:
        """Wait until the standby has all that the primary has now."""
        with closing(Server("postgresql", self._primary.url)) as primary:
            self._wait_for(_value(primary, "SELECT pg_current_wal_lsn()"))

    def _wait_for(self, position: str) -> None:
        # The primary may write more by itself, such as a checkpoint, so the standby may be ahead of the position.
        with closing(Server("postgresql", self._standby.url)) as standby:
            until(lambda: _value(standby, f"SELECT pg_last_wal_replay_lsn() >= '{position}'"))

    def make_synchronous(self) -> None:
        """Let each commit wait for the standby."""
        with closing(Server("postgresql", self._primary.url)) as primary:
            primary.run("ALTER SYSTEM SET synchronous_standby_names = 'standby'")
            primary.run("SELECT pg_reload_conf()")
            until(lambda: _value(primary, "SELECT sync_state FROM pg_stat_replication") == "sync")

    def cut(self) -> None:
        """Let the standby hear nothing more of the primary."""
        with closing(Server("postgresql", self._standby.url)) as standby:
            standby.run("ALTER SYSTEM SET primary_conninfo = ''")
            standby.run("SELECT pg_reload_conf()")
            until(lambda: _value(standby, "SELECT count(*) FROM pg_stat_wal_receiver") == 0)
            # It waits when it has replayed all that it received. The last record may be there in part.
            waits = "SELECT wait_event FROM pg_stat_activity WHERE backend_type = 'startup'"
            until(lambda: _value(standby, waits) == "RecoveryRetrieveRetryInterval")

    def kill(self) -> None:
        """Kill all processes of the primary at once."""
        lines = (self._primary.data / "postmaster.pid").read_text().splitlines()
        main = int(lines[0])
        for process in [main, *_children(main)]:
            with suppress(ProcessLookupError):  # it ended with the first one
                os.kill(process, signal.SIGKILL)
        # It can't remove its segment of shared memory any more.
        until(lambda: subprocess.run(["ipcrm", "-m", lines[6].split()[1]], check=False).returncode == 0)

    def make_read_only(self) -> None:
        """Make the primary read-only, and let the standby catch up. Connections to the primary stay open."""
        with closing(Server("postgresql", self._primary.url)) as primary:
            primary.run("ALTER SYSTEM SET default_transaction_read_only = on")
            primary.run("SELECT pg_reload_conf()")
            seen: list[Any] = []

            def is_quiet() -> bool:
                seen.append(_value(primary, "SELECT pg_current_wal_lsn()"))
                return len(set(seen[-_LOOKS:])) == 1 and len(seen) >= _LOOKS

            until(is_quiet)
        self._wait_for(seen[-1])


@contextmanager
def pair() -> Iterator[Pair]:
    """Start a primary and its standby."""
    with PrivatePostgresql() as primary, Standby(primary) as standby:
        yield Pair(primary, standby)


def _value(server: Server, query: str) -> Any:
    found = server.run(query)
    return found[0][0] if found else None


def _children(process: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended
            # The fourth field, behind the name in parentheses, is the parent.
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == process:
                found.append(int(folder.name))
    return found

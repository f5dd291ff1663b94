"""Servers that fork their workers after they loaded the program: gunicorn, Celery, and uWSGI, which forks in C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib import error, request

import pytest

from builders import ROOT
from conditions import FOREVER_S, until
from outbox import Outbox
from outbox.testing import ScriptedServer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="these servers do not run here"),
]

# The connection is open when the server forks.
APP = """
import os
from outbox import HttpClient, Outbox, OutboxError, Worker
from builders import rule_fired

outbox = Outbox.open(os.environ["DATABASE"])
worker = Worker(outbox, HttpClient(os.environ["SERVER"], token="t"), poll_interval_ms=3_600_000)
if "STARTS" in os.environ:
    worker.start()
outbox.enqueue(rule_fired(session_id="before the fork"))

def app(environ, start_response):
    try:
        outbox.enqueue(rule_fired(session_id=environ["PATH_INFO"]))
        status, text = "200 OK", str(os.getpid())
    except OutboxError as error:
        status, text = "500 Oops", str(error)
    start_response(status, [("Content-Type", "text/plain")])
    return [text.encode()]
"""


@pytest.fixture
def environment(url: str, tmp_path: Path, server: ScriptedServer) -> dict[str, str]:
    (tmp_path / "app.py").write_text(APP)
    path = os.pathsep.join([str(tmp_path), str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": path, "DATABASE": url, "SERVER": server.url, "STARTS": ""}


def get(url: str) -> tuple[int, str]:
    try:
        with request.urlopen(url, timeout=FOREVER_S) as answer:  # noqa: S310 - our own server
            return answer.status, answer.read().decode()
    except error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


def acknowledged(address: str, processes: int) -> int:
    """Send requests until so many processes have answered; return how many were acknowledged."""
    answered_by: set[str] = set()
    requests = 0
    while len(answered_by) < processes or requests < 10:
        requests += 1
        status, text = get(f"{address}/{requests}")
        assert status == 200, text
        answered_by.add(text)
    return requests


# gunicorn


@contextmanager
def gunicorn(environment: dict[str, str], folder: Path, *options: str) -> Iterator[str]:
    command = [sys.executable, "-m", "gunicorn", "--workers", "2", "--bind", "127.0.0.1:0", *options, "app:app"]
    # Else it kills a worker that is slow to load the program, or to end.
    command[3:3] = ["--timeout", str(2 * FOREVER_S), "--graceful-timeout", str(2 * FOREVER_S)]
    log = folder / "gunicorn.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, cwd=folder, env=environment, stderr=stderr) as process,
    ):
        try:
            until(lambda: process.poll() is not None or "Listening at" in log.read_text())
            yield re.search("Listening at: (http://[0-9.:]+)", log.read_text())[1]
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(FOREVER_S)
    assert process.returncode == 0
    assert "Traceback" not in log.read_text()
    assert "can't deliver" not in log.read_text()


@pytest.mark.contract
@pytest.mark.programs
@pytest.mark.parametrize("options", [["--preload"], []])
def test_gunicorns_workers_record_and_deliver(
    outbox: Outbox, environment, tmp_path: Path, options: list[str], server
) -> None:
    with gunicorn(environment, tmp_path, *options) as address:
        count = acknowledged(address, processes=2)
        until(lambda: len(server.stored) >= count + 1)


@pytest.mark.parametrize("options", [["--preload"], []])
@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_gunicorns_workers_of_other_kinds_record_and_deliver(
    outbox: Outbox, environment, tmp_path: Path, kind: str, options: list[str], server
) -> None:
    with gunicorn(environment, tmp_path, "--worker-class", kind, "--threads", "4", *options) as address:
        count = acknowledged(address, processes=2)
        until(lambda: len(server.stored) >= count + 1)


# uWSGI


@contextmanager
def uwsgi(environment: dict[str, str], folder: Path, *options: str, is_daemon: bool = False) -> Iterator[str]:
    pytest.importorskip("pyuwsgi")
    out, log, pid = (folder / f"uwsgi.{name}" for name in ("out", "log", "pid"))
    settings = {
        "--module": "app:app",
        "--http-socket": "127.0.0.1:0",
        "--processes": "2",
        "--safe-pidfile": str(pid),
        "--daemonize2" if is_daemon else "--logto": str(log),
    }
    arguments = [*sum(settings.items(), ()), "--master", "--enable-threads", "--need-app", *options]
    command = [sys.executable, "-c", "import sys, pyuwsgi; pyuwsgi.run(sys.argv[1:])", *arguments]

    def said() -> str:
        return "".join(file.read_text() for file in (out, log) if file.exists())

    with (
        out.open("w") as stream,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream),
    ):
        try:
            until(lambda: "spawned uWSGI worker 2" in said())
            yield "http://" + re.search(r"bound to TCP address (127.0.0.1:\d+)", said())[1]
        finally:
            until(lambda: pid.exists() and pid.read_text())
            os.kill(int(pid.read_text()), signal.SIGINT)
            until(lambda: "goodbye to uWSGI" in said())


@pytest.mark.parametrize(
    ("options", "is_daemon"),
    [(["--lazy-apps"], False), (["--lazy-apps"], True), (["--py-call-uwsgi-fork-hooks"], False)],
)
def test_uwsgis_workers_record_and_deliver_where_python_knows_of_the_fork(
    outbox: Outbox, environment, tmp_path: Path, options: list[str], is_daemon: bool, server
) -> None:
    with uwsgi(environment, tmp_path, *options, is_daemon=is_daemon) as address:
        count = acknowledged(address, processes=2)
        until(lambda: len(server.stored) >= count + 1)


@pytest.mark.parametrize("is_daemon", [False, True])
def test_uwsgis_workers_lose_no_event_and_refuse_to_go_on_where_they_were_forked_unseen(
    outbox: Outbox, url: str, environment, tmp_path: Path, is_daemon: bool
) -> None:
    del environment["STARTS"]  # uWSGI may fork while a thread holds some lock
    outbox.close()
    acknowledged = 0
    with uwsgi(environment, tmp_path, is_daemon=is_daemon) as address:
        for number in range(6):
            status, text = get(f"{address}/{number}")
            acknowledged += status == 200
            assert "lazy-apps" in text
            # Where the workers hold no lock, this takes itself for the last to close the file.
            with Outbox(url) as another:
                assert len(another.find()) == 1 + acknowledged


# Celery

CELERY = """
import json
import os
from celery import Celery
from outbox import Outbox
from builders import rule_fired

outbox = Outbox.open(os.environ["DATABASE"])
outbox.enqueue(rule_fired(session_id="before the fork"))
celery = Celery("tasks", broker="filesystem://")
celery.conf.broker_transport_options = json.loads(os.environ["BROKER"])
celery.conf.worker_proc_alive_timeout = 120  # it kills processes that are not there after four seconds

@celery.task(ignore_result=True)
def enqueue(number):
    outbox.enqueue(rule_fired(session_id=f"{number} in {os.getpid()}"))
"""


@pytest.mark.contract
@pytest.mark.programs
def test_celerys_prefork_workers_record(outbox: Outbox, environment, tmp_path: Path) -> None:
    sender = pytest.importorskip("celery").Celery("sender", broker="filesystem://")
    (tmp_path / "tasks.py").write_text(CELERY)
    (tmp_path / "broker").mkdir()
    folders = ("data_folder_in", "data_folder_out", "control_folder")
    broker = {**{name: str(tmp_path / "broker") for name in folders}, "polling_interval": 0.05}
    sender.conf.broker_transport_options = broker
    environment["BROKER"] = json.dumps(broker)
    python = [
        sys.executable,
        "-m",
        "celery",
        "--app",
        "tasks",
        "worker",
        "--pool",
        "prefork",
        "--concurrency",
        "2",
    ]
    numbers: list[int] = []

    def recorded() -> list[list[str]]:
        """The number of each task, and the process that recorded it."""
        names = [found.session_id for found in outbox.find(limit=1_000)]
        return [name.split(" in ") for name in names if " in " in name]

    def have_both_worked() -> bool:
        """Send tasks in turn until all are recorded, and both processes were there in time to take some."""
        rows = recorded()
        if len(rows) < len(numbers):
            return False
        if len(numbers) >= 20 and len({pid for _, pid in rows}) >= 2:
            return True
        for _ in range(20):
            sender.send_task("tasks.enqueue", [len(numbers)])
            numbers.append(len(numbers))
        return False

    log = tmp_path / "celery.log"
    with (
        log.open("w") as stderr,
        subprocess.Popen(python, cwd=tmp_path, env=environment, stdout=stderr, stderr=stderr) as process,
    ):
        try:
            until(lambda: process.poll() is not None or have_both_worked())
        finally:
            sender.control.shutdown()  # a signal alone would be noticed after the broker was asked for two seconds, twice
            process.send_signal(signal.SIGTERM)
            process.wait(FOREVER_S)
            sender.close()
    assert sorted(int(number) for number, _ in recorded()) == numbers
    assert len({pid for _, pid in recorded()}) == 2

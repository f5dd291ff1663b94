"""The examples are run as their readers would run them."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import requests

from builders import ROOT, rule_fired
from conditions import until
from outbox import Outbox
from outbox.testing import ScriptedServer

EXAMPLES = ROOT / "examples"
TOKEN = "token-of-tests"


def needs(package: str) -> pytest.MarkDecorator:
    reason = f"{package} is not installed; the dependency group `examples` has it"
    return pytest.mark.skipif(find_spec(package) is None, reason=reason)


@pytest.fixture
def service(outbox_server: ScriptedServer) -> ScriptedServer:
    outbox_server.token = TOKEN
    return outbox_server


@pytest.fixture
def environment(url: str, service: ScriptedServer, tmp_path: Path):
    return os.environ | {
        "DATABASE_URL": url,
        "OUTBOX_DATABASE_URL": url,
        "OUTBOX_URL": service.url,
        "OUTBOX_TOKEN": TOKEN,
        "CELERY_BROKER_URL": f"sqla+sqlite:///{tmp_path / 'broker.db'}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)]),
    }


@pytest.fixture
def run(environment, tmp_path: Path):
    """Run a program of Python's to its end; return what it printed."""

    def run(*arguments: str | Path, exit_code: int = 0, **changed: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, *arguments],
            env=environment | changed,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == exit_code, done.stderr
        return done

    return run


@contextmanager
def serving(*arguments: str | Path, environment, folder: Path):
    """Run a server of Python's, which says where it listens; yield that."""
    process = subprocess.Popen(
        [sys.executable, "-u", *arguments],
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if listening := re.search(r"http://127\.0\.0\.1:\d+", line):
                yield listening.group()
                break
        else:
            pytest.fail("".join(said))
    finally:
        process.terminate()
        process.communicate()


def items(service: ScriptedServer) -> list[str]:
    return [event["item"] for event in service.events]


@pytest.mark.contract
@pytest.mark.programs
def test_an_order_that_is_rolled_back_leaves_no_event(run, url: str, service: ScriptedServer) -> None:
    done = run("-W", "error", EXAMPLES / "orders.py", url)
    assert (done.stdout, done.stderr) == ("1 order, 1 event\n1 sent\n", "")
    assert items(service) == ["shoes"]


def test_orders_brings_its_own_service_along(run, service: ScriptedServer, tmp_path: Path) -> None:
    done = run(EXAMPLES / "orders.py", OUTBOX_URL="")
    assert done.stdout == "1 order, 1 event\n1 sent\n"
    assert (tmp_path / "orders.db").exists()
    assert items(service) == []


def place_orders(shop: str) -> list[int]:
    return [
        requests.post(f"{shop}/orders", data={"item": item}, timeout=30).status_code
        for item in ("shoes", "unicorn")
    ]


@needs("flask")
@pytest.mark.slow
def test_an_order_to_flask_and_its_event_come_together(
    run, environment, service: ScriptedServer, tmp_path: Path
) -> None:
    flask = ["-m", "flask", "--app", EXAMPLES / "flask_app.py"]
    with serving(*flask, "run", "--port", "0", environment=environment, folder=tmp_path) as shop:
        assert place_orders(shop) == [201, 409]
    assert run(*flask, "send-events").stdout == "1 sent\n"
    assert items(service) == ["shoes"]


@needs("django")
@pytest.mark.slow
def test_an_order_to_django_and_its_event_come_together(
    run, environment, service: ScriptedServer, tmp_path: Path
) -> None:
    manage = EXAMPLES / "django_app.py"
    with serving(
        manage, "runserver", "--noreload", "127.0.0.1:0", environment=environment, folder=tmp_path
    ) as shop:
        assert place_orders(shop) == [201, 409]
    assert run(manage, "send_events").stdout == "1 sent\n"
    assert items(service) == ["shoes"]


CONSOLES = {
    "flask": ["-m", "flask", "--app", EXAMPLES / "console_flask.py", "run", "--port", "0"],
    "django": [EXAMPLES / "console_django.py"],
}


@pytest.mark.slow
@pytest.mark.parametrize("host", [pytest.param(host, marks=needs(host)) for host in CONSOLES])
def test_a_mounted_console_lets_in_whom_the_host_knows(host: str, environment, url: str, tmp_path: Path) -> None:
    with Outbox.open(url) as outbox:
        row_id = outbox.enqueue(rule_fired())
    changed = environment | {"LISTEN": "127.0.0.1:0"}
    with serving(*CONSOLES[host], environment=changed, folder=tmp_path) as shop, requests.Session() as browser:
        assert browser.get(f"{shop}/outbox/", timeout=30).status_code == 403
        browser.post(f"{shop}/login", data={"user": "mallory"}, timeout=30)
        assert browser.get(f"{shop}/outbox/", timeout=30).status_code == 403
        browser.post(f"{shop}/login", data={"user": "ada"}, timeout=30)
        overview = browser.get(f"{shop}/outbox/", timeout=30).text
        assert {*re.findall(r'(?:href|src|action|data-live)="(/[^/]*)', overview)} == {"/outbox"}
        assert browser.get(shop + re.findall(r'href="([^"]+css)"', overview)[0], timeout=30).status_code == 200
        confirm = browser.get(f"{shop}/outbox/events/confirm?do=purge&scope=one&row={row_id}", timeout=30).text
        fields = dict(re.findall(r'type="hidden" name="([^"]+)" value="([^"]*)"', confirm))
        (path,) = re.findall(r'method="post" action="([^"]+)"', confirm)
        done = browser.post(shop + path, data=fields, timeout=30)
        assert (done.status_code, done.url) == (200, f"{shop}/outbox/events")
        assert "1 event was deleted for good." in done.text
        paths = {cookie.name: cookie.path for cookie in browser.cookies}
    assert paths.pop("outbox_console") == "/outbox"
    assert {*paths.values()} == {"/"}  # the host's own


ATOMIC = """
from django_app import OrderPlaced, connection, datetime, outbox, timezone, transaction
from outbox import StorageError


def record(item):
    event = OrderPlaced(order_id=1, item=item, occurred_at=datetime.now(timezone.utc))
    return outbox.enqueue(event, connection=connection.connection)


def roll_back(item):
    try:
        with transaction.atomic():
            record(item)
            raise LookupError
    except LookupError:
        pass


with transaction.atomic():
    record("kept")
    roll_back("away with its savepoint")
    assert outbox.pending_count() == 0  # for others it is not there yet
roll_back("away")
with connection.cursor() as cursor:
    cursor.execute("ALTER TABLE observation_events RENAME TO away")
try:
    with transaction.atomic():
        record("refused")
except StorageError as error:
    assert "observation_events" in str(error), error
else:
    raise AssertionError
with connection.cursor() as cursor:
    cursor.execute("ALTER TABLE away RENAME TO observation_events")
record("kept without a transaction")
print(*[row.payload_json.split('"item":"')[1].split('"')[0] for row in outbox.find()], sep="\\n")
"""


@needs("django")
@pytest.mark.slow
def test_on_djangos_connection_an_event_shares_the_fate_of_its_atomic_block(run) -> None:
    assert run("-c", ATOMIC).stdout.splitlines() == ["kept", "kept without a transaction"]


@needs("django")
@pytest.mark.servers("postgresql")
def test_so_it_does_on_djangos_connection_to_postgresql(run) -> None:
    assert run("-c", ATOMIC).stdout.splitlines() == ["kept", "kept without a transaction"]


BEAT = """
from celery_app import app

for entry in app.conf.beat_schedule.values():
    app.send_task(entry["task"], **entry["options"])
"""


@needs("celery")
@pytest.mark.slow
def test_what_celery_beat_starts_sends_the_events(
    run, outbox: Outbox, environment, service: ScriptedServer, tmp_path: Path
) -> None:
    outbox.enqueue(rule_fired())
    run("-c", BEAT)
    assert service.events == []
    worker = [sys.executable, "-m", "celery", "--app", "celery_app", "worker", "--concurrency", "1"]
    with (
        (tmp_path / "worker.log").open("w") as log,
        subprocess.Popen(
            worker, env=environment, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        ) as process,
    ):
        try:
            until(lambda: outbox.stats().counts["sent"] or process.poll() is not None)
            assert process.poll() is None, (tmp_path / "worker.log").read_text()
        finally:
            os.killpg(process.pid, signal.SIGKILL)  # to end by itself takes it up to four seconds
    assert len(service.events) == 1


def test_the_line_of_the_crontab_sends_the_events(outbox: Outbox, environment, service: ScriptedServer) -> None:
    outbox.enqueue(rule_fired())
    settings, lines = {}, []
    for line in (EXAMPLES / "crontab").read_text(encoding="utf-8").splitlines():
        if setting := re.fullmatch(r"(\w+)=(.*)", line):
            settings[setting.group(1)] = setting.group(2)
        elif line and not line.startswith("#"):
            lines.append(line)
    (line,) = lines
    *times, command = line.split(maxsplit=5)
    assert times == ["*"] * 5
    assert {*settings} - {"PATH"} <= {"OUTBOX_DATABASE_URL", "OUTBOX_URL", "OUTBOX_TOKEN_FILE", "OUTBOX_TYPES"}
    script = f'outbox() {{ "{sys.executable}" -m outbox "$@"; }}\n{command}'
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
    assert len(service.events) == 1


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    file = tmp_path / "prices.py"
    file.write_text("class Shoe:\n    price: float\n")
    return file


@pytest.fixture
def hook(tmp_path: Path) -> Path:
    """The hook, with more patience: on a busy machine a program may need longer to start than the hook waits for it."""
    own = (EXAMPLES / "hook.py").read_text(encoding="utf-8")
    patient = own.replace("PATIENCE_S = 5\n", "PATIENCE_S = 240\n")
    assert patient != own
    file = tmp_path / "patient_hook.py"
    file.write_text(patient, encoding="utf-8")
    return file


def test_the_hook_records_what_the_tool_found(run, outbox: Outbox, hook: Path, prices: Path) -> None:
    done = run(hook, prices, exit_code=1)
    assert (done.stdout, done.stderr) == (f"{prices}: a price is no float\n", "")
    (row,) = outbox.find()
    assert (row.event_type, row.rule_ids_json, row.file_path) == ("rule_fired", '["no-float-money"]', str(prices))


def test_the_tool_goes_on_without_an_outbox(run, hook: Path, prices: Path) -> None:
    done = run(hook, prices, exit_code=1, OUTBOX_DATABASE_URL="sqlite:////no/such/folder/outbox.db")
    assert done.stdout == f"{prices}: a price is no float\n"
    assert "can't create the database" in done.stderr
    assert "hook: the event is not recorded: " in done.stderr


@pytest.mark.slow
def test_the_tool_goes_on_while_the_outbox_is_locked(run, outbox: Outbox, prices: Path) -> None:
    with closing(sqlite3.connect(outbox.engine.url.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        impatient = "import sys, hook; hook.PATIENCE_S = 2; sys.exit(hook.main(sys.argv[1:]))"
        done = run("-c", impatient, prices, exit_code=1)
    assert done.stdout == f"{prices}: a price is no float\n"
    assert "timed out after" in done.stderr
    assert outbox.find() == []

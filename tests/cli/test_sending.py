from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
from functools import partial

import pytest

from builders import NOON_MS, ROOT, add_row, row, rule_fired, statuses
from command_line import IS_OFF, TOKEN, logged, process, record_bars
from conditions import FOREVER_S, until
from outbox import Outbox, threads
from outbox.cli import sending
from outbox.clock import now_ms
from outbox.testing.answers import Answer
from outbox.words import utc
from peers import ACCEPTED, Peer, answers, read_request

pytestmark = pytest.mark.usefixtures("measured")


def test_flush_all_draws_a_bar_on_a_terminal(run, outbox, terminal, monkeypatch, logged_in):
    outbox.enqueue_many([rule_fired(session_id=str(n)) for n in range(70)])
    drawn = record_bars(monkeypatch)
    assert run("flush", "--all").exit_code == 0
    assert drawn == [("Sending", 70, 70)]


def test_nothing_is_drawn_where_there_is_no_terminal(run, outbox, monkeypatch, logged_in):
    outbox.enqueue(rule_fired())
    drawn = record_bars(monkeypatch)
    assert run("flush", "--all").exit_code == 0
    assert drawn == []


def test_flush_sends_one_batch_with_the_token_of_the_environment(run, outbox, server, logged_in):
    outbox.enqueue_many([rule_fired(session_id=str(n)) for n in range(70)])
    result = run("flush")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "64 attempted, 64 sent, 0 rescheduled, 0 parked, 0 abandoned\n"
    assert server.requests[0].headers["Authorization"] == f"Bearer {TOKEN}"
    assert run("flush", "--all").stdout == "6 attempted, 6 sent, 0 rescheduled, 0 parked, 0 abandoned\n"
    assert run("flush", "--all").stdout == "nothing is due\n"
    assert len(server.events) == 70


def test_flush_all_says_when_the_next_event_is_due(run, outbox, server, logged_in):
    due_ms = now_ms() + 120_000
    add_row(outbox, next_attempt_at_ms=due_ms)
    result = run("flush", "--all")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"nothing is due until {utc(due_ms)} (in ")
    assert run("flush").stdout == "nothing is due\n"


def test_flush_all_says_that_it_made_a_parked_event_due_to_try_the_token(run, outbox, server, logged_in):
    add_row(outbox, status="parked", next_attempt_at_ms=0)
    result = run("flush", "--all")
    assert (result.exit_code, result.stdout) == (
        3,
        "nothing was sent, but an event is due now; run the command again\n",
    )
    assert run("flush", "--all").stdout == "1 attempted, 1 sent, 0 rescheduled, 0 parked, 0 abandoned\n"


def test_flush_sends_events_whose_types_it_does_not_know(run, outbox, server, logged_in, url, tmp_path):
    (tmp_path / "shipping.py").write_text(
        "from outbox import Event\nclass Packed(Event, tag='packed'):\n    order: str\n"
    )
    line = '{"event_type":"packed","order":"A 1"}'
    enqueue = process(
        "-m", "outbox", "--database", url, "--types", "shipping", "enqueue", cwd=tmp_path, stdin=subprocess.PIPE
    )
    enqueue.communicate(line.encode())
    assert row(outbox, 1).payload_json == line
    flush = process("-m", "outbox", "--database", url, "flush", cwd=tmp_path)
    assert flush.wait() == 0
    assert [*server.stored.values()] == [line]
    assert "nothing: it is delivered" in run("show", "1").stdout


@pytest.fixture
def two_services(outbox, server, logged_in, tmp_path, monkeypatch):
    """A file with the destinations billing and search, and an event for each. The environment describes default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BILLING_TOKEN", TOKEN)
    (tmp_path / "outbox.toml").write_text(
        f"[destinations.billing]\nurl = '{server.url}/billing'\ntoken_env = 'BILLING_TOKEN'\n"
        f"[destinations.search]\nurl = '{server.url}/search'\ntoken_file = 'token'\n"
    )
    (tmp_path / "token").write_text(TOKEN)
    outbox.enqueue(rule_fired(), to=["default", "billing", "search"])


SENT_ONE = "1 attempted, 1 sent, 0 rescheduled, 0 parked, 0 abandoned"


@pytest.mark.parametrize(
    ("options", "arrived", "left"),
    [
        ([], [""], ["sent", "pending", "pending"]),
        (["--destination", "default", "--all"], [""], ["sent", "pending", "pending"]),
        (["--destination", "billing"], ["/billing"], ["pending", "sent", "pending"]),
        (["--destination", "search", "--all"], ["/search"], ["pending", "pending", "sent"]),
        (["--all"], ["", "/billing", "/search"], ["sent", "sent", "sent"]),
    ],
)
def test_flush_serves_one_destination_or_all(run, outbox, server, two_services, options, arrived, left):
    result = run("flush", *options)
    assert (result.exit_code, result.stderr) == (0, "")
    assert {request.path for request in server.requests} == {f"{path}/cloud/observations" for path in arrived}
    assert len(server.requests) == len(arrived)
    assert statuses(outbox) == left
    several = ["default: ", "billing: ", "search: "] if len(arrived) == 3 else [""]
    assert result.stdout.splitlines() == [f"{of}{SENT_ONE}" for of in several]


def test_options_of_the_service_are_for_the_destination_that_is_named(run, server, two_services):
    assert run("flush", "--destination", "billing", "--path", "/other").exit_code == 0
    assert run("flush", "--all", "--path", "/third").exit_code == 0
    assert server.requests[0].path == "/billing/other"
    assert {request.path for request in server.requests[1:]} == {"/third", "/search/cloud/observations"}


def test_a_service_that_hangs_delays_no_other_of_a_flush_of_all(run, outbox, two_services, monkeypatch, tmp_path):
    arrived = threading.Event()

    def hang(connection, _stopped):
        read_request(connection)
        if arrived.wait(FOREVER_S):
            connection.sendall(ACCEPTED)

    def arrive(connection, _stopped):
        read_request(connection)
        arrived.set()
        connection.sendall(ACCEPTED)

    with Peer(hang) as default, Peer(arrive) as billing:
        monkeypatch.setenv("OUTBOX_URL", default.url)
        (tmp_path / "outbox.toml").write_text(
            f"[destinations.billing]\nurl = '{billing.url}'\ntoken_env = 'BILLING_TOKEN'\n"
        )
        result = run("flush", "--all")
    assert result.stdout.splitlines() == [f"default: {SENT_ONE}", f"billing: {SENT_ONE}"]
    assert statuses(outbox) == ["sent", "sent", "pending"]


def test_after_an_interrupt_no_destination_begins_a_batch():
    begun = threading.Event()
    destinations = []

    def flush(number, *, progress):
        destinations.append(number)
        begun.set()
        while True:
            progress(None)

    flushes = [partial(flush, number) for number in range(20)]
    with pytest.raises(KeyboardInterrupt), sending._at_once(flushes):  # noqa: PT012 - an interrupt comes from inside
        assert begun.wait(FOREVER_S)
        raise KeyboardInterrupt
    assert 1 <= len(destinations) <= 16


def test_a_flush_of_all_goes_on_after_a_destination_that_fails(
    run, outbox, server, two_services, tmp_path, monkeypatch
):
    outbox.enqueue(rule_fired(session_id="2"), to="search")
    (tmp_path / "token").write_text("two words")
    with Peer(answers(b"HTTP/1.1 503 Slow\r\nContent-Length: 0\r\n\r\n")) as default:
        monkeypatch.setenv("OUTBOX_URL", default.url)
        result = run("flush", "--all", "--json")
    assert result.exit_code == 2
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(report["destination"], report["sent"]) for report in reports] == [("default", 0), ("billing", 1)]
    assert result.stderr.splitlines()[0].startswith("outbox: default: last failure: 503")
    assert result.stderr.splitlines()[1].startswith("outbox: search: ")
    assert "destinations.search.token_file holds a secret with blanks" in result.stderr
    (tmp_path / "token").write_text("")
    result = run("flush", "--all")
    assert result.exit_code == 3
    assert result.stdout == "billing: nothing is due\n"
    assert result.stderr.endswith(
        "outbox: search: nothing was sent: not logged in, the client has no credentials; set what token_file names\n"
    )


def test_a_flush_of_all_sends_nothing_if_a_service_can_not_be_reached_by_mistake(
    run, server, two_services, tmp_path
):
    with (tmp_path / "outbox.toml").open("a") as file:
        file.write("[destinations.archive]")
    result = run("flush", "--all")
    assert result.exit_code == 2
    assert "there is no URL of a service for the destination archive" in " ".join(result.stderr.split())
    assert server.requests == []


def test_json_of_flush_is_the_report(run, outbox, server, logged_in):
    server.set_mode("overloaded")
    outbox.enqueue(rule_fired())
    result = run("flush", "--json")
    report = json.loads(result.stdout)
    assert report["destination"] == "default"
    assert (report["attempted"], report["sent"], report["rescheduled"]) == (1, 0, 1)
    assert (report["verdict"], report["failure"][:3]) == ("rate limited", "429")


def test_a_login_that_ends_between_two_batches_is_told(run, outbox, server, logged_in, monkeypatch):
    outbox.enqueue_many([rule_fired(session_id=str(n)) for n in range(70)])
    flush_all = Outbox.flush_all

    def logging_out(self, client, *, progress, **options):
        def log_out(report):
            progress(report)
            monkeypatch.delenv("OUTBOX_TOKEN")

        return flush_all(self, client, progress=log_out, **options)

    monkeypatch.setattr(Outbox, "flush_all", logging_out)
    result = run("flush", "--all")
    assert (result.exit_code, result.stdout) == (
        3,
        "64 attempted, 64 sent, 0 rescheduled, 0 parked, 0 abandoned\n",
    )
    assert result.stderr.startswith("outbox: nothing more was sent: not logged in, ")


@pytest.mark.usefixtures("logged_in")
@pytest.mark.parametrize(
    ("mode", "status"), [("down", "pending"), ("overloaded", "pending"), ("revoked", "parked")]
)
def test_what_was_not_sent_is_exit_code_3(run, outbox, server, mode, status):
    server.set_mode(mode)
    outbox.enqueue(rule_fired())
    result = run("flush", "--all")
    assert result.exit_code == 3
    assert result.stdout.startswith("1 attempted, 0 sent, ")
    assert result.stderr.startswith("outbox: last failure: ")
    assert statuses(outbox) == [status]


def test_an_event_that_the_server_rejects_is_exit_code_3(run, outbox, logged_in):
    outbox.enqueue_many([rule_fired(), rule_fired(session_id="poison")])
    result = run("flush")
    assert result.exit_code == 3
    assert result.stderr.startswith("outbox: last failure: 422 ")
    assert statuses(outbox) == ["sent", "pending"]


def test_a_payload_that_can_not_be_read_is_exit_code_3(run, outbox, logged_in):
    add_row(outbox, payload_json="oops")
    result = run("flush")
    assert result.exit_code == 3
    assert result.stderr.endswith("outbox: `outbox list --status abandoned` shows why\n")
    assert statuses(outbox) == ["abandoned"]


def test_what_is_due_after_all_is_exit_code_3(run, outbox, logged_in, monkeypatch):
    flush_all = Outbox.flush_all

    def overtaken(self, *arguments, **options):
        report = flush_all(self, *arguments, **options)
        self.enqueue(rule_fired(session_id="late"))
        return report

    monkeypatch.setattr(Outbox, "flush_all", overtaken)
    assert run("flush", "--all").exit_code == 3


def test_what_is_not_due_yet_does_not_count(run, outbox, logged_in):
    add_row(outbox, next_attempt_at_ms=NOON_MS * 2)
    assert run("flush", "--all").exit_code == 0


@pytest.mark.parametrize("token", [None, "", " \n"])
def test_without_a_token_nothing_is_touched(run, outbox, server, monkeypatch, token):
    monkeypatch.setenv("OUTBOX_URL", server.url)
    if token is not None:
        monkeypatch.setenv("OUTBOX_TOKEN", token)
    outbox.enqueue(rule_fired())
    before = row(outbox, 1).next_attempt_at_ms
    result = run("flush")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == (
        "outbox: nothing was sent: not logged in, the client has no credentials; set OUTBOX_TOKEN or OUTBOX_TOKEN_FILE\n"
    )
    assert row(outbox, 1).next_attempt_at_ms == before
    assert server.requests == []


@pytest.mark.parametrize("target", [None, "ftp://example.com", "http://example.com"])
def test_a_server_url_that_can_not_work_is_misuse(run, outbox, monkeypatch, target):
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    result = run("flush", *(["--url", target] if target else []))
    assert result.exit_code == 2
    assert "url" in result.stderr


def test_the_token_is_in_no_output(run, outbox, server, logged_in):
    outbox.enqueue(rule_fired())
    server.script(Answer(500, f"go away {TOKEN}"))
    outputs = [run("flush"), run("status"), run("list"), run("show", 1), run("list", "--json")]
    assert "[REDACTED-TOKEN]" in outputs[0].stderr
    for output in outputs:
        assert TOKEN not in output.output + output.stderr


def test_sigterm_gives_back_what_a_flush_holds(url, outbox, monkeypatch):
    monkeypatch.setenv("OUTBOX_TOKEN", TOKEN)
    outbox.enqueue(rule_fired())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("OUTBOX_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        flushing = process("-m", "outbox", "--database", url, "flush", stderr=subprocess.PIPE)
        connection, _ = listener.accept()
        with connection:
            assert connection.recv(4)
            assert statuses(outbox) == ["sending"]
            flushing.send_signal(signal.SIGTERM)
            assert (flushing.communicate()[1], flushing.returncode) == (b"", 130)
    assert statuses(outbox) == ["pending"]


@pytest.mark.parametrize("options", [(), ("--all",), ("--json",)])
def test_flush_sends_nothing_while_capture_is_off(run, outbox, server, logged_in, monkeypatch, options):
    outbox.enqueue(rule_fired())
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    result = run("flush", *options)
    assert result.exit_code == 3
    assert [json.loads(line)["skipped"] for line in result.stdout.splitlines()] == [IS_OFF] * ("--json" in options)
    assert result.stderr == f"outbox: nothing was sent: {IS_OFF}\n"
    assert statuses(outbox) == ["pending"]
    assert server.requests == []


def start_run(url, server, token_file, *options, program=("-m", "outbox")):
    """Start `outbox run`; return once it delivers."""
    run = process(
        *(*program, "--database", url, "run", "--url", server.url, *options),
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert logged(run.stderr.readline()) == [f"INFO delivering from {url} to {server.url}"]
    return run


def test_run_says_that_capture_is_off_and_waits(url, outbox, server, token_file, monkeypatch):
    outbox.enqueue(rule_fired())
    monkeypatch.setenv("OUTBOX_CAPTURE", "false")
    arguments = ("-m", "outbox", "--database", url, "run", "--url", server.url)
    with process(*arguments, stderr=subprocess.PIPE, text=True, cwd=ROOT) as run:
        said = run.stderr.readline()
        run.terminate()
        assert logged(run.communicate(timeout=240)[1]) == ["INFO stopping"]
    assert logged(said) == [f"WARNING can't deliver: {IS_OFF}"]
    assert run.returncode == 0
    assert statuses(outbox) == ["pending"]


def test_run_delivers_what_others_enqueue_until_sigterm(url, outbox, server, token_file):
    with start_run(url, server, token_file) as run:
        outbox.enqueue_many([rule_fired()] * 3)
        until(lambda: statuses(outbox) == ["sent"] * 3)
        run.terminate()
        assert logged(run.communicate(timeout=240)[1]) == ["INFO stopping"]
    assert run.returncode == 0


def test_run_delivers_to_every_destination_of_the_file(url, outbox, server, two_services):
    arguments = ("-m", "outbox", "--database", url, "run")
    with process(*arguments, stderr=subprocess.PIPE, text=True) as run:
        until(lambda: statuses(outbox) == ["sent"] * 3)
        run.terminate()
        assert logged(run.communicate(timeout=240)[1]) == [
            f"INFO delivering default from {url} to {server.url}",
            f"INFO delivering billing from {url} to {server.url}/billing",
            f"INFO delivering search from {url} to {server.url}/search",
            "INFO stopping",
        ]
    assert run.returncode == 0


def test_run_delivers_to_the_destination_that_is_named(url, outbox, server, two_services):
    arguments = ("-m", "outbox", "--database", url, "run", "--destination", "billing")
    with process(*arguments, stderr=subprocess.PIPE, text=True) as run:
        until(lambda: statuses(outbox) == ["pending", "sent", "pending"])
        run.terminate()
        first = logged(run.communicate(timeout=240)[1])[0]
    assert first == f"INFO delivering from {url} to {server.url}/billing"


def test_a_new_token_brings_back_the_events_of_its_destination_only(run, outbox, two_services, monkeypatch):
    later_ms = now_ms() + 3_600_000
    billing, search = (
        add_row(outbox, destination=name, next_attempt_at_ms=later_ms) for name in ("billing", "search")
    )

    def sleep(_seconds):
        until(lambda: statuses(outbox) == ["sent"] * 3 + ["pending"] * 2)
        monkeypatch.setenv("BILLING_TOKEN", "another")
        until(lambda: row(outbox, billing).next_attempt_at_ms != later_ms)
        raise KeyboardInterrupt

    monkeypatch.setattr(sending, "_sleep", sleep)
    assert run("run").exit_code == 0
    assert row(outbox, search).next_attempt_at_ms == later_ms


def test_run_gives_back_what_it_can_not_finish_in_time(url, outbox, server, token_file):
    server.set_mode("hang")
    # All but 0.4 s of the grace are for giving back, which takes long on a slow machine.
    code = "from outbox import threads; threads._RELEASE_SHARE = 0.98; from outbox.cli import main; main()"
    with start_run(url, server, token_file, "--grace", "20", program=("-c", code)) as run:
        outbox.enqueue(rule_fired())
        until(lambda: server.requests)
        run.send_signal(signal.SIGINT)
        run.communicate(timeout=30)  # less than an upload may take
    assert run.returncode == 0
    assert statuses(outbox) == ["pending"]


def test_run_goes_on_when_who_read_its_log_has_left(url, outbox, server, token_file):
    with start_run(url, server, token_file) as run:
        run.stderr.close()
        server.set_mode("down")
        outbox.enqueue(rule_fired())
        until(lambda: outbox.get(1).last_error)
        server.set_mode("ok")
        outbox.retry_now()
        until(lambda: statuses(outbox) == ["sent"])
        run.terminate()
        assert run.wait(timeout=240) == 0


def test_run_replaces_a_worker_that_died(run, outbox, logged_in, monkeypatch):
    work, died = threads.Threads._work, []
    monkeypatch.setattr(threads.Threads, "_work", lambda run: died.append(threading.current_thread()))

    def sleep(_seconds):
        if threads.Threads._work is work:
            until(lambda: statuses(outbox) == ["sent"])
            raise KeyboardInterrupt
        until(lambda: died)  # a thread counts as started before it works
        (thread,) = died
        thread.join()  # a thread that is no longer listed may still count as alive
        monkeypatch.setattr(threads.Threads, "_work", work)

    monkeypatch.setattr(sending, "_sleep", sleep)
    outbox.enqueue(rule_fired())
    assert logged(run("run").stderr)[1:] == [
        "WARNING a thread of the worker died, new ones take over",
        "INFO stopping",
    ]


def test_health_tells_whether_the_worker_of_run_lives(url, run, outbox, server, token_file, tmp_path, monkeypatch):
    heartbeat = tmp_path / "alive"
    monkeypatch.setenv("OUTBOX_HEARTBEAT", str(heartbeat))
    for options in ((), ("--live",)):
        result = run("health", *options)
        assert (result.exit_code, result.stdout) == (3, "")
        assert (
            result.stderr
            == f"outbox: there is no heartbeat file {str(heartbeat)!r}: no worker that touches it was started\n"
        )
    with start_run(url, server, token_file) as running:
        until(heartbeat.exists)
        result = run("health")
        assert (result.exit_code, result.stdout, result.stderr) == (0, "ok\n", "")
        running.kill()
    os.utime(heartbeat, ns=((now_ms() - 600_000) * 1_000_000,) * 2)
    result = run("health", "--live")
    assert (result.exit_code, result.stdout) == (3, "")
    assert result.stderr == (
        f"outbox: the worker has not touched its heartbeat file {str(heartbeat)!r} for 10 minutes;"
        " restart its process\n"
    )
    result = run("health", "--max-silence", "15m", "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    shown = json.loads(result.stdout)
    assert shown["overdue_ms"] == 0
    assert 600_000 <= shown["silent_ms"] < 900_000


def test_run_refuses_a_heartbeat_that_it_can_not_write(run, outbox, logged_in, tmp_path):
    result = run("run", "--heartbeat", str(tmp_path / "no" / "alive"))
    assert result.exit_code == 2
    assert "expected a file that can be written: No such file or directory" in result.stderr


def test_run_tries_again_what_is_parked_when_the_token_changes(url, outbox, server, token_file):
    token_file.write_text("outdated")
    outbox.enqueue(rule_fired())
    with start_run(url, server, token_file) as run:
        until(lambda: statuses(outbox) == ["parked"])
        token_file.unlink()
        fresh = token_file.with_suffix(".new")
        fresh.write_text(TOKEN)
        fresh.replace(token_file)
        until(lambda: statuses(outbox) == ["sent"])
        assert logged(run.stderr.readline())[0].startswith("WARNING can't deliver: 401 Unauthorized")
        assert any(line.endswith(" WARNING delivering again\n") for line in iter(run.stderr.readline, ""))
        run.terminate()
        assert logged(run.communicate(timeout=240)[1])[-1] == "INFO stopping"


def test_run_retries_nothing_when_the_token_is_taken_away(url, outbox, server, token_file):
    server.set_mode("revoked")  # an acceptance before the token is taken away would bring all back
    for _ in range(3):
        add_row(outbox, status="parked")
    with start_run(url, server, token_file) as run:
        token_file.write_text("")
        assert any(" WARNING can't deliver: not logged in" in line for line in iter(run.stderr.readline, ""))
        run.terminate()
        run.communicate(timeout=240)
    # Before, as one parked event a minute is, one may have been tried.
    assert statuses(outbox).count("parked") >= 2


def test_run_does_not_begin_without_a_schema(url, run, logged_in):
    result = run("run")
    assert result.exit_code == 1
    assert "outbox upgrade" in result.stderr

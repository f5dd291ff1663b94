"""What users and servers hand over, right or wrong: it ends in a result or in words, and nothing is half done."""

import json
import re
from datetime import timedelta, timezone
from email.utils import format_datetime
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from outbox import ConfigurationError, HttpClient, Outbox, StorageError
from outbox.cli import main
from outbox.events import encode
from outbox.retry_after import in_header
from outbox.storage.engines import open_engine

VALID = {"event_type": "rule_fired", "rule_ids": ["r1"], "session_id": "s1", "fired_at": "2026-11-24T12:00:00Z"}
FIELDS = sorted(VALID)
# Each of these goes on until it is interrupted.
ENDLESS = {"demo", "receive", "web"}
COMMANDS = sorted(main.commands.keys() - ENDLESS)
OPTIONS = sorted({name for command in main.commands.values() for option in command.params for name in option.opts})

# Arguments are bytes; those that are no UTF-8 come as surrogates, and NUL can't be passed on.
arguments = st.text(
    st.characters(codec="utf-8", exclude_characters="\0")
    | st.characters(min_codepoint=0xDC80, max_codepoint=0xDCFF)
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("input")
    Outbox.open(f"sqlite:///{made / 'outbox.db'}").close()
    return made


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def run(*words: str, stdin: bytes = b"") -> tuple[int, str]:
    result = CliRunner().invoke(main, words, input=stdin)
    if not isinstance(result.exception, SystemExit | None):
        raise result.exception
    assert result.exit_code in (0, 1, 2, 3)
    assert "Traceback" not in result.output
    return result.exit_code, result.output


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just(VALID["fired_at"]),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(FIELDS), inner),
    max_leaves=6,
)
changed = st.dictionaries(st.sampled_from(FIELDS) | st.text(), json_values, max_size=3).map(
    lambda more: VALID | more
)
lines = st.lists(
    st.just(VALID).map(json.dumps).map(str.encode)
    | changed.map(json.dumps).map(str.encode)
    | json_values.map(json.dumps).map(str.encode)
    | st.binary(max_size=40)
    | st.sampled_from([b"", b"  ", b"\xef\xbb\xbf", b"{" * 5_000, b"[" * 5_000, b'{"event_type":"rule_fired"}', b"\r"])
)  # fmt: skip


def is_event(line: bytes) -> bool:
    try:
        encode(json.loads(line))
    except (ValueError, RecursionError):
        return False
    return True


@settings(deadline=None, max_examples=150)
@given(lines=lines, skip=st.booleans())
def test_a_file_of_events_is_recorded_whole_or_not_at_all(folder: Path, lines: list[bytes], skip: bool) -> None:
    url = f"sqlite:///{folder / 'outbox.db'}"
    with Outbox(url) as outbox:
        before = outbox.pending_count()
        options = ["--skip-invalid"] if skip else []
        exit_code, _ = run("--database", url, "enqueue", *options, stdin=b"\n".join(lines))
        recorded = outbox.pending_count() - before
    given_lines = [
        line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        for number, line in enumerate(b"\n".join(lines).split(b"\n"))
    ]
    given_lines = [line.strip() for line in given_lines if line.strip()]
    valid = sum(map(is_event, given_lines))
    if skip:
        assert (exit_code, recorded) == (0, valid)
    elif valid < len(given_lines):
        assert (exit_code, recorded) == (2, 0)
    else:
        assert (exit_code, recorded) == (0, valid)


words = st.lists(
    st.sampled_from([*COMMANDS, *OPTIONS, "--help", "--version", "-", "--", "pending", "0s", "7d", "1", "-1", "99999999999999999999", "https://example.com/"])
    | arguments.filter(lambda word: word not in ENDLESS),
    max_size=6,
)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(words=words)
def test_any_arguments_end_in_an_exit_code_and_words(folder: Path, words: list[str]) -> None:
    before = names_in(folder)
    run("--database", f"sqlite:///{folder / 'outbox.db'}", *words)
    assert names_in(folder) <= before | {"outbox.db-wal", "outbox.db-shm"}


ages = st.from_regex(r"[0-9]{1,12}[smhdwy]?", fullmatch=True) | st.from_regex(
    r"-?[0-9]{1,5}-[0-9]{1,3}-[0-9]{1,2}[T ][0-9]{1,2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?([zZ]|[+-][0-9]{2}:[0-9]{2})?",
    fullmatch=True,
)


@settings(deadline=None)
@given(age=ages | arguments)
def test_any_age_is_a_time_or_wrong_use(folder: Path, age: str) -> None:
    url = f"sqlite:///{folder / 'outbox.db'}"
    exit_code, output = run("--database", url, "requeue", f"--older-than={age}", "--dry-run")
    assert exit_code in (0, 2)
    assert exit_code == 0 or "expected an age such as 30s" in " ".join(output.split())


@settings(deadline=None)
@given(row_id=st.integers() | arguments)
def test_any_id_is_an_event_or_none_or_wrong_use(folder: Path, row_id: int | str) -> None:
    exit_code, _ = run("--database", f"sqlite:///{folder / 'outbox.db'}", "show", "--", str(row_id))
    assert exit_code in (0, 1, 2)


hosts = st.sampled_from(
    [
        "",
        "localhost",
        "127.0.0.1",
        "[::1]",
        "[::1",
        "api.example.com",
        "exämple.com",
        "a..b",
        "localhost.",
        "0",
        "127.1",
        "*",
    ]
)
url_parts = st.tuples(
    st.sampled_from(["http", "https", "HTTP", "ftp", "", "sqlite"]),
    st.sampled_from(["://", ":", ":/", ":///", "//", ":\\\\"]),
    st.sampled_from(["", "user@", "user:secret@", "@", "%40"]),
    hosts | st.text(max_size=5),
    st.sampled_from(["", ":", ":0", ":80", ":65536", ":-1", ":x", ":٣"]),
    st.sampled_from(["", "/", "/v1", "//", "/../x", "/%zz", "/a b", "/\n", "?q", "#f", "\\"])
    | st.text(max_size=5),
).map("".join)


@given(url=url_parts | st.text())
def test_any_base_url_works_or_is_refused(url: str) -> None:
    try:
        client = HttpClient(url, token="token-of-tests")
    except ConfigurationError as refusal:
        assert "base_url is " in str(refusal)
        assert "secret" not in str(refusal).replace("hold a credential", "")
        return
    with client:
        target = client._template.url
    assert target.endswith("/cloud/observations")
    assert re.match(r"https://[^/]|http://(localhost|127\.|\[::1\])", target)


database_parts = st.tuples(
    st.sampled_from(["sqlite", "sqlite+pysqlite", "SQLite", "sqlite+nothing", "nothing", "", "postgresql+nothing"]),
    st.sampled_from([":///", "://", ":", "//", ":///nowhere/at/all/", "://host/", "://user:secret@host/"]),
    st.text(st.characters(exclude_characters="/\\"), max_size=8) | st.sampled_from([":memory:", "file:a", "file::memory:", "."]),
    st.sampled_from(["", "?", "?uri=true", "?uri=x", "?mode=memory", "?timeout=x", "?timeout=1", "?cached_statements=-1", "?a=b&a=c"]),
).map("".join)  # fmt: skip


@settings(deadline=None, max_examples=300)
@given(url=database_parts)
@pytest.mark.filterwarnings("ignore:Query string argument:sqlalchemy.exc.SAWarning")
def test_any_database_url_is_opened_or_refused(url: str, tmp_path_factory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("database"))
        try:
            engine = open_engine(url)
        except ConfigurationError as refusal:
            assert "secret" not in str(refusal)
            return
        finally:
            assert list(Path().iterdir()) == []
        engine.dispose()
        try:
            Outbox.open(url).close()
        except (StorageError, ConfigurationError) as refusal:
            assert "secret" not in str(refusal)


@settings(deadline=None)
@given(url=database_parts.filter(lambda url: "\0" not in url))
@pytest.mark.filterwarnings("ignore:Query string argument:sqlalchemy.exc.SAWarning")
@pytest.mark.traced
def test_looking_at_any_database_url_creates_nothing(url: str, tmp_path_factory) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("database"))
        assert run("--database", url, "status")[0] in (1, 2)
        assert list(Path().iterdir()) == []


moments = st.datetimes() | st.datetimes(timezones=st.integers(-1_439, 1_439).map(lambda minutes: st.just(timezone(timedelta(minutes=minutes)))).flatmap(lambda zone: zone))  # fmt: skip


@given(value=st.text() | st.integers().map(str) | moments.map(format_datetime))
def test_any_retry_after_header_is_a_delay_within_the_clamp_or_none(value: str) -> None:
    delay_ms = in_header(value, now_ms=1_764_000_000_000)
    assert delay_ms is None or 1_000 <= delay_ms <= 300_000


@given(seconds=st.integers(0, 10**25))
def test_a_retry_after_header_in_seconds_is_clamped(seconds: int) -> None:
    assume(len(str(seconds)) <= 18)
    assert in_header(f" {seconds} ", now_ms=0) == min(max(seconds * 1_000, 1_000), 300_000)

"""The targets: each takes bytes, and fails with an exception where something does not hold."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import atheris
import msgspec
from click.testing import CliRunner

from outbox import ConfigurationError, Event, HttpClient, InvalidEvent, Outbox, OutboxError, cli
from outbox.cli.events import _read_events
from outbox.events import MAX_PAYLOAD_BYTES, decode, encode
from outbox.new_rows import columns
from outbox.retry_after import in_body, in_header
from outbox.storage.engines import open_engine

VALID = [
    {"event_type": "rule_fired", "rule_ids": ["r"], "session_id": "s", "fired_at": "2026-11-24T12:00:00Z", "x": [1]},
    {
        "event_type": "mcp_rule_served", "tool": "t", "session_id": "s", "repo_full_name": "r", "file_path": "f",
        "query_hash": "q", "rule_ids": [], "top_k": 5, "was_empty": False, "strict_match_count": 1,
        "estimated_tokens": 3, "served_at": "2026-11-24T12:00:00.5+05:30",
    },
    {"event_type": "rule_cited_in_edit", "rule_id": "r", "session_id": "s", "file_path": "f", "diff_excerpt": "d", "cited_at": "2026-11-24T12:00:00Z"},
    {"event_type": "rule_actually_cited", "rule_id": "r", "session_id": "s", "citation_excerpt": "c", "cited_at": "2026-11-24t12:00:00z"},
    {"event_type": "fix_outcome", "rule_id": "r", "session_id": "s", "accepted": True, "occurred_at": "2026-11-24T12:00:00-12:00", "mcp_serve_event_ids": ["1", 2]},
]  # fmt: skip
FIELDS = sorted({name for document in VALID for name in document})
WORDS = [
    *cli.main.commands, "--json", "--status", "--type", "--older-than", "--limit", "--dry-run", "--all", "--url",
    "--skip-invalid", "--help", "--version", "--database", "--types", "--", "-", "-h", "pending", "abandoned", "sent",
    "0s", "7d", "999999d", "2026-11-24T12:00:00Z", "0001-01-01T00:00:00+23:59", "1", "0", "-1", str(2**63 - 1),
    str(2**63), "https://example.com", "http://[::1", "sqlite://", "postgresql://", "\udcff", "rule_fired",
]  # fmt: skip
TOKENS = [rf"\"{name}\":" for name in (*FIELDS, "retryAfterSec")] + [
    "null", "true", "1e999", "-0.0", "[[[[", "9223372036854775808", r"\"2026-11-24T12:00:00+23:59\"", r"\\ud800",
    *(rf"\"{document['event_type']}\"" for document in VALID), "://", "?uri=true", "&mode=memory", "@", "%00", "[::1]",
    "GMT", "Mon, ", "sqlite:///",
]  # fmt: skip
# These would wait for requests, or show a demonstration of a minute.
ENDLESS = {"demo", "receive", "web"}


def events(data: bytes) -> None:
    """A stored payload, and the same text as a mapping that is enqueued."""
    text = data.decode(errors="surrogateescape")
    with contextlib.suppress(InvalidEvent):
        event = decode(text)
        again, wire = encode(event)
        assert decode(wire) == again == event
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        check_encoding(msgspec.json.decode(data))


def mappings(data: bytes) -> None:
    """A mapping of anything that Python has."""
    provider = atheris.FuzzedDataProvider(data)
    document: dict[Any, Any] = dict(provider.PickValueInList(VALID))
    while provider.remaining_bytes():
        key = provider.PickValueInList(FIELDS) if provider.ConsumeBool() else any_text(provider)
        document[key] = anything(provider, depth=0)
    check_encoding(document)


def any_text(provider: Any) -> str:
    # Surrogates are in it: UTF-16 that was cut in half, as Windows hands it over.
    return provider.ConsumeUnicode(provider.ConsumeIntInRange(0, 20))


def anything(provider: Any, depth: int) -> Any:
    choices: list[Callable[[], Any]] = [
        lambda: any_text(provider),
        lambda: None,
        provider.ConsumeBool,
        lambda: provider.ConsumeInt(12),
        provider.ConsumeFloat,
        lambda: provider.ConsumeBytes(5),
        lambda: any_time(provider),
        object,
    ]
    if depth < 3:
        few = range(provider.ConsumeIntInRange(0, 3))
        choices += [
            lambda: [anything(provider, depth + 1) for _ in few],
            lambda: {any_text(provider): anything(provider, depth + 1) for _ in few},
            lambda: {any_text(provider) for _ in few},
            lambda: {provider.ConsumeInt(9): anything(provider, depth + 1) for _ in few},
        ]
    return provider.PickValueInList(choices)()


def any_time(provider: Any) -> datetime:
    offset = timezone(timedelta(minutes=provider.ConsumeIntInRange(-1_439, 1_439)))
    year = provider.PickValueInList([1, 1969, 1970, 2026, 9999])
    return datetime(year, provider.PickValueInList([1, 12]), provider.PickValueInList([1, 31]), 23, 59, 59,
                    provider.ConsumeIntInRange(0, 999_999), provider.PickValueInList([None, offset]))  # fmt: skip


def check_encoding(document: Any) -> None:
    try:
        event, wire = encode(document)
    except InvalidEvent as reason:
        str(reason).encode()
        return
    assert isinstance(event, Event)
    assert len(wire.encode()) <= MAX_PAYLOAD_BYTES
    assert decode(wire) == event
    assert encode(json.loads(wire)) == (event, wire), "what is on the wire is not its own encoding"
    for value in columns(event, now_ms=0).values():
        assert value is None or isinstance(value, str) or -(2**63) <= value < 2**63


opened: dict[str, Any] = {}


def outbox_in_memory() -> Outbox:
    if "outbox" not in opened:
        opened["outbox"] = Outbox.open("sqlite://")
    return opened["outbox"]


def folder() -> Path:
    if "folder" not in opened:
        memory = Path("/dev/shm")  # noqa: S108 - faster where it is there
        opened["folder"] = tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None)
        os.chdir(opened["folder"].name)
    return Path(opened["folder"].name)


def ndjson(data: bytes) -> None:
    """A file for `outbox enqueue`: what its reader lets pass can be recorded, and nothing is left out."""
    file = folder() / "events"
    file.write_bytes(data)
    with contextlib.redirect_stderr(io.StringIO()):
        read, invalid = _read_events(str(file), "file", show_all=True)
    lines = [line.removeprefix(b"\xef\xbb\xbf") if first else line for first, line in first_and_others(data)]
    assert len(read) + invalid == sum(bool(line.strip()) for line in lines)
    assert len(outbox_in_memory().enqueue_many(read)) == len(read)


def first_and_others(data: bytes) -> list[tuple[bool, bytes]]:
    return [(number == 0, line) for number, line in enumerate(data.split(b"\n"))]


def retry_after(data: bytes) -> None:
    """A body, and the same as a header."""
    text = data.decode(errors="replace")
    for delay_ms in (in_body(text), in_header(data.decode("latin-1"), now_ms=0)):
        assert delay_ms is None or 1_000 <= delay_ms <= 300_000


def urls(data: bytes) -> None:
    """A base URL and a database's URL."""
    text = data.decode(errors="surrogateescape")
    with contextlib.suppress(ConfigurationError), HttpClient(text, token="token-of-tests"):
        assert text.lower().startswith("https://") or any(
            local in text.lower() for local in ("localhost", "127.", ":")
        )
    folder()
    with contextlib.suppress(ConfigurationError):
        engine = open_engine(text)
        engine.dispose()
        name = engine.url.database or ""
        # No connection to anything, and no file but one in the folder.
        if engine.dialect.name == "sqlite" and not {"/", "\\"} & {*name} and len(engine.url.query) == 0:
            with contextlib.suppress(OutboxError):
                Outbox.open(text).close()
            for file in folder().iterdir():
                file.unlink()


def arguments(data: bytes) -> None:
    """Arguments of the command line, and its standard input."""
    provider = atheris.FuzzedDataProvider(data)
    chosen: list[str] = []
    while provider.remaining_bytes() and len(chosen) < 8:
        word = provider.PickValueInList(WORDS) if provider.ConsumeBool() else any_text(provider)
        # Those that a system can pass on.
        chosen.append(os.fsdecode(word.encode(errors="surrogatepass")).replace("\0", ""))
    if ENDLESS & {*chosen}:
        return
    run(chosen, provider.ConsumeBytes(200) or json.dumps(VALID[0]).encode())


def run(chosen: list[str], stdin: bytes) -> None:
    database = folder() / "outbox.db"
    if not database.exists():
        Outbox.open(f"sqlite:///{database}").close()
    options = [] if "--database" in chosen else ["--database", f"sqlite:///{database}"]
    result = CliRunner(env={"OUTBOX_TOKEN": None}).invoke(cli.main, [*options, *chosen], input=stdin)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code in range(4), result.output
    assert "Traceback" not in result.output


TARGETS = {
    "events": events,
    "mappings": mappings,
    "ndjson": ndjson,
    "retry-after": retry_after,
    "urls": urls,
    "arguments": arguments,
}
SEEDS = {
    "events": [json.dumps(document).encode() for document in VALID],
    "ndjson": [b"\xef\xbb\xbf" + b"\n".join(json.dumps(document).encode() for document in VALID)],
    "retry-after": [
        b'{"data":{"retryAfterSec":55}}', b'"retryAfterSec" : 99999', b'[[{"retryAfterSec":-1}]]',
        b"Tue, 24 Nov 2026 12:00:00 GMT", b"Tuesday, 24-Nov-26 12:00:00 +2359", b"120",
    ],
    "urls": [
        b"https://api.example.com/v1", b"http://[::1]:8080/x", b"http://localhost:1/", b"sqlite:///outbox.db",
        b"sqlite:///file:a.db?mode=rwc&uri=true", b"postgresql+psycopg://user:secret@host:1/name?sslmode=require",
    ],
}  # fmt: skip

from __future__ import annotations

import json
from datetime import datetime, timezone

import msgspec
import pytest
from cloudevents.core.bindings import http
from hypothesis import given
from hypothesis import strategies as st

from outbox.failures import ConfigurationError
from outbox.upload.client import HttpClient
from outbox.upload.formats import CloudEvents, Format, KeyedArray, LearnedSize, Lines, fit, format_of
from peers import TOKEN, Row, failure_of

TWO = [Row(1, '{"b" : 1,"a":"\\u00e9"}'), Row(2, '{"c":"é"}')]


@pytest.fixture
def send(server):
    """Upload a batch in a format, and return the request."""

    def send_in(form, batch=TWO, **settings):
        server.script(200)
        with HttpClient(server.url, token=TOKEN, format=form, **settings) as client:
            client.upload(batch)
        return server.requests[-1]

    return send_in


# --- the shapes ---


@pytest.mark.parametrize(
    ("name", "content_type", "body"),
    [
        ("json", "application/json", '[{"b" : 1,"a":"\\u00e9"},{"c":"é"}]'),
        ("json:events", "application/json", '{"events":[{"b" : 1,"a":"\\u00e9"},{"c":"é"}]}'),
        ('json:a "b"', "application/json", '{"a \\"b\\"":[{"b" : 1,"a":"\\u00e9"},{"c":"é"}]}'),
        ("ndjson", "application/x-ndjson", '{"b" : 1,"a":"\\u00e9"}\n{"c":"é"}\n'),
    ],
)
def test_a_body_holds_the_stored_texts_in_their_order(send, name, content_type, body):
    request = send(name)

    assert request.body == body.encode()
    assert request.headers["Content-Type"] == content_type


def test_single_sends_the_payload_as_it_is(send):
    assert send("single", TWO[:1]).body == b'{"b" : 1,"a":"\\u00e9"}'


@pytest.mark.parametrize("form", ["single", "cloudevents"])
def test_formats_of_one_event_take_no_more(server, form):
    with HttpClient(server.url, token=TOKEN, format=form) as client:
        assert client.one_event_per_request
        assert client.fit(TWO) == 1
        assert client.fit([]) == 0
        with pytest.raises(
            ConfigurationError, match="the batch has 2 events, but the format sends one per request"
        ):
            client.upload(TWO)


def test_a_line_of_ndjson_has_no_line_breaks(send):
    pretty = '{\r\n  "a": [1,\n 2.50],\n  "text": "x\\ny  z"\n}'

    body = send("ndjson", [Row(1, pretty), TWO[1]]).body

    assert body == '{"a":[1,2.50],"text":"x\\ny  z"}\n{"c":"é"}\n'.encode()


@given(st.dictionaries(st.text(), st.text() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)))
def test_ndjson_changes_no_value(value):
    pretty = json.dumps(value, indent=1)

    (line,) = Lines().body([Lines().part(Row(1, pretty))]).splitlines()

    assert json.loads(line) == value


def read_by_the_sdk(content_type, body):
    """Return the CloudEvent that the official SDK reads."""
    message = http.HTTPMessage(headers={"Content-Type": content_type}, body=body)
    return http.from_structured(message, http.JSONFormat())


CLOUD_EVENT = {
    "specversion": "1.0",
    "id": "event-1",
    "source": "/outbox",
    "type": "counted",
    "time": datetime(2026, 11, 24, 12, 0, 0, 123_000, tzinfo=timezone.utc),
    "datacontenttype": "application/json",
}


def test_the_official_sdk_reads_a_cloud_event(send):
    request = send("cloudevents", TWO[:1])

    assert request.headers["Content-Type"] == "application/cloudevents+json"
    event = read_by_the_sdk(request.headers["Content-Type"], request.body)
    assert event.get_attributes() == CLOUD_EVENT
    assert event.get_data() == {"b": 1, "a": "é"}


def test_the_official_sdk_reads_each_event_of_a_batch(send):
    request = send("cloudevents-batch")

    assert request.headers["Content-Type"] == "application/cloudevents-batch+json"
    events = [read_by_the_sdk("application/cloudevents+json", json.dumps(one)) for one in json.loads(request.body)]
    assert [event.get_attributes() for event in events] == [CLOUD_EVENT, {**CLOUD_EVENT, "id": "event-2"}]
    assert [event.get_data() for event in events] == [{"b": 1, "a": "é"}, {"c": "é"}]


def test_the_data_of_a_cloud_event_is_the_stored_text():
    part = CloudEvents().part(TWO[0])

    assert part.endswith(b',"data":{"b" : 1,"a":"\\u00e9"}}')
    assert CloudEvents(batch=True).body([part, part]) == b"[" + part + b"," + part + b"]"
    assert CloudEvents(batch=True).body([]) == b"[]"


@pytest.mark.parametrize(
    ("payload", "subject"),
    [('{"a":"x","b":1e999}', "x"), ('{"b":1}', None), ('{"a":7}', None), ('{"a":""}', None), ('{"a":null}', None)],
)
def test_source_and_subject_are_set_by_the_program(send, payload, subject):
    request = send(CloudEvents("https://shop.example/orders", subject="a"), [Row(1, payload)])

    event = read_by_the_sdk(request.headers["Content-Type"], request.body)
    assert event.get_source() == "https://shop.example/orders"
    assert event.get_subject() == subject


@pytest.mark.parametrize(
    ("time_ms", "text"),
    [
        (0, "1970-01-01T00:00:00.000Z"),
        (-1, "1969-12-31T23:59:59.999Z"),
        (253_402_300_799_999, "9999-12-31T23:59:59.999Z"),
        (253_402_300_800_000, None),
        (-62_135_596_800_001, None),
    ],
)
def test_a_time_that_rfc_3339_has_not_is_left_out(time_ms, text):
    part = CloudEvents().part(Row(occurred_at_ms=time_ms))

    assert json.loads(part).get("time") == text


@pytest.mark.parametrize("source", ["", "a b", "é", None, 5])
def test_a_source_that_is_no_uri_is_refused(source):
    with pytest.raises(ConfigurationError, match=r"^source is .*, expected a URI reference$"):
        CloudEvents(source)


def test_a_subject_that_is_no_name_is_refused():
    with pytest.raises(ConfigurationError, match=r"^subject is 5, expected the name of a field$"):
        CloudEvents(subject=5)


@pytest.mark.parametrize("name", ["json", "json:events", "ndjson", "cloudevents-batch"])
def test_the_test_server_reads_what_the_client_writes(server, name):
    server.format = name
    with HttpClient(server.url, token=TOKEN, format=name) as client:
        client.upload(TWO)
        client.upload([])

    assert list(server.stored.values()) == [row.payload_json for row in TWO]


def test_a_format_of_ones_own_is_a_subclass_or_any_object(send):
    class Sql(Format):
        content_type = "application/sql"

        def part(self, item):
            return b"SELECT %d" % item.id

        def body(self, parts):
            return b";".join(parts)

    class NoSubclass:
        content_type = "text/plain"
        part = Sql.part
        body = Sql.body

    assert send(Sql()).body == b"SELECT 1;SELECT 2"
    assert send(NoSubclass()).headers["Content-Type"] == "text/plain"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("jsn", "json, "), ("jsonlines", "json, "), ("json:", "json, json:KEY, "), ("nd-json", "ndjson, ")],
)
def test_an_unknown_format_is_refused_and_the_nearest_named_first(name, nearest):
    with pytest.raises(ConfigurationError, match=f"^format is '{name}', expected {nearest}.*, or an object$"):
        HttpClient("https://ingest.example", format=name)


@pytest.mark.parametrize("form", [None, 5, Format, type("Half", (), {"content_type": "a", "part": print})()])
def test_what_is_no_format_is_refused(form):
    expected = "expected a name, or an object with content_type, part and body"
    with pytest.raises(ConfigurationError, match=f"^format is .*, {expected}$"):
        HttpClient("https://ingest.example", format=form)


# --- sizes ---


ROW_LISTS = st.lists(st.integers(0, 50).map(lambda length: Row(1, '"%s"' % ("x" * length))), max_size=12)


@given(ROW_LISTS, st.integers(1, 300), st.sampled_from(["json", "json:events", "ndjson"]))
def test_as_many_events_fit_as_the_body_allows(rows, max_bytes, name):
    form = format_of(name)
    parts = [form.part(row) for row in rows]
    count = fit(form, parts, max_bytes)

    def size(number):
        return len(form.body(parts[:number]))

    assert min(len(rows), 1) <= count <= len(rows)
    assert count <= 1 or size(count) <= max_bytes
    assert count == len(rows) or size(count + 1) > max_bytes


def test_the_size_counts_before_compression(server):
    rows = [Row(number, '{"a":"%s"}' % ("x" * 1_000)) for number in range(10)]
    with HttpClient(server.url, token=TOKEN, gzip=True, max_batch_bytes=5_060) as client:
        assert client.max_batch_bytes == 5_060
        assert client.fit(rows) == 5


class Counted(Format):
    """Counts the events that it formats."""

    def __init__(self):
        self.formatted = 0

    def part(self, item):
        self.formatted += 1
        return super().part(item)


def test_what_was_formatted_to_know_its_size_is_not_formatted_again(server):
    rows = [Row(number, f'{{"n":{number}}}') for number in range(6)]
    form = Counted()
    with HttpClient(server.url, token=TOKEN, format=form) as client:
        assert client.fit(rows) == 6
        client.upload(rows[:4])
        assert form.formatted == 6
        client.upload(rows[4:])
    assert form.formatted == 8
    assert [json.loads(stored)["n"] for stored in server.stored.values()] == [*range(6)]


def test_events_of_another_batch_are_not_taken_for_those_that_were_formatted(server, client):
    same_ids = [[Row(number, f'{{"n":{number + more}}}') for number in range(3)] for more in (0, 10)]
    client.fit(same_ids[0][:2])
    client.upload(same_ids[1])
    client.fit(same_ids[0])
    client.upload(same_ids[0][1:])
    assert [json.loads(stored)["n"] for stored in server.stored.values()] == [10, 11, 12, 1, 2]


@pytest.mark.parametrize("size", [0, -1, True, 1.5, "1", None])
def test_a_size_that_can_not_work_is_refused(size):
    with pytest.raises(
        ConfigurationError, match=r"^max_batch_bytes is .*, expected a whole number of at least 1$"
    ):
        HttpClient("https://ingest.example", max_batch_bytes=size)


def test_a_client_learns_the_size_from_the_answers(server):
    rows = [Row(number, '{"a":"%s"}' % ("x" * 991)) for number in range(10)]  # 1 000 bytes each with the comma
    with HttpClient(server.url, token=TOKEN) as client:
        server.script(413, 413)
        assert failure_of(client, rows).status == 413
        assert client.max_batch_bytes == 5_000
        assert failure_of(client, rows[:6]).status == 413
        assert client.max_batch_bytes == 3_000
        client.upload(rows[:4])
        assert client.max_batch_bytes == 4_001
        assert client.fit(rows) == 4


def test_a_413_for_one_event_says_nothing_about_the_size_of_a_batch(server, client):
    server.script(413)

    assert failure_of(client).status == 413
    assert client.max_batch_bytes == 1_048_576


def test_a_limit_that_was_lowered_is_learned_again():
    size = LearnedSize(1_000)
    size.accepted(900)
    assert size.max_bytes == 1_000
    size.refused(950)
    assert size.max_bytes == 900
    size.refused(800)
    assert size.max_bytes == 400
    size.accepted(850)
    assert size.max_bytes == 400


def test_a_key_of_the_body_is_json():
    assert msgspec.json.decode(KeyedArray("é\n").body([])) == {"é\n": []}

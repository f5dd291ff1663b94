from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.failures import ConfigurationError, HttpFailure, TransportFailure, UploadFailure
from outbox.testing.answers import Answer
from outbox.upload.client import HttpClient
from outbox.upload.formats import Format
from outbox.upload.results import results
from peers import TOKEN, Peer, Row, answers, failure_of, repeats

GOOD, BAD = Row(7, '{"a":1}'), Row(8, '{"a":"poison"}')


@pytest.fixture
def client(server):
    with HttpClient(server.url, token=TOKEN, read_answer="results") as made:
        yield made


def as_texts(outcomes):
    return {row_id: None if failure is None else str(failure) for row_id, failure in outcomes.items()}


# --- the built-in reader ---


def test_a_207_names_the_outcome_of_each_event(server, client):
    server.results = True

    outcomes = client.upload([BAD, GOOD])

    assert list(outcomes) == [8, 7]
    assert outcomes[7] is None
    assert outcomes[8].status == 422
    assert outcomes[8].body_snippet == '{"status":422,"error":"invalid event"}'
    assert list(server.stored.values()) == [GOOD.payload_json]


def test_results_of_the_test_server_name_the_ids_of_the_format(server):
    server.format, server.results = "cloudevents-batch", True
    with HttpClient(server.url, token=TOKEN, format="cloudevents-batch", read_answer="results") as client:
        outcomes = client.upload([BAD, GOOD])

    assert outcomes[8].body_snippet == '{"status":422,"error":"invalid event","id":"event-8"}'
    assert outcomes[7] is None
    assert server.stored == {"event-7": GOOD.payload_json}


@pytest.mark.parametrize(
    "body",
    [
        '[{"status":201},{"status":503,"id":"x"}]',
        '{"results":[{"status":201},{"status":503,"id":"x"}]}',
        '{"took":3,"items":[{"status":201},{"status":503,"id":"x"}]}',
    ],
)
def test_the_list_is_the_body_or_a_field_of_it(server, client, body):
    server.script(Answer(200, body))

    assert as_texts(client.upload([GOOD, BAD])) == {7: None, 8: '503 Service Unavailable: {"status":503,"id":"x"}'}


def test_a_status_of_its_own_has_no_reason():
    (failure,) = results(b'[{"status":799}]', ["event-7"])

    assert str(failure) == '799: {"status":799}'


@pytest.mark.parametrize("name", ["id", "event_id"])
def test_results_with_the_ids_of_the_events_may_come_in_any_order(server, client, name):
    body = [{"status": 503, name: "event-8"}, {"status": 200, name: "event-7"}]
    server.script(Answer(200, json.dumps(body)))

    outcomes = client.upload([GOOD, BAD])

    assert list(outcomes) == [7, 8]
    assert outcomes[7] is None
    assert outcomes[8].status == 503


@pytest.mark.parametrize("other", ["event-7", "event-9", None, 8, [8]])
def test_ids_that_fit_only_in_part_are_a_transport_failure(server, client, other):
    server.script(Answer(200, json.dumps([{"status": 200, "id": "event-7"}, {"status": 503, "id": other}])))

    text = "transport: the ids of the results are not those of the events"
    assert str(failure_of(client, [GOOD, BAD])) == text


UNREADABLE = ["", "ok", "{}", "[1]", "[{}]", '[{"status":"200"},{"status":"500"}]', '{"results":5}', "[" * 9_999]


@pytest.mark.parametrize("body", UNREADABLE)
@pytest.mark.parametrize("status", [200, 201, 202, 204])
def test_a_2xx_that_can_not_be_read_accepts_the_batch_and_is_logged_once(server, client, caplog, status, body):
    server.script(*[Answer(status, "" if status == 204 else body)] * 2)

    assert client.upload([GOOD, BAD]) is None
    assert client.upload([GOOD, BAD]) is None

    (record,) = caplog.records
    assert record.event_name == "outbox.unreadable_answer"
    assert record.status == status


@pytest.mark.parametrize("body", UNREADABLE)
def test_a_207_that_can_not_be_read_is_a_transport_failure(server, client, body):
    server.script(Answer(207, body))

    assert str(failure_of(client, [GOOD, BAD])).startswith("transport: a 207 that can't be read: ")


@pytest.mark.parametrize("status", [200, 207])
def test_a_list_of_another_length_is_a_transport_failure(server, client, status):
    server.script(*(Answer(status, json.dumps([{"status": 200}] * count)) for count in (0, 1, 3)))

    for count in (0, 1, 3):
        failure = failure_of(client, [GOOD, BAD])
        assert str(failure) == f"transport: the answer has {count} results for 2 events"


def test_an_answer_that_is_too_long_is_a_transport_failure(server):
    body = json.dumps([{"status": 200}, {"status": 400}])
    server.script(Answer(200, body), Answer(200, f"{body} "))
    with HttpClient(server.url, token=TOKEN, read_answer="results", max_answer_bytes=len(body)) as client:
        assert as_texts(client.upload([GOOD, BAD])) == {7: None, 8: '400 Bad Request: {"status":400}'}
        assert str(failure_of(client, [GOOD, BAD])) == f"transport: the answer has more than {len(body)} bytes"


def test_an_answer_that_breaks_off_is_a_transport_failure():
    cut = b'HTTP/1.1 200 \r\nContent-Length: 99\r\n\r\n[{"status":200}]'
    with Peer(answers(cut)) as peer, HttpClient(peer.url, token=TOKEN, read_answer="results") as client:
        assert isinstance(failure_of(client), TransportFailure)


def test_an_answer_without_an_end_is_a_transport_failure():
    endless = repeats(b"HTTP/1.1 200 \r\n\r\n", b"x" * 9_999)
    with Peer(endless) as peer, HttpClient(peer.url, token=TOKEN, read_answer="results") as client:
        assert str(failure_of(client)) == "transport: the answer has more than 65536 bytes"


@pytest.mark.parametrize("status", [400, 401, 413, 429, 500])
def test_other_answers_hold_for_the_whole_batch(server, client, status):
    server.script(Answer(status, '[{"status":200},{"status":200}]'))

    assert failure_of(client, [GOOD, BAD]).status == status


RESULTS = st.lists(st.dictionaries(st.sampled_from(["status", "error"]), st.integers() | st.text(max_size=5)))


@given(st.binary() | RESULTS.map(lambda value: json.dumps(value).encode()))
def test_the_built_in_reader_returns_outcomes_or_raises(body):
    try:
        found = results(body, ["event-7"])
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, StopIteration):
        return
    assert all(one is None or isinstance(one, HttpFailure) for one in found)


# --- a reader of one's own ---


class Bulk(Format):
    content_type = "application/x-ndjson"

    def part(self, item):
        return b'{"create":{"_id":"%d"}}\n%s\n' % (item.id, item.payload_json.encode())

    def body(self, parts):
        return b"".join(parts)


def read_bulk(status, headers, body):
    outcomes = []
    for item in json.loads(body)["items"]:
        result = item["create"]
        is_there = result["status"] in (201, 409)
        outcomes.append(None if is_there else HttpFailure(result["status"], "", result["error"]["reason"]))
    return outcomes


def test_elasticsearch_answers_for_each_event(server):
    server.format = "elasticsearch"
    with HttpClient(server.url, path="/_bulk", token=TOKEN, format=Bulk(), read_answer=read_bulk) as client:
        assert as_texts(client.upload([GOOD, BAD])) == {7: None, 8: "400: invalid event"}
        assert as_texts(client.upload([GOOD])) == {7: None}

    assert server.stored == {"7": GOOD.payload_json}


def test_a_reader_may_name_failures_by_event_id(server):
    server.script(200, 200)
    read = {"event-8": HttpFailure(422), "event-7": None}
    with HttpClient(server.url, token=TOKEN, read_answer=lambda *_: read) as client:
        assert as_texts(client.upload([GOOD, BAD, Row(9)])) == {7: None, 8: "422", 9: None}
        assert str(failure_of(client, [BAD])) == "transport: the answer names 1 events that were not sent"


def test_a_reader_gets_status_headers_and_body(server):
    seen = []
    server.script(Answer(202, "text", {"X-Request-Id": "17"}))
    with HttpClient(server.url, token=TOKEN, read_answer=lambda *answer: seen.append(answer) or [None]) as client:
        assert client.upload([GOOD]) == {7: None}

    ((status, headers, body),) = seen
    assert (status, headers["X-Request-Id"], body) == (202, "17", b"text")


@pytest.mark.parametrize("failure", [HttpFailure(429, retry_after_ms=7_000), TransportFailure("try again")])
def test_a_reader_may_fail_the_whole_batch(server, failure):
    def read(status, headers, body):
        raise failure

    with HttpClient(server.url, token=TOKEN, read_answer=read) as client:
        found = failure_of(client)

    assert str(found) == str(failure)
    assert vars(found) == vars(failure)


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (HttpFailure(400, f"no\n{TOKEN}", f"not\n{TOKEN}"), "400 no [REDACTED-TOKEN]: not [REDACTED-TOKEN]"),
        (TransportFailure(f"not\n{TOKEN}"), "transport: not [REDACTED-TOKEN]"),
        (UploadFailure(f"not {TOKEN}"), "not [REDACTED-TOKEN]"),
        (HttpFailure(400, "", "x" * 999), "400: " + "x" * 200),
    ],
)
def test_no_outcome_shows_a_credential(server, failure, text):
    with HttpClient(server.url, token=TOKEN, read_answer=lambda *_: [failure, None]) as client:
        server.script(200)
        outcomes = client.upload([BAD, GOOD])

    assert as_texts(outcomes) == {8: text, 7: None}


# --- settings ---


@pytest.mark.parametrize("read", ["result", 5, b"results"])
def test_what_can_not_read_is_refused(read):
    with pytest.raises(ConfigurationError, match=r"^read_answer is .*, expected 'results', a callable or None$"):
        HttpClient("https://ingest.example", read_answer=read)


@pytest.mark.parametrize("size", [0, True, "5", None, 1.5])
def test_a_size_that_can_not_work_is_refused(size):
    with pytest.raises(
        ConfigurationError, match=r"^max_answer_bytes is .*, expected a whole number of at least 1$"
    ):
        HttpClient("https://ingest.example", read_answer="results", max_answer_bytes=size)

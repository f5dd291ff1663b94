from __future__ import annotations

import pytest

from outbox import reasons


@pytest.mark.parametrize(
    ("error", "meaning"),
    [
        ("transport: refused", "the service gave no usable answer"),
        (
            "permanent: decode observation event: event_type: invalid value 'x'",
            "the flusher did not know the event type; after `outbox requeue`, the event is sent as it is",
        ),
        (
            "permanent: decode observation event: the column retry_count is 'x', expected",
            "an integer column holds an invalid value, which another program wrote",
        ),
        ("permanent: decode observation event: x", "the payload is not a JSON object"),
        ("permanent: 404 Not Found", "the service accepts no events at this URL; check the URL and its path"),
        (
            "permanent: 405 Method Not Allowed",
            "the service accepts no events at this URL; check the URL and its path",
        ),
        ("permanent: 422 no", "the service rejected this event"),
        ("aged-out (rate-limited): 429", "the event is too old for another try"),
        ("401 Unauthorized", "the service rejected the token"),
        ("403 Forbidden", "the service rejected the token"),
        ("408 Request Timeout", "the service was too slow"),
        ("425 Too Early", "the service was not ready"),
        ("429 Too Many Requests", "the service asks to slow down"),
        ("302 Found", "the service redirects, and redirects are not followed; check the URL"),
        ("404 Not Found", "the service accepts no events at this URL; check the URL and its path"),
        ("409 Conflict", "the service rejected the request; check the URL and what the service accepts"),
        ("503 Service Unavailable", "the service is failing"),
        ("what?", "the upload failed"),
    ],
)
def test_a_failure_is_put_in_words(error, meaning):
    assert reasons.in_words(error) == f"{meaning} ({error})"


@pytest.mark.parametrize(
    ("failure", "logged"),
    [
        ("422 Unprocessable Entity: what it got: a payload", "422 Unprocessable Entity"),
        ("503 Service Unavailable", "503 Service Unavailable"),
        ("transport: refused: 10.0.0.1", "transport: refused: 10.0.0.1"),
        (None, None),
    ],
)
def test_the_log_shows_of_an_answer_the_status_alone(failure: str | None, logged: str | None) -> None:
    assert reasons.without_answer(failure) == logged


@pytest.mark.parametrize(
    ("waits_for", "meaning"),
    [
        ("proof", "the service rejected this event alone"),
        ("row", "this event failed alone while the service seemed to work"),
        ("service", "the service rejected the request; check the URL and what the service accepts"),
    ],
)
def test_a_row_that_failed_alone_says_nothing_about_the_service(waits_for, meaning):
    assert reasons.in_words("422 Bad", waits_for) == f"{meaning} (422 Bad)"


@pytest.mark.parametrize(
    ("error", "kept"),
    [
        ("503 Service Unavailable", "503 Service Unavailable"),
        ("503 Service Unavailable: card 4111", "503 Service Unavailable: …"),
        ("permanent: 422 Unprocessable Entity: card 4111\nor: 4112", "permanent: 422 Unprocessable Entity: …"),
        ("aged-out: 503 Down: card 4111", "aged-out: 503 Down: …"),
        ("aged-out (rate-limited): 429 Slow: card 4111", "aged-out (rate-limited): 429 Slow: …"),
        ("client error: ValueError: card 4111", "client error: ValueError: …"),
        ("permanent: decode observation event: card 4111", "permanent: decode observation event: …"),
        ("transport: no route to host: 4", "transport: no route to host: 4"),
        ("aged-out: transport: no route to host", "aged-out: transport: no route to host"),
        ("cancelled: the order was cancelled: twice", "cancelled: the order was cancelled: twice"),
        ("of a client's own kind: card 4111", "…"),
    ],
)
def test_without_its_body_a_failure_repeats_no_payload(error, kept):
    assert reasons.without_body(error) == kept

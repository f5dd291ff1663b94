from __future__ import annotations

import pickle

import pytest

from outbox import HttpFailure, OutboxError, TransportFailure, UploadFailure, failures


@pytest.mark.parametrize(
    "failure",
    [HttpFailure(429, "Too Many Requests", "slow", retry_after_ms=9), TransportFailure("refused")],
)
def test_a_failure_survives_pickling_with_all_it_knows(failure: UploadFailure) -> None:
    copy = pickle.loads(pickle.dumps(failure))  # noqa: S301 - our own bytes
    assert type(copy) is type(failure)
    assert str(copy) == str(failure)
    assert vars(copy) == vars(failure)


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
    assert failures.without_answer(failure) == logged


def test_every_error_derives_from_outbox_error() -> None:
    classes = [found for found in vars(failures).values() if isinstance(found, type)]
    assert len(classes) >= 9
    assert all(issubclass(found, OutboxError) for found in classes)
    assert all(found.__name__ in failures.__doc__ for found in classes)

from __future__ import annotations

import pickle
from http import HTTPStatus

import pytest

from outbox import ConfigurationError, HttpFailure, OutboxError, TransportFailure, UploadFailure, failures
from outbox.failures import check_failure


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
    ("arguments", "named"),
    [
        ({"status": "503"}, "status is '503', expected a whole number"),
        ({"status": None}, "status is None, expected a whole number"),
        ({"status": True}, "status is True, expected a whole number"),
        ({"retry_after_ms": "30"}, "retry_after_ms is '30', expected a whole number, in milliseconds, or None"),
        ({"retry_after_ms": 0.5}, "retry_after_ms is 0.5, expected a whole number, in milliseconds, or None"),
        ({"retry_after_ms": False}, "retry_after_ms is False, expected a whole number, in milliseconds, or None"),
    ],
)
def test_a_failure_that_can_not_be_judged_is_refused(arguments: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigurationError) as refused:
        HttpFailure(**{"status": 503, **arguments})
    assert str(refused.value) == named


class Halfway(HttpFailure):
    def __init__(self) -> None:
        self.reason_phrase = self.body_snippet = ""


@pytest.mark.parametrize("name", ["status", "retry_after_ms"])
def test_a_failure_that_was_broken_later_is_refused(name: str) -> None:
    failure = HttpFailure(429)
    check_failure(failure)
    setattr(failure, name, 30.5)
    with pytest.raises(ConfigurationError, match=f"{name} is 30.5, expected a whole number"):
        check_failure(failure)


def test_a_failure_without_its_fields_is_refused() -> None:
    with pytest.raises(AttributeError, match="status"):
        check_failure(Halfway())


def test_a_failure_without_a_status_has_only_a_text() -> None:
    check_failure(TransportFailure("refused"))


def test_a_status_may_be_one_of_the_standard_library() -> None:
    assert HttpFailure(HTTPStatus.BAD_GATEWAY).status == 502


def test_every_error_derives_from_outbox_error() -> None:
    classes = [found for found in vars(failures).values() if isinstance(found, type)]
    assert len(classes) >= 9
    assert all(issubclass(found, OutboxError) for found in classes)
    assert all(found.__name__ in failures.__doc__ for found in classes)


def test_failure_texts() -> None:
    assert str(HttpFailure(401, "Unauthorized", '{"error":"session_revoked"}')) == (
        '401 Unauthorized: {"error":"session_revoked"}'
    )
    assert str(HttpFailure(503, "Service Unavailable")) == "503 Service Unavailable"
    assert str(HttpFailure(599)) == "599"
    assert str(TransportFailure("connection refused")) == "transport: connection refused"

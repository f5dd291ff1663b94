"""Signatures over the bytes of a request."""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Mapping
from typing import Protocol

from outbox.failures import ConfigurationError, TransportFailure
from outbox.upload.redaction import private_locals
from outbox.upload.secrets import Private, Secret, current, texts


class Sign(Protocol):
    """A function, or another callable, that signs a request."""

    def __call__(self, body: bytes, message_id: str, now_ms: int, /) -> Mapping[str, str]:
        """Return the headers that sign these bytes, which are exactly those that are sent.

        `message_id` is the event's id if the format sends one event per request, otherwise the `Idempotency-Key`
        of the batch. It is the same each time the same events are sent. `now_ms` is the time of this try.
        """
        ...


class StandardWebhooks(Private):
    """Signs as Standard Webhooks defines it: `webhook-id`, `webhook-timestamp` and `webhook-signature`.

    Each secret is `whsec_` and base64, or base64 alone, or a callable that returns it before each request. With
    several secrets each request has a signature of each, so a receiver can change from one to the next.

    Raises `ConfigurationError` for a secret that is not base64.
    """

    def __init__(self, *secrets: Secret) -> None:
        self._given = secrets
        self._used: tuple[str, ...] = ()
        try:
            with private_locals():
                _check(secrets)
        except ConfigurationError:
            del self, secrets  # crash reports show local variables
            raise

    @property
    def credentials(self) -> tuple[str, ...]:
        """The secrets that are known, with and without their prefix."""
        return tuple(form for text in (*texts(*self._given), *self._used) for form in (text, _base64(text)))

    def __call__(self, body: bytes, message_id: str, now_ms: int) -> dict[str, str]:
        """Return the three headers. Raises `TransportFailure` if a callable returns no secret."""
        second = str(now_ms // 1_000)
        signed = f"{message_id}.{second}.".encode() + body
        secrets = [current(secret) for secret in self._given]
        self._used = texts(*secrets)
        signatures = [hmac.digest(_key(secret), signed, hashlib.sha256) for secret in secrets]
        return {
            "webhook-id": message_id,
            "webhook-timestamp": second,
            "webhook-signature": " ".join(f"v1,{base64.b64encode(one).decode()}" for one in signatures),
        }


def _check(secrets: tuple[object, ...]) -> None:
    if not secrets:
        raise ConfigurationError("StandardWebhooks has no secret, expected at least one")
    for secret in secrets:
        if not callable(secret) and (problem := _problem_of(secret)):
            raise ConfigurationError(f"StandardWebhooks: {problem}")


def _problem_of(secret: object) -> str | None:
    """Return why this can't be a secret, or None. The text does not contain it."""
    expected = "expected whsec_ and base64"
    if not isinstance(secret, str):
        return f"a secret is of type {type(secret).__name__}, {expected}"
    try:
        is_base64 = bool(_decoded(secret))
    except ValueError:
        is_base64 = False
    return None if is_base64 else f"a secret is not base64, {expected}"


def _key(secret: str | None) -> bytes:
    if problem := _problem_of(secret):
        raise TransportFailure(f"sign: {problem}")
    return _decoded(str(secret))


def _decoded(secret: str) -> bytes:
    text = _base64(secret)
    return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)


def _base64(secret: str) -> str:
    return secret.removeprefix("whsec_")

"""What the service of one destination answers, drawn from a stream of its own."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from outbox import BatchItem, HttpFailure, TransportFailure

from .server import Answer, Server

DOWN, LIMIT, AUTH, DRIFT, BUG, LOST_ANSWER = "down", "limit", "auth", "drift", "bug", "lost-answer"
KINDS = (DOWN, LIMIT, AUTH, DRIFT, BUG, LOST_ANSWER)


class Bug(Exception):  # noqa: N818 - it plays a client's bug
    """What a client raises that is no failed upload."""


class Weather:
    """A service whose trouble is of these kinds, until it calms down."""

    def __init__(self, draw: random.Random, kinds: frozenset[str]) -> None:
        self._draw = draw
        self.server = Server(self._answer, is_blameless=DRIFT not in kinds)
        self.calm = False
        self._sky: Callable[[], Answer] = Answer
        self._skies = self._possible_skies(kinds)

    def stir(self) -> None:
        """Let the sky change now and then."""
        if self._draw.random() < 0.03:
            self.server.logged_in = True
            self._sky = self._draw.choice(self._skies)

    def settle_in(self) -> None:
        """Let trouble stay, if this service knows any."""
        self._sky = self._draw.choice(self._skies[3:] or self._skies)

    def calm_down(self) -> None:
        """Accept everything from now on, except poison."""
        self.calm = self.server.logged_in = True

    def _possible_skies(self, kinds: frozenset[str]) -> list[Callable[[], Answer]]:
        choice = self._draw.choice
        skies: list[Callable[[], Answer]] = [Answer, Answer, Answer]
        if DOWN in kinds:
            skies += [
                lambda: _failed(TransportFailure("connection refused")),
                lambda: _failed(HttpFailure(choice((500, 502, 301, 302, 100, 408, 425)), "Trouble")),
                lambda: _failed(HttpFailure(503, "Trouble", retry_after_ms=choice((None, 1_000, 300_000)))),
            ]
        if LIMIT in kinds:
            skies.append(lambda: _failed(HttpFailure(429, "Slow", retry_after_ms=choice((None, 1_000, 40_000)))))
        if AUTH in kinds:
            skies.append(lambda: _failed(HttpFailure(choice((401, 403)), "Who")))
            skies.append(self._logged_out)
        if DRIFT in kinds:
            skies.append(lambda: _failed(HttpFailure(choice((400, 404, 413, 422)), "No")))
        if LOST_ANSWER in kinds:
            skies += [
                lambda: Answer(TransportFailure("reset by peer")),
                lambda: Answer(HttpFailure(choice((500, 504)), "Late")),
            ]
        if BUG in kinds:
            skies.append(lambda: _failed(choice((Bug("bug"), KeyboardInterrupt()))))
        return skies

    def _logged_out(self) -> Answer:
        self.server.logged_in = False
        return _failed(HttpFailure(401, "Who"))

    def _answer(self, batch: Sequence[BatchItem]) -> Answer:
        sky: Callable[[], Answer] = Answer
        if not self.calm:
            sky = self._sky if self._draw.random() < 0.8 else self._draw.choice(self._skies)
        answer = sky()
        if answer.stored and any("poison" in item.payload_json for item in batch):
            return _failed(HttpFailure(422, "No", "poison"))
        return answer


def _failed(error: BaseException) -> Answer:
    return Answer(error, stored=False)

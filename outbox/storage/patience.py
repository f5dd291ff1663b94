"""How long to wait before an operation is repeated that the database aborted, or did not answer."""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import chain, repeat

from outbox.clock import monotonic_s

# Average waits between tries; the last one repeats.
_WAITS_S = (0.02, 0.05, 0.1, 0.5, 2.0)


def waits_s(patience_ms: float) -> Iterator[float]:
    """Yield how long to wait before each further try, until `patience_ms` are over. The last try is made then.

    The times are random, so that programs that lost their connections together do not all reconnect together.
    """
    end_s = monotonic_s() + patience_ms / 1_000
    averages_s = chain(_WAITS_S, repeat(_WAITS_S[-1]))
    while (left_s := end_s - monotonic_s()) > 0:
        yield min(next(averages_s) * random.uniform(0.5, 1.5), left_s)  # noqa: S311 - no secret depends on it

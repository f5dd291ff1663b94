"""Compresses bodies."""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable
from importlib import import_module

from outbox.failures import ConfigurationError

ZSTD = "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd"
"""The module of Python that compresses with zstd, or its backport."""

_FROM_BYTES = 1024

Compressor = Callable[[bytes], bytes]


def compressor(*, use_gzip: bool, use_zstd: bool) -> tuple[str, Compressor] | None:
    """Return the name of the content coding and the function, or None. Raises `ConfigurationError`."""
    if use_gzip and use_zstd:
        raise ConfigurationError("gzip and zstd are both set, expected at most one")
    if use_gzip:
        return "gzip", lambda body: gzip.compress(body, mtime=0)
    if not use_zstd:
        return None
    try:
        return "zstd", import_module(ZSTD).compress
    except ImportError:
        raise ConfigurationError("zstd needs an extra: pip install 'observation-outbox[zstd]'") from None


def compressed(body: bytes, chosen: tuple[str, Compressor] | None) -> tuple[bytes, str | None]:
    """Return the body as it is sent, and its content coding. A body up to 1 KiB is not compressed."""
    if chosen is None or len(body) <= _FROM_BYTES:
        return body, None
    name, compress = chosen
    return compress(body), name

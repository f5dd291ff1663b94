from __future__ import annotations

import gzip
import sys

import pytest

from outbox.failures import ConfigurationError
from outbox.upload import compression
from outbox.upload.client import HttpClient
from peers import TOKEN, Row


@pytest.mark.parametrize("coding", ["gzip", "zstd"])
@pytest.mark.parametrize(("length", "is_compressed"), [(1024, False), (1025, True)])
def test_bodies_over_one_kib_are_compressed_on_request(server, coding, length, is_compressed):
    if coding == "zstd":
        pytest.importorskip(compression.ZSTD)
    payload = '{"a":"%s"}' % ("x" * (length - 10))
    with HttpClient(server.url, token=TOKEN, **{coding: True}) as client:
        client.upload([Row(1, payload)])

    assert list(server.stored.values()) == [payload]
    assert server.requests[0].headers.get("Content-Encoding") == (coding if is_compressed else None)
    assert (len(server.requests[0].body) < 100) == is_compressed


def test_the_same_body_is_compressed_to_the_same_bytes(server, noon):
    row = Row(1, '{"a":"%s"}' % ("x" * 2_000))
    with HttpClient(server.url, token=TOKEN, gzip=True) as client:
        client.upload([row])
        noon.travel(hours=1)
        client.upload([row])

    first, second = (request.body for request in server.requests)
    assert first == second
    assert gzip.decompress(first) == f"[{row.payload_json}]".encode()


def test_two_compressions_are_refused():
    with pytest.raises(ConfigurationError, match="gzip and zstd are both set, expected at most one"):
        HttpClient("https://ingest.example", gzip=True, zstd=True)


def test_without_the_extra_zstd_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, compression.ZSTD, None)
    with pytest.raises(ConfigurationError, match=r"zstd needs an extra: pip install 'observation-outbox\[zstd\]'"):
        HttpClient("https://ingest.example", zstd=True)

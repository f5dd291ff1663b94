from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import Outbox


@pytest.fixture(autouse=True)
def _only_named_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing of the environment reaches a test, and no test reaches the user's own outbox."""
    for name in ("OUTBOX_CAPTURE", "OUTBOX_DATABASE_URL", "OUTBOX_URL", "OUTBOX_TOKEN", "OUTBOX_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'outbox.db'}"


@pytest.fixture
def outbox(url: str) -> Iterator[Outbox]:
    with Outbox.open(url, synchronous="NORMAL") as opened:
        yield opened

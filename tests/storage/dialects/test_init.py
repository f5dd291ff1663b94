import pytest

from outbox import ConfigurationError, Outbox
from outbox.storage.dialects import dialect_named, dialect_of, dialects


def test_each_dialect_is_found_by_its_names() -> None:
    assert {name for dialect in dialects() for name in dialect.names} >= {
        "sqlite",
        "postgresql",
        "postgres",
        "mysql",
        "mariadb",
    }
    assert all(dialect_named(name) is dialect for dialect in dialects() for name in dialect.names)


def test_the_dialect_of_an_engine_is_that_of_its_connections(outbox: Outbox) -> None:
    with outbox.engine.connect() as connection:
        assert dialect_of(connection) is dialect_of(outbox.engine) is dialect_named("sqlite")


@pytest.mark.parametrize("opener", [Outbox, Outbox.open])
@pytest.mark.parametrize("url", ["oracle://localhost/shop", "nothing:///outbox.db", "sqlit:///outbox.db"])
def test_a_database_without_a_dialect_is_refused_with_the_names_of_those_that_have_one(
    opener, url: str, tmp_path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    known = "expected one of .*mariadb, mysql, postgres, postgresql, sqlite"
    with pytest.raises(
        ConfigurationError, match=f"no dialect for the database '{url.split(':', maxsplit=1)[0]}', {known}"
    ):
        opener(url)
    assert list(tmp_path.iterdir()) == []

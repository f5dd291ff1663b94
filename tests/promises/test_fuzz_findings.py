"""What fuzzing found: each input once ended in something else than a result or an `OutboxError`."""

import pytest
from click.testing import CliRunner

from builders import ScriptedClient, rule_fired, statuses
from outbox import ConfigurationError, Outbox, Policy, StorageError
from outbox.cli import main

pytestmark = pytest.mark.traced

TOO_LARGE = 2**63


def run(url: str, *arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["--database", url, *arguments])
    assert isinstance(result.exception, SystemExit | None), result.exception
    return result.exit_code, result.output


def test_a_file_that_no_system_can_have_is_refused(tmp_path) -> None:
    url = f"sqlite:///{tmp_path}/{'x' * 5_000}"
    with pytest.raises(StorageError, match="can't create the database"):
        Outbox.open(url)
    assert run(url, "upgrade")[0] == run(url, "status")[0] == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["\udcff.db", "a\0b.db", "\0&mode=memory"])
def test_a_file_whose_name_is_no_text_is_refused(name: str, tmp_path) -> None:
    url = f"sqlite:///{tmp_path}/{name}"
    with pytest.raises(ConfigurationError, match="the database is not an SQLAlchemy URL"):
        Outbox.open(url)
    assert run(url, "upgrade")[0] == run(url, "status")[0] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "named",
    [
        "sqlite://host/outbox.db",
        "sqlite:///outbox.db?timeout=abc",
        "sqlite:///outbox.db?uri=maybe",
        "sqlite:///outbox.db?check_same_thread=q",
        "sqlite://?uri=true",
        "sqlite://?uri=true&cache=shared",
    ],
)
def test_a_database_url_with_a_part_that_cannot_be_used_is_refused(named: str) -> None:
    with pytest.raises(ConfigurationError, match="the database URL names a host or an option"):
        Outbox.open(named)
    assert run(named, "status")[0] == 2


@pytest.mark.filterwarnings("ignore:Query string argument:sqlalchemy.exc.SAWarning")
def test_a_file_is_none_in_memory_whatever_its_url_says_besides(url: str, tmp_path) -> None:
    with Outbox.open(f"{url}?mode=memory") as outbox:
        outbox.enqueue(rule_fired())
    assert (tmp_path / "outbox.db").stat().st_mode & 0o777 == 0o600


def test_an_option_of_the_driver_that_is_too_large_is_a_storage_error(url: str) -> None:
    with pytest.raises(StorageError, match="too large|greater than maximum"):
        Outbox.open(f"{url}?cached_statements={10**14}")


def test_there_is_no_event_with_an_id_that_no_database_can_hold(outbox: Outbox) -> None:
    for row_id in (TOO_LARGE, -TOO_LARGE - 1, 10**30):
        assert outbox.get(row_id) is None


@pytest.mark.parametrize("when", [TOO_LARGE, 10**30, -TOO_LARGE - 1])
def test_a_time_that_no_database_can_hold_is_refused(outbox: Outbox, when: int) -> None:
    with pytest.raises(ConfigurationError, match="older_than"):
        outbox.find(older_than=when)
    with pytest.raises(ConfigurationError, match="older_than"):
        outbox.requeue_abandoned(older_than=when)


@pytest.mark.parametrize("limit", [-1, TOO_LARGE])
def test_a_limit_that_is_none_is_refused(outbox: Outbox, limit: int) -> None:
    with pytest.raises(ConfigurationError, match="limit is"):
        outbox.find(limit=limit)


def test_an_unknown_status_to_look_for_is_refused(outbox: Outbox) -> None:
    with pytest.raises(ConfigurationError, match="status is 'lost', expected one of pending, sending, sent"):
        outbox.find(status="lost")


def test_no_event_has_a_type_that_is_not_unicode(outbox: Outbox, url: str) -> None:
    with pytest.raises(ConfigurationError, match="in valid Unicode"):
        outbox.find(event_type="\udcff")
    assert run(url, "list", "--type", "\udcff")[0] == 2


@pytest.mark.parametrize(
    "field",
    ["batch_size", "lease_ms", "backoff_ms", "rate_limit_ms", "pause_ms", "max_age_ms", "max_rows", "keep_sent_ms", "unpark_limit", "unpark_spread_ms"],
)  # fmt: skip
def test_no_policy_is_beyond_what_a_database_can_count(outbox: Outbox, url: str, field: str) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is {TOO_LARGE}, expected"):
        Policy(**{field: TOO_LARGE})
    outbox.enqueue(rule_fired())
    with Outbox(url, policy=Policy(**{field: 2**53 - 1})) as patient:
        assert patient.flush(ScriptedClient()).sent == 1
    assert statuses(outbox) == ["sent"]


@pytest.mark.parametrize("limit", [TOO_LARGE - 1, TOO_LARGE, 10**30])
def test_a_limit_beyond_what_a_database_can_count_is_wrong_use(outbox: Outbox, url: str, limit: int) -> None:
    assert run(url, "list", "--limit", str(limit))[0] == 2


@pytest.mark.parametrize("module", ["", ".", ".relative", "..", "a..b"])
def test_what_is_no_modules_name_is_wrong_use(outbox: Outbox, url: str, module: str) -> None:
    exit_code, output = run(url, "--types", module, "status")
    assert exit_code == 2
    assert "expected the name of a module, such as shop.events" in " ".join(output.split())

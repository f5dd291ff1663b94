from __future__ import annotations

from pathlib import Path

import pytest

from outbox import ConfigurationError
from outbox.cli.config_table import Table


def test_paths_headers_and_secrets_are_those_that_the_settings_name(tmp_path, monkeypatch):
    headers = {"X-Shop": "17", "X-Api-Key": {"env": "SHOP_KEY"}, "X-Part": {"file": "part"}}
    settings = {"headers": headers, "webhook_secret_file": "hook", "token_env": "BILLING_TOKEN"}
    table = Table("outbox.toml: destinations.billing.", tmp_path, settings)
    assert table.path("ca.pem") == tmp_path / "ca.pem"
    assert table.path("/etc/ca.pem") == Path("/etc/ca.pem")
    monkeypatch.setenv("SHOP_KEY", "k-1")
    monkeypatch.setenv("BILLING_TOKEN", "b-1")
    (tmp_path / "hook").write_text("whsec_x")
    (tmp_path / "part").write_text("a part")
    assert table.header("X-Shop") == "17"
    assert table.header("X-Api-Key")() == "k-1"
    assert table.header("X-Part")() == "a part"
    assert table.secret("webhook_secret")() == "whsec_x"
    assert table.secret("token")() == "b-1"
    assert table.secret("password")() is None


def test_an_error_of_a_secret_names_the_file_the_destination_and_the_setting(tmp_path):
    settings = {"token_file": "none", "headers": {"X-Api-Key": {"file": "none"}}}
    table = Table("outbox.toml: destinations.billing.", tmp_path, settings)
    for setting, reader in (
        ("token_file", table.secret("token")),
        ("headers.X-Api-Key", table.header("X-Api-Key")),
    ):
        message = f"^outbox.toml: destinations.billing.{setting} is .*none', expected a file that holds the secret"
        with pytest.raises(ConfigurationError, match=message):
            reader()

from __future__ import annotations

import pytest

from command_line import read_config
from outbox import ConfigurationError

REFUSED = [
    ("[destinations.billing]\nauth = 'basic'", "auth is 'basic', expected destinations.billing.user$"),
    ("[destinations.billing]\nurll = 'x'", "destinations.billing.urll is unknown; the nearest setting is destinations.billing.url"),
    ("[destinations.billing]\nallow_insecure = 'yes'", "destinations.billing.allow_insecure is 'yes', expected true or false"),
    ("[destinations.billing]\ndeadline_ms = true", "destinations.billing.deadline_ms is True, expected a whole number"),
    ("[destinations.billing]\ncompression = 'br'", "compression is 'br', expected one of 'gzip', 'zstd'"),
    ("[destinations.billing]\nauth = 'digest'", "auth is 'digest', expected one of 'bearer', 'basic', 'api-key', 'oauth2', 'none'"),
    ("[destinations.billing]\nauth = []", r"auth is \[\], expected one of"),
    ("[destinations.billing]\ncert = ['a', 'b', 'c']", "cert is .*, expected the path of a file, or an array of two paths"),
    ("[destinations.billing]\nverify = ''", "verify is '', expected the path of a file"),
    ("[destinations.billing]\nuser = 'me'", "destinations.billing.user is a setting of auth = 'basic', but auth is 'bearer'"),
    ("[destinations.billing]\nauth = 'none'\ntoken_env = 'T'", "token_env is a setting of auth = 'bearer', but auth is 'none'"),
    ("[destinations.billing]\nauth = 'basic'\npassword_env = 'P'", "auth is 'basic', expected destinations.billing.user$"),
    ("[destinations.billing]\nauth = 'basic'\nuser = 'me'", "auth is 'basic', expected destinations.billing.password_env or password_file"),
    ("[destinations.billing]\ntoken_env = 'T'\ntoken_file = 'f'", "billing.token_env and destinations.billing.token_file are set, expected one of them"),
    ("[destinations.billing]\npath = ''\npath_env = 'P'", "billing.path and destinations.billing.path_env are set, expected one"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_settings_that_are_wrong_or_do_not_fit_together_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ConfigurationError, match=f"/outbox.toml: .*{message}"):
        read_config(tmp_path, text)


SECRET = "s3cret-value"


@pytest.mark.parametrize(
    "line",
    [
        f"token = '{SECRET}'",
        f"password = '{SECRET}'",
        f"api_key = '{SECRET}'",
        f"client_secret = '{SECRET}'",
        f"webhook_secret = '{SECRET}'",
        f"token_env = '{SECRET}'",
        f"path = '/hook?api_key={SECRET}'",
        f"path = ['{SECRET}']",
        f"headers = {{ Authorization = 'Bearer {SECRET}' }}",
        f"headers = {{ X-Shop = ['{SECRET}'] }}",
        f"headers = {{ X-Shop = {{ env = '{SECRET}' }} }}",
        "headers = { X-Shop = {} }",
        "headers = { X-Shop = { env = 'A', file = 'b' } }",
        f"headers = 'X-Api-Key: {SECRET}'",
    ],
)
def test_the_file_holds_no_secret_and_no_error_shows_one(tmp_path, line):
    with pytest.raises(ConfigurationError, match="expected") as refused:
        read_config(tmp_path, f"[destinations.billing]\n{line}")
    assert SECRET not in str(refused.value)

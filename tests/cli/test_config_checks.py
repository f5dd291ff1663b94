from __future__ import annotations

import re

import pytest

from outbox import ConfigurationError
from outbox.cli.config_checks import FILES, NUMBER, TEXT, at_most_one, check, one_of, sources

KNOWN = {
    "name": TEXT,
    "size": NUMBER,
    "cert": FILES,
    "shape": one_of("round", "flat"),
    "code": TEXT._replace(is_shown=False),
    **sources("token"),
}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"nmae": "a"}, "shop.nmae is unknown; the nearest setting is shop.name"),
        ({"name": 1}, "shop.name is 1, expected a text"),
        ({"name": "a", "size": "1"}, "shop.size is '1', expected a whole number"),
        ({"size": True}, "shop.size is True, expected a whole number"),
        ({"cert": ["a"]}, "shop.cert is ['a'], expected the path of a file, or an array of two paths"),
        ({"shape": "odd"}, "shop.shape is 'odd', expected one of 'round', 'flat'"),
        ({"code": 1234}, "shop.code is (not shown), expected a text"),
        ({"token_env": "a b"}, "shop.token_env is (not shown), expected the name of an environment variable"),
        ({"token_file": ""}, "shop.token_file is '', expected the path of a file"),
        (
            {"token": "x"},
            "shop.token is a secret, and the file holds no secrets; expected token_env, the name of an environment"
            " variable, or token_file, the path of a file",
        ),
    ],
)
def test_an_error_names_the_setting_and_what_it_accepts(table, message):
    with pytest.raises(ConfigurationError, match=f"^{re.escape(message)}$"):
        check(table, KNOWN, "shop.", secrets=["token"])


def test_a_table_that_is_right_is_accepted():
    check({"name": "a", "size": 1, "cert": ["a", "b"], "token_env": "TOKEN"}, KNOWN, "shop.", secrets=["token"])
    at_most_one({"token_env": "A", "name": "a"}, sources("token"), "shop.")


def test_settings_that_exclude_each_other_are_named():
    with pytest.raises(
        ConfigurationError, match=r"^shop.token_env and shop.token_file are set, expected one of them"
    ):
        at_most_one({"token_env": "A", "token_file": "a"}, sources("token"), "shop.")

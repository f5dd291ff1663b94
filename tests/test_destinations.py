"""Names of destinations, as callers and the database know them, and routes."""

from __future__ import annotations

from typing import Any

import pytest

from outbox import ConfigurationError
from outbox.destinations import Addressed, Routes, of_destination, shown, stored, stored_names


def destinations_of(routes: Routes, event_type: str) -> tuple[str, ...]:
    ((destinations, *_),) = routes.address([{"event_type": event_type}])
    return destinations


NO_NAMES = ["", "with blank", "tab\t", "line\n", "ü", "x" * 192, 5, b"billing", {"billing": 1}]


@pytest.mark.parametrize(
    ("name", "in_database", "in_words"),
    [
        ("default", "", "default"),
        (None, "", "default"),
        ("billing", "billing", "billing"),
        ("!~", "!~", "!~"),
        ("x" * 191, "x" * 191, "x" * 191),
    ],
)
def test_the_database_stores_an_empty_name_for_the_default(name: Any, in_database: str, in_words: str) -> None:
    assert stored(name) == in_database
    assert shown(in_database) == in_words
    assert of_destination(in_database) == ("" if in_words == "default" else f" of {in_words}")


@pytest.mark.parametrize("name", [*NO_NAMES, ["billing"]])
def test_other_names_are_refused(name: Any) -> None:
    with pytest.raises(
        ConfigurationError, match="^the destination is .*, expected a name: 1 to 191 printable ASCII"
    ):
        stored(name)


def test_names_of_several_destinations_keep_their_order() -> None:
    assert stored_names("billing", "to") == ("billing",)
    assert stored_names(["search", "default", "billing"], "to") == ("search", "", "billing")
    assert stored_names(("search",), "to") == ("search",)


@pytest.mark.parametrize("named", [*NO_NAMES, *([name] for name in NO_NAMES), [], (), {"billing"}, [None]])
def test_no_other_shape_names_destinations(named: Any) -> None:
    with pytest.raises(ConfigurationError, match="^(to|the destination) is .*, expected a"):
        stored_names(named, "to")


def test_a_destination_is_named_once() -> None:
    with pytest.raises(ConfigurationError, match=r"^to is \['a', 'b', 'a'\], expected different destinations"):
        stored_names(["a", "b", "a"], "to")


def test_a_route_names_the_destinations_of_a_type_and_a_star_those_of_all_others() -> None:
    routes = Routes({"order_placed": ["billing", "search"], "ping": "default", "*": ["archive"]})
    assert [destinations_of(routes, event_type) for event_type in ("order_placed", "ping", "other", "*")] == [
        ("billing", "search"),
        ("",),
        ("archive",),
        ("archive",),
    ]
    assert destinations_of(Routes({"ping": "search"}), "other") == destinations_of(Routes(), "ping") == ("",)


@pytest.mark.parametrize("routes", [["order_placed"], "order_placed", {"": "billing"}, {5: "billing"}, {"*": []}])
def test_other_routes_are_refused(routes: Any) -> None:
    with pytest.raises(ConfigurationError, match="^routes.* (is|has) .*, expected a"):
        Routes(routes)


def test_events_are_grouped_by_their_destinations_in_order() -> None:
    one, two, three = ({"event_type": event_type} for event_type in ("ping", "order_placed", "order_placed"))
    routes = Routes({"order_placed": ["billing", "search"]})
    assert routes.address([one, two, three]) == [
        Addressed(("",), False, [one]),
        Addressed(("billing", "search"), False, [two, three]),
    ]
    assert routes.address([one, two], "search") == [Addressed(("search",), False, [one, two])]
    assert Routes().address([one, two], may_have_ids=False) == [Addressed(("",), False, [one, two])]
    assert Routes({"*": "search"}).address([one, two]) == [Addressed(("search",), False, [one, two])]


def test_events_with_an_id_are_grouped_apart() -> None:
    one, two, three = ({"event_type": "ping", "event_id": "a"}, {"event_type": "ping"}, {"event_type": "ping"})
    assert Routes().address([one, two, three]) == [
        Addressed(("",), True, [one]),
        Addressed(("",), False, [two, three]),
    ]

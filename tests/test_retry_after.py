import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import retry_after


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ('{"data":{"retryAfterSec":55}}', 55_000),
        ("RATE_LIMITED: rate_limited", None),
        ('"retryAfterSec":99999', 300_000),
        ('"retryAfterSec":0', 1_000),
        ('{"retryAfterSec":null,"foo":7}', None),
        ('"xretryAfterSec":7', None),
        ('{"xretryAfterSec":7}', None),
        ('{"retryAfterSec":40}', 40_000),
        ('{"retryAfterSec":-3}', 1_000),
        ('{"retryAfterSec":"40"}', None),
        ('{"retryAfterSec":1.5}', None),
        ('{"retryAfterSec":true}', None),
        ('[[{"a":[{"retryAfterSec":7}]}]]', 7_000),
        ('{"a":{"retryAfterSec":5},"retryAfterSec":7}', 7_000),
        ('{"a":{"b":{"retryAfterSec":1}},"c":{"retryAfterSec":2}}', 2_000),
        ('{"retryAfterSec":null,"a":{"retryAfterSec":9}}', 9_000),
        ('{"error":"slow","retryAfterSec" : 12, "detail":"cut off he', 12_000),
        ('{"retryAfterSec":\n\t30', 30_000),
        ('{"retryAfterSec":"soon", "x', None),
        ('{"retryAfterSec":' + "9" * 5_000 + "}", 300_000),
        ('{"retryAfterSec":5,"x":NaN}', 5_000),
        ("[" * 60_000, None),
        ("", None),
        ("\ud800", None),
    ],
)
def test_retry_after_of_a_body(body: str, expected: int | None) -> None:
    assert retry_after.in_body(body) == expected


@given(st.text())
def test_retry_after_of_any_text_is_none_or_within_the_clamp(body: str) -> None:
    assert retry_after.in_body(body) is None or 1_000 <= retry_after.in_body(body) <= 300_000


@given(st.integers(), st.text(alphabet=" \t\n"), st.integers(0, 40))
def test_retry_after_survives_being_cut_off(seconds: int, space: str, cut: int) -> None:
    whole = f'{{"retryAfterSec"{space}:{space}{abs(seconds)},"detail":"{"x" * 40}"}}'
    expected = min(max(abs(seconds) * 1_000, 1_000), 300_000)
    assert retry_after.in_body(whole) == retry_after.in_body(whole[: len(whole) - 1 - cut]) == expected

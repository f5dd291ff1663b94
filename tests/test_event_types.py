from __future__ import annotations

import json
from typing import Any

import pytest

from builders import NOON, NOON_MS, rule_fired
from outbox import Event, FixOutcome, McpRuleServed, RuleActuallyCited, RuleCitedInEdit
from outbox.events import decode, encode
from outbox.new_rows import columns

SERVED = McpRuleServed(
    tool="search",
    session_id="s1",
    repo_full_name="acme/shop",
    query_hash="beef",
    rule_ids=["r1", "r2"],
    top_k=5,
    was_empty=False,
    strict_match_count=2,
    estimated_tokens=812,
    served_at=NOON,
)
CITED_IN_EDIT = RuleCitedInEdit(rule_id="r1", session_id="s1", file_path="a.py", diff_excerpt="+x", cited_at=NOON)
CITED = RuleActuallyCited(rule_id="r1", session_id="s1", citation_excerpt="as r1 says", cited_at=NOON)
OUTCOME = FixOutcome(rule_id="r1", session_id="s1", accepted=True, occurred_at=NOON)


@pytest.mark.parametrize(
    ("event", "wire"),
    [
        (
            rule_fired(file_path="a.py", intent="fix"),
            '{"event_type":"rule_fired","rule_ids":["r1"],"file_path":"a.py","intent":"fix","session_id":"s1",'
            '"fired_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            SERVED,
            '{"event_type":"mcp_rule_served","tool":"search","session_id":"s1","repo_full_name":"acme/shop",'
            '"query_hash":"beef","rule_ids":["r1","r2"],"top_k":5,"was_empty":false,"strict_match_count":2,'
            '"estimated_tokens":812,"served_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            CITED_IN_EDIT,
            '{"event_type":"rule_cited_in_edit","rule_id":"r1","session_id":"s1","file_path":"a.py",'
            '"diff_excerpt":"+x","cited_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            CITED,
            '{"event_type":"rule_actually_cited","rule_id":"r1","session_id":"s1","citation_excerpt":"as r1 says",'
            '"cited_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            OUTCOME,
            '{"event_type":"fix_outcome","rule_id":"r1","session_id":"s1","accepted":true,'
            '"occurred_at":"2026-11-24T12:00:00Z"}',
        ),
        (
            FixOutcome(
                rule_id="r1", session_id="s1", accepted=False, occurred_at=NOON, mcp_serve_event_ids=["e1", 7]
            ),
            '{"event_type":"fix_outcome","rule_id":"r1","session_id":"s1","accepted":false,'
            '"occurred_at":"2026-11-24T12:00:00Z","mcp_serve_event_ids":["e1",7]}',
        ),
    ],
)
def test_an_event_goes_on_the_wire_in_the_order_of_the_contract(event: Event, wire: str) -> None:
    assert encode(event) == (event, wire)
    assert encode(json.loads(wire)) == (event, wire)
    assert decode(wire) == event


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (rule_fired(rule_ids=["a", "b"]), ("rule_fired", None, '["a","b"]', "s1", None, NOON_MS)),
        (SERVED, ("mcp_rule_served", None, '["r1","r2"]', "s1", None, NOON_MS)),
        (CITED_IN_EDIT, ("rule_cited_in_edit", "r1", '["r1"]', "s1", "a.py", NOON_MS)),
        (OUTCOME, ("fix_outcome", "r1", '["r1"]', "s1", None, NOON_MS)),
    ],
)
def test_columns_repeat_the_payload(event: Event, expected: tuple[Any, ...]) -> None:
    assert tuple(columns(event, now_ms=99).values()) == expected


def test_old_rows_may_lack_the_serve_event_ids() -> None:
    assert decode(encode(OUTCOME)[1]).mcp_serve_event_ids == []

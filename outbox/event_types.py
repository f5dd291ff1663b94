"""The event types of difflore's service, which this package brings along."""

from __future__ import annotations

import msgspec

from outbox.events import Event, Instant


class RuleFired(Event, tag="rule_fired", frozen=True, kw_only=True, omit_defaults=True):
    """Rules matched and were shown."""

    occurred_at_field = "fired_at"

    rule_ids: list[str]
    file_path: str | None = None
    intent: str | None = None
    session_id: str
    fired_at: Instant


class McpRuleServed(Event, tag="mcp_rule_served", frozen=True, kw_only=True, omit_defaults=True):
    """Rules were served to a tool over MCP."""

    occurred_at_field = "served_at"

    tool: str
    session_id: str
    repo_full_name: str | None = None
    file_path: str | None = None
    query_hash: str
    rule_ids: list[str]
    top_k: int
    was_empty: bool
    strict_match_count: int
    estimated_tokens: int
    served_at: Instant


class RuleCitedInEdit(Event, tag="rule_cited_in_edit", frozen=True, kw_only=True, omit_defaults=True):
    """An edit cites a rule."""

    occurred_at_field = "cited_at"

    rule_id: str
    session_id: str
    file_path: str
    diff_excerpt: str
    cited_at: Instant


class RuleActuallyCited(Event, tag="rule_actually_cited", frozen=True, kw_only=True, omit_defaults=True):
    """An answer cites a rule."""

    occurred_at_field = "cited_at"

    rule_id: str
    session_id: str
    file_path: str | None = None
    citation_excerpt: str
    cited_at: Instant


class FixOutcome(Event, tag="fix_outcome", frozen=True, kw_only=True, omit_defaults=True):
    """A proposed fix was accepted or rejected."""

    rule_id: str
    session_id: str
    file_path: str | None = None
    accepted: bool
    occurred_at: Instant
    mcp_serve_event_ids: list[str | int] = msgspec.field(default_factory=list)

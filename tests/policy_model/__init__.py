"""A model of a delivery policy that the outbox does not follow yet: its rules, and what they reach in virtual time.

The rules are pure functions and a pure search, without a clock, a database or HTTP:

- `rules` says what a failure means for a row, and what becomes of the row,
- `isolation` and `search_order` find the rows that a service rejects or that make it fail,
- `pauses`, `revival` and `waits` say when a service is left alone, and which rows come back after a success.

Their tests run with all others. The figures take minutes, so a command prints them: `python -m tests.policy_model`.

- `scenarios` says what is enqueued, how the service answers, and which figures must be reached,
- `services` are the kinds of services,
- `play` runs a scenario at a place with some flushers and returns what happened,
- `model` is such a place: a table in memory, and a flusher that asks the rules,
- `real` is another one: the outbox itself on a file of SQLite,
- `worlds` are events and troubles, named or drawn from a seed, and what is promised in all of them,
- `check_worlds` plays them with the outbox itself,
- `virtual_time` runs the flushers one at a time and moves the clock,
- `search_figures` counts the requests of a search.
"""

"""Processes of the outbox that are killed, by a real SIGKILL.

- `steps` counts what a process does, and kills it at one step,
- `programs` holds what the processes do, and what must hold of the database that a killed one leaves,
- `nursery` forks them from a process in which everything is imported already,
- `python -m tests.kill 1000` kills many at random, while others work on the same database.
"""

"""The real outbox in a simulated world: clock, server, database faults and crashes follow from one seed.

- `stage` runs the processes one at a time and stops them at every step,
- `theatre` is the database that they use, `on_sqlite` or `on_postgresql`,
- `server` plays the service of a destination, `weather` draws its answers,
- `model` watches every committed transaction and holds it against what is promised,
- `facts` are what it knows of rows, pauses and requests; `moves`, `choices`, `pauses` and `losses` what each may become,
- `chaos` draws a world from a seed; `python -m tests.simulation 100000` runs many,
- `exhaustive` enumerates every order of a small world instead.
"""

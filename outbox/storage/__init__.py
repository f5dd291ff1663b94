"""The database: how the outbox writes to it."""

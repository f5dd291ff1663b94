"""What the outbox costs, beside the least that its promise needs and beside other libraries: `make bench`."""

"""The pure core of the supervisor: events in, decisions out. No clock, no I/O, no randomness."""

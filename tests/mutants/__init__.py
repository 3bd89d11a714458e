"""Seeded bugs, each of which some test must catch: whether the suite would notice what matters."""

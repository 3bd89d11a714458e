"""Weeks of a run in a fraction of a second: the real policy, journal, fences and retention in a simulated world."""

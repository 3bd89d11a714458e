"""Injected faults, for tests and drills. Off unless run.yaml names some; every firing is counted and recorded."""

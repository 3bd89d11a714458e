"""Chaos with real processes: everything that belongs to a run is killed, stopped or starved, over and over."""

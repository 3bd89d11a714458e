"""Whole runs: a real supervisor, a real trainer, real files."""

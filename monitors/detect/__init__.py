"""Detectors: each folds rows into findings, knows one kind of anomaly, and keeps plain values only."""

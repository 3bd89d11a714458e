"""Health: signals computed in the trainer, records, detectors, taxonomy, metrics."""

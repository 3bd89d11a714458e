"""Tests of records, detectors, metrics."""

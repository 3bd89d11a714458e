"""Tests of what trainer and supervisor agree on."""

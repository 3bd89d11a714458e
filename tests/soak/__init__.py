"""Hours of everything: simulated weeks, power cuts under the journal and chaos on real processes, with fresh seeds."""

"""The supervisor: policy engine, recovery, journal, process control and command line. Never imports torch."""

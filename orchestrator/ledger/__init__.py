"""The ledger: which data was read, when and by which attempt, and what was left out and why."""

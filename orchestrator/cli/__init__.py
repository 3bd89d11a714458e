"""The command line: one small module per group of verbs, and nothing here decides what a run does."""

"""The logbook: what happened in a run and why, as a page that needs nothing else, as Markdown and as JSON."""

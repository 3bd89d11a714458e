"""Everything that touches processes: spawning, stopping, causes of death, the inbox of records."""

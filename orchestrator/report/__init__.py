"""What people read: incidents with their cost, the state of a run, the display of a launch. No rule lives here."""

"""The drill: on the user's own machine, model, data and store, everything that a long run may need, in minutes."""

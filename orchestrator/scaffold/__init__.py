"""Templates that `longwatch init` writes."""

"""What supervisor and trainer agree on. Torch-free: the supervisor imports this package and nothing else of trainer."""

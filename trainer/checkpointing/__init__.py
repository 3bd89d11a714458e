"""Saving and loading full training states. Import the names from `trainer.checkpoint`."""

"""Snapshots on their way: arena, local disk, store."""

"""Power cuts under the real journal: what was not synced is dropped, torn or kept; what was acknowledged must be."""

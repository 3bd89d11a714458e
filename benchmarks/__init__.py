"""Measurements side by side with the references that they are to beat; `make bench-NAME` runs one."""

"""Calibrates a model that does not fit in memory, block by block."""

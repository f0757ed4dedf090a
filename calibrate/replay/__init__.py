"""Runs of the float model on recorded calls, and hooks on its layers meanwhile."""

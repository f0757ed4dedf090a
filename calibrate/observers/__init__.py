"""Observations of the inputs of layers while calls are replayed: ranges, surveys, samples of rows."""

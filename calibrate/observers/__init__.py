"""Observations of layer inputs while calls are replayed: ranges, surveys, samples of rows."""

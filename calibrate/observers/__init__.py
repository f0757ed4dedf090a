"""Observes layer inputs while the float model runs on recorded calls: their ranges, the extremes of their channels, and
samples of their rows."""

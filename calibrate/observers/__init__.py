"""Observes the inputs of layers while the float model runs on recorded calls: the ranges of the inputs, the extremes of
their channels, and samples of their rows."""

"""Outliers of inputs moved into weights (SmoothQuant), and multipliers folded into what comes before."""

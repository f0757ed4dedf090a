"""Moves outliers of inputs into weights (SmoothQuant), and folds the multipliers into the layers before."""

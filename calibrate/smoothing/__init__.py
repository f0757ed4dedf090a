"""Moves outliers of inputs into weights (SmoothQuant), and folds the smoothing factors into the layers and norms that
produce these inputs."""

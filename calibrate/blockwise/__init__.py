"""Calibrates a model that does not fit in memory: one block after the other, with the weights of one block in
memory."""

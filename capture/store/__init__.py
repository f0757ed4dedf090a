"""Stores a capture on disk: a directory with one sealed unit for each prompt, where equal tensors are written once."""

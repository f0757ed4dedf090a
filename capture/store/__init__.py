"""Stores a capture on disk: a directory with one unit for each prompt, which holds the prompt's recorded calls.

Equal tensors of a unit are written once, and digests protect every file.
"""

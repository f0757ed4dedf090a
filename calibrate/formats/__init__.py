"""Formats of checkpoints: a folder each, whose record says how it is written, read, checked and described."""

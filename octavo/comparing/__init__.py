"""Compares a float pipeline with its quantized form: runs both from the same prompts and noise, and measures the
difference."""

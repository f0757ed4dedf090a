"""Compares a float pipeline with its quantized form: runs both with the same prompts and noise, and measures how much
the results differ."""

"""Chooses a scheme for each layer under limits of bytes and time; whole runs of the pipeline judge the choice."""

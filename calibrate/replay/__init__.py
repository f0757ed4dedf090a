"""Replays recorded calls on the float model, with hooks on its layers that observe and measure."""

"""Tests of the format comfy."""

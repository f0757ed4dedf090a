"""Tiny models, networks and pipelines for the tests, and functions that run and measure them. bench/ may import from
here."""

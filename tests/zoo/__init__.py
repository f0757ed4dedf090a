"""Tiny models, networks and pipelines, and how they are run and measured. bench/ may import from here."""

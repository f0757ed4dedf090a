"""Families of models: how to load one, run it, which modules denoise, what stays float."""

from .family import Family
from .opensora.family import OPENSORA
from .sd3 import SD3

GENERIC = Family("generic")
FAMILIES = {"sd3": SD3, "opensora": OPENSORA}


def family_of(pipeline_class: str) -> Family:
    """The family of a pipeline by its class name; GENERIC where none knows it."""
    return next((f for f in FAMILIES.values() if pipeline_class.startswith(f.pipelines)), GENERIC)

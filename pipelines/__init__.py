"""Families of models: how to load and run a model, which modules denoise, which layers stay float."""

from .families import TABLE
from .family import Family
from .opensora.family import OPENSORA
from .opensora_plan import OPENSORA_PLAN
from .sd3 import SD3

GENERIC = Family("generic")
FAMILIES = {family.name: family for family in (SD3, OPENSORA, OPENSORA_PLAN, *TABLE)}


def family_of(pipeline_class: str) -> Family:
    """Returns the family with the longest prefix that a pipeline's class name begins with; else GENERIC."""
    prefixes = {prefix: family for family in FAMILIES.values() for prefix in family.pipelines}
    matches = [prefix for prefix in prefixes if pipeline_class.startswith(prefix)]
    return prefixes[max(matches, key=len)] if matches else GENERIC

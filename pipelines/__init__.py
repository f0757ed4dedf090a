"""Loads and runs models, and holds Octavo's defaults for each kind of pipeline, such as the layers that stay float."""

from .families import TABLE
from .family import Family
from .opensora.family import OPENSORA
from .opensora_plan import OPENSORA_PLAN
from .sd3 import SD3

GENERIC = Family("generic")
FAMILIES = {family.name: family for family in (SD3, OPENSORA, OPENSORA_PLAN, *TABLE)}


def family_of(pipeline_class: str) -> Family:
    """Returns the family (defaults for one kind of pipeline) of a pipeline's class; GENERIC if no family fits.

    `pipeline_class` is the name of the class. Each family lists prefixes of such names. If several prefixes fit the
    name, the longest prefix decides.
    """
    prefixes = {prefix: family for family in FAMILIES.values() for prefix in family.pipelines}
    matches = [prefix for prefix in prefixes if pipeline_class.startswith(prefix)]
    return prefixes[max(matches, key=len)] if matches else GENERIC

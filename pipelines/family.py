"""What Octavo knows about a family of models."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Family:
    """Defaults of one family; everything a family does not say is the pipeline's own default."""

    name: str
    pipelines: tuple[str, ...] = ()  # prefixes of the pipeline class names
    defaults: Mapping[str, Any] = field(default_factory=dict)  # arguments of the pipeline's call
    keep_float: Mapping[str, str] | None = None  # pattern of layer names -> why; None: the general rule

"""Open-Sora 1.2 among the families: how Octavo loads it, and what stays float."""

from pathlib import Path
from typing import Any

from ..family import Family
from .defaults import KEEP_FLOAT


def _load(directory: Path, dtype: Any, text_encoder: Path | None) -> Any:
    from .load import load_pipeline

    return load_pipeline(directory, torch_dtype=dtype, text_encoder=text_encoder)


OPENSORA = Family(
    name="opensora",
    pipelines=("OpenSora",),
    models=("STDiT3",),
    defaults={"num_inference_steps": 30, "output_type": "latent"},
    keep_float=dict.fromkeys(KEEP_FLOAT, "outside the blocks: a few rows a call, or the velocity itself"),
    load=_load,
)

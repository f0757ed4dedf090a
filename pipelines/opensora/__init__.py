"""Open-Sora 1.2: its transformer STDiT3, its sampler RFLOW, and the pipeline around them.

Importing this package imports neither torch nor diffusers. The two libraries are imported when a class or function that
needs them is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .defaults import KEEP_FLOAT
from .sizes import ASPECTS, RESOLUTIONS, VideoSettings, frame_count, latent_frames, latent_size, video_size

if TYPE_CHECKING:
    from .load import load_pipeline, load_transformer
    from .pipeline import OpenSoraPipeline, OpenSoraPipelineOutput
    from .sampling import Conditions, denoise_step, sample
    from .scheduler import RFlowScheduler, VideoShape
    from .transformer import STDiT3

__all__ = [
    "ASPECTS",
    "KEEP_FLOAT",
    "RESOLUTIONS",
    "Conditions",
    "OpenSoraPipeline",
    "OpenSoraPipelineOutput",
    "RFlowScheduler",
    "STDiT3",
    "VideoSettings",
    "VideoShape",
    "denoise_step",
    "frame_count",
    "latent_frames",
    "latent_size",
    "load_pipeline",
    "load_transformer",
    "sample",
    "video_size",
]

_HOMES = {
    "load": ("load_pipeline", "load_transformer"),
    "pipeline": ("OpenSoraPipeline", "OpenSoraPipelineOutput"),
    "sampling": ("Conditions", "denoise_step", "sample"),
    "scheduler": ("RFlowScheduler", "VideoShape"),
    "transformer": ("STDiT3",),
}


def __getattr__(name: str) -> Any:
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f".{home}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Compares the native names of real models with ComfyUI's own maps of names, for `bench.consumers`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import diffusers as d
import torch

from octavo.calibrate.formats.comfy.families import FAMILIES
from octavo.calibrate.formats.comfy.names import native_names

from .consumer_environment import installed, run
from .consumer_jobs import Row

PACKAGES = ("comfy-kitchen==0.2.40", "comfy-aimdo", "einops", "torchsde", "trampoline", "scipy")


def child(comfyui: Path, job: Path) -> None:
    """Does the job in the file `job` with the sources of ComfyUI in `comfyui` and the packages that they need."""
    run("bench.comfy_child", installed("comfyui", PACKAGES), comfyui, job)


class Map(NamedTuple):
    """A map of names that ComfyUI applies to LoRAs: the function in comfy/utils.py, its argument, and the class and the
    configuration of the model in diffusers that it is for."""

    function: str
    sizes: dict[str, int]
    kind: str
    config: dict[str, Any]


MAPS = {
    "Flux.1": Map(
        "flux_to_diffusers", {"depth": 19, "depth_single_blocks": 38, "hidden_size": 3072}, "FluxTransformer2DModel",
        {"guidance_embeds": True},
    ),
    "Stable Diffusion 3.5": Map(
        "mmdit_to_diffusers", {"depth": 24, "num_blocks": 24}, "SD3Transformer2DModel",
        dict(
            num_layers=24, num_attention_heads=24, caption_projection_dim=1536, qk_norm="rms_norm",
            dual_attention_layers=tuple(range(13)),
        ),
    ),
    "Z-Image": Map("z_image_to_diffusers", {"n_layers": 30, "dim": 3840}, "ZImageTransformer2DModel", {}),
    "AuraFlow": Map("auraflow_to_diffusers", {"n_double_layers": 4, "n_layers": 36}, "AuraFlowTransformer2DModel", {}),
    "Krea 2": Map("krea2_to_diffusers", {"layers": 28}, "Krea2Transformer2DModel", {}),
}  # fmt: skip


def maps(folder: Path, comfyui: Path) -> Iterator[Row]:
    """Compares the native names of real models with the maps in ComfyUI's comfy/utils.py; yields rows like `prove`."""
    place = folder / "maps"
    place.mkdir(parents=True, exist_ok=True)
    job = {
        "maps": {name: [entry.function, entry.sizes] for name, entry in MAPS.items()},
        "out": str(place / "out.json"),
    }
    (place / "job.json").write_text(json.dumps(job))
    child(comfyui, place / "job.json")
    theirs = json.loads((place / "out.json").read_text())
    for name, entry in MAPS.items():
        ours = _places(entry)
        common = ours.keys() & theirs[name].keys()
        apart = sorted(key for key in common if ours[key] != theirs[name][key])
        facts = [f"{key} is {ours[key]}, in ComfyUI {theirs[name][key]}" for key in apart[:1]]
        facts = facts or [f"{len(common)} of {len(ours)} names are in ComfyUI's {entry.function}, all the same"]
        yield Row(f"{name}, names", "read", not apart and bool(common), facts[0])


def _places(entry: Map) -> dict[str, list[Any]]:
    """Returns a dict from each name in diffusers to the native name, the first of its rows in a joined tensor or None,
    and whether its halves are exchanged, as ComfyUI's maps say it."""
    with torch.device("meta"):
        tensors = getattr(d, entry.kind)(**entry.config).state_dict()
    places = {}
    for native, rows in native_names(tensors, FAMILIES[entry.kind]).items():
        name, start = native.replace("_norm.scale", "_norm.weight"), 0  # ComfyUI reads both names
        for source in rows.names:
            places[source] = [name, start if len(rows.names) > 1 else None, rows.swapped]
            start += len(tensors[source])
    return places

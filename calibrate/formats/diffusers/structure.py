"""Reads and writes the quantization_config of a diffusers directory. Importing this module needs no torch.

The keys of quantization_config:

| key          | content                                                                        |
|--------------|--------------------------------------------------------------------------------|
| quant_method | "octavo"                                                                       |
| format       | 1                                                                              |
| dtype        | dtype of the float tensors: "float32", "float16" or "bfloat16"                 |
| schemes      | dict from scheme to names of integer layers; every other layer is float        |
| multiplied   | names of the layers with a smoothing multiplier                                |
| made_biases  | names of the layers with a bias only for their bias correction                 |
| bins         | dict from name to number of timestep bins, for each layer that has them        |
| rotations    | dict from name to size of a group, for each rotated layer; absent if there are |
|              | none                                                                           |
| clamping     | names of the layers with `Scheme.clamping`; absent if there are none           |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from octavo.capture.errors import FileError

from ...layers.schemes import FP8_SCHEMES, ROTATIONS, SCHEMES

QUANT_METHOD, FORMAT = "octavo", 1  # the name registered with diffusers, and the version of quantization_config
_DTYPES = {dtype: dtype for dtype in ("float32", "float16", "bfloat16")}


class LayerKind(NamedTuple):
    """The kind of an integer layer.

    `scheme`: the name of its scheme. `multiplied`: whether it has a smoothing multiplier. `made_bias`: whether it has a
    bias that its float layer has not, for its bias correction. `bins`: its number of timestep bins (intervals of noise
    levels); 0 for a layer of another scheme than W8A8_TIMESTEP or W8A8_FP8_TIMESTEP. `rotation`: the number of channels
    in a group that its rotation mixes; 0 without a rotation. `clamping`: whether the scale of an MXFP8 block may be so
    small that its largest code is clamped, as on Ascend.
    """

    scheme: str
    multiplied: bool = False
    made_bias: bool = False
    bins: int = 0
    rotation: int = 0
    clamping: bool = False


@dataclass(frozen=True)
class Structure:
    """The dtype of a model's float tensors, by torch's name, and a dict from layer name to the kind of each integer
    layer. A layer that is used in several places is listed under each of its names."""

    dtype: str
    kinds: Mapping[str, LayerKind]

    @classmethod
    def read(cls, content: Mapping[str, Any], where: str = "quantization_config") -> "Structure":
        """Reads `content`, a quantization_config that `as_dict` returned.

        Raises FileError for any other content; the message starts with `where`, a name for the source of the content.
        """
        try:
            if content["format"] != FORMAT:
                fact = f"has format {content['format']!r}, but this version reads {FORMAT}"
                raise FileError(f"{where}: {fact}. Upgrade Octavo.")
            multiplied, made_biases = set(content["multiplied"]), set(content["made_biases"])
            bins = {str(name): int(count) for name, count in content["bins"].items()}
            rotations = {str(name): int(size) for name, size in content.get("rotations", {}).items()}
            clamping = set(content.get("clamping", ()))
            kinds = {
                str(name): LayerKind(
                    scheme,
                    name in multiplied,
                    name in made_biases,
                    bins.get(name, 0),
                    rotations.get(name, 0),
                    name in clamping,
                )
                for scheme, names in content["schemes"].items()
                for name in names
            }
            structure = cls(_DTYPES[content["dtype"]], kinds)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fact = f"{type(error).__name__} {error}".replace("\n", " ")
            raise FileError(f"{where}: not a config that Octavo writes ({fact}). Calibrate again.") from None
        unknown = {kind.scheme for kind in kinds.values()} - {*SCHEMES, *FP8_SCHEMES}
        if unknown or not kinds:
            fact = f"has an unknown scheme {sorted(unknown)[0]}" if unknown else "names no layer"
            raise FileError(f"{where}: {fact}. Calibrate again.")
        if wrong := {kind.rotation for kind in kinds.values()} - {0, *ROTATIONS}:
            raise FileError(f"{where}: rotates groups of {min(wrong)} channels, which Octavo cannot. Calibrate again.")
        return structure

    def as_dict(self) -> dict[str, Any]:
        """Returns the quantization_config as a dict that can be written as JSON."""
        schemes: dict[str, list[str]] = {}
        for name, kind in sorted(self.kinds.items()):
            schemes.setdefault(kind.scheme, []).append(name)
        rotations = {name: kind.rotation for name, kind in sorted(self.kinds.items()) if kind.rotation}
        clamping = sorted(name for name, kind in self.kinds.items() if kind.clamping)
        optional = {"rotations": rotations, "clamping": clamping}
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "dtype": self.dtype,
            "schemes": schemes,
            "multiplied": sorted(name for name, kind in self.kinds.items() if kind.multiplied),
            "made_biases": sorted(name for name, kind in self.kinds.items() if kind.made_bias),
            "bins": {name: kind.bins for name, kind in sorted(self.kinds.items()) if kind.bins},
            **{key: value for key, value in optional.items() if value},
        }

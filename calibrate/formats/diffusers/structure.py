"""The quantization_config of a diffusers directory. Importing this module needs no torch.

| key          | content                                                                        |
|--------------|--------------------------------------------------------------------------------|
| quant_method | "octavo"                                                                       |
| format       | 1                                                                              |
| dtype        | dtype of the float tensors: "float32", "float16" or "bfloat16"                 |
| schemes      | names of the layers by scheme; every other layer is float                      |
| multiplied   | layers with a multiplier of their input                                        |
| made_biases  | layers with a bias whose float form has none                                   |
| bins         | number of bins of noise levels of each W8A8_TIMESTEP layer                     |
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from octavo.capture.errors import FileError

from ...layers.schemes import SCHEMES

QUANT_METHOD, FORMAT = "octavo", 1  # the name registered with diffusers, and the version of the config
_DTYPES = {dtype: dtype for dtype in ("float32", "float16", "bfloat16")}


class Kind(NamedTuple):
    """The form of an integer layer: its scheme, whether it has a multiplier or an added bias, its number of bins."""

    scheme: str
    multiplied: bool = False
    made_bias: bool = False
    bins: int = 0


@dataclass(frozen=True)
class Structure:
    """The integer layers of a model by all their names, and the dtype of its float tensors by torch's name."""

    dtype: str
    kinds: Mapping[str, Kind]

    @classmethod
    def read(cls, content: Mapping[str, Any], where: str = "quantization_config") -> "Structure":
        """Reads a dict that `as_dict` made. Raises FileError for anything else."""
        try:
            if content["format"] != FORMAT:
                raise FileError(f"{where}: of format {content['format']!r}; this version reads {FORMAT}. Upgrade.")
            multiplied, made = set(content["multiplied"]), set(content["made_biases"])
            bins = {str(name): int(count) for name, count in content["bins"].items()}
            kinds = {
                str(name): Kind(scheme, name in multiplied, name in made, bins.get(name, 0))
                for scheme, names in content["schemes"].items()
                for name in names
            }
            found = cls(_DTYPES[content["dtype"]], kinds)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            fact = f"{type(error).__name__} {error}".replace("\n", " ")
            raise FileError(f"{where}: not what Octavo writes ({fact}). Export again.") from None
        unknown = {kind.scheme for kind in kinds.values()} - set(SCHEMES)
        if unknown or not kinds:
            fact = f"unknown scheme {sorted(unknown)[0]}" if unknown else "names no layer"
            raise FileError(f"{where}: {fact}. Export again.")
        return found

    def as_dict(self) -> dict[str, Any]:
        """The quantization_config, ready for JSON, with the keys of the table above."""
        schemes: dict[str, list[str]] = {}
        for name, kind in sorted(self.kinds.items()):
            schemes.setdefault(kind.scheme, []).append(name)
        return {
            "quant_method": QUANT_METHOD,
            "format": FORMAT,
            "dtype": self.dtype,
            "schemes": schemes,
            "multiplied": sorted(name for name, kind in self.kinds.items() if kind.multiplied),
            "made_biases": sorted(name for name, kind in self.kinds.items() if kind.made_bias),
            "bins": {name: kind.bins for name, kind in sorted(self.kinds.items()) if kind.bins},
        }

"""The quantization_config of a diffusers directory, and its integer layers before their tensors are loaded.

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

import torch
from torch import Tensor, nn

from octavo.capture.errors import FileError, MisfitError

from ...layers.inputs import INPUTS
from ...layers.modules import QuantizedLayer, build
from ...layers.numbers import Numbers
from ...layers.scheme import ACTIVATION, STORABLE
from ...layers.transforms import Multiply

QUANT_METHOD, FORMAT = "octavo", 1  # the name registered with diffusers, and the version of the config
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORABLE}


class Kind(NamedTuple):
    """The form of an integer layer: its scheme, whether it has a multiplier or an added bias, its number of bins."""

    scheme: str
    multiplied: bool = False
    made_bias: bool = False
    bins: int = 0


@dataclass(frozen=True)
class Structure:
    """The integer layers of a model by all their names, and the dtype of its float tensors."""

    dtype: torch.dtype
    kinds: Mapping[str, Kind]

    @classmethod
    def of(cls, layers: Mapping[str, QuantizedLayer]) -> "Structure":
        """The structure of these layers."""
        dtype = next((layer.dtype for layer in layers.values()), torch.float32)
        return cls(dtype, {name: _kind(layer) for name, layer in layers.items()})

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
        unknown = {kind.scheme for kind in kinds.values()} - set(INPUTS)
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
            "dtype": str(self.dtype).removeprefix("torch."),
            "schemes": schemes,
            "multiplied": sorted(name for name, kind in self.kinds.items() if kind.multiplied),
            "made_biases": sorted(name for name, kind in self.kinds.items() if kind.made_bias),
            "bins": {name: kind.bins for name, kind in sorted(self.kinds.items()) if kind.bins},
        }

    def empty(self, name: str, module: nn.Module) -> QuantizedLayer:
        """The integer layer `name` in the place of the float `module`, its tensors on the meta device.

        Raises MisfitError where `module` is not an nn.Linear or nn.Conv2d.
        """
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if not isinstance(module, (nn.Linear, nn.Conv2d)) or weight is None:
            fact = f"is a {type(module).__name__} in this model, no Linear or Conv2d"
            raise MisfitError(f"{name}: {fact}. Load it into the class that config.json names.")
        return build(_empty(self.kinds[name], tuple(weight.shape), bias is not None, self.dtype), module)


def _kind(layer: QuantizedLayer) -> Kind:
    bins = len(layer.input_scale) if layer.input_type.by_level else 0
    return Kind(layer.scheme, layer.transform is not None, layer.made_bias, bins)


def _empty(kind: Kind, shape: tuple[int, ...], biased: bool, dtype: torch.dtype) -> Numbers:
    with torch.device("meta"):
        outputs, leading = shape[0], (kind.bins,) if kind.bins else ()
        tensors: dict[str, Tensor | None] = {
            "input_scale": torch.empty(leading), "input_zero_point": torch.empty(leading, dtype=torch.int32),
            "edges": torch.empty(max(kind.bins - 1, 0)),
        }  # fmt: skip
        input = INPUTS[kind.scheme].of(tensors, ACTIVATION)
        return Numbers(
            torch.empty(shape, dtype=input.weights.element.dtype), torch.empty(outputs),
            torch.empty(outputs, dtype=dtype) if biased or kind.made_bias else None,
            input, dtype, Multiply(torch.empty(shape[1], dtype=dtype)) if kind.multiplied else None,
            torch.empty(*leading, outputs) if input.ranged else None,
            torch.empty(*leading, outputs, dtype=torch.int32) if input.ranged else None, kind.made_bias,
        )  # fmt: skip

"""Loads and saves integer layers through diffusers: the quantizer and the config behind `quant_method` "octavo".

diffusers builds the model on the meta device, lets the quantizer put integer layers in, and hands over one stored
tensor after the other. Before the first tensor, names, dtypes and shapes of all are compared with the model: nothing
stays random or float that should not. The tensors of integer layers keep the stored dtype, whatever `torch_dtype`.
"""

from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import Tensor, nn

from octavo.capture.arrays import read_header
from octavo.capture.errors import MisfitError, OctavoError, UsageError
from octavo.capture.store.headers import Stored
from octavo.capture.tensors import read_tensor, torch_dtype

from ...layers.install import install
from ...layers.modules import QuantizedLayer
from ...runtime import accelerate
from ..manifest import verify
from .layers import empty_layer, structure_of
from .structure import QUANT_METHOD, Structure

_CAST = ("bias", "mul_scale")  # the tensors of an integer layer that are in the model's dtype


class Method(StrEnum):
    """The quant_method as an enum, since diffusers reads its `value`."""

    OCTAVO = QUANT_METHOD


class OctavoConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json; see `structure` for its keys.

    One more key may be added by hand: "backend", a name of `runtime.BACKENDS`; without it the device decides.
    """

    def __init__(self, **content: Any) -> None:
        self.quant_method = Method.OCTAVO  # type: ignore[assignment]
        self.structure = Structure.read(content)
        self.backend: str | None = content.get("backend")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *_: Any, **__: Any) -> "OctavoConfig":
        """Reads a config that `to_dict` made. Raises FileError for anything else."""
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        more = {} if self.backend is None else {"backend": self.backend}
        return self.structure.as_dict() | more

    to_diff_dict = to_dict


class OctavoQuantizer(DiffusersQuantizer):
    """Loads the directories that format `diffusers` writes, and quantizes nothing: the integers need a calibration."""

    requires_calibration = True
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    quantization_config: OctavoConfig

    def __init__(self, quantization_config: OctavoConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._stored: dict[str, tuple[Path, Stored]] = {}
        self._dtype: torch.dtype | None = None
        self._keep: frozenset[str] = frozenset()

    def validate_environment(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        """Raises UsageError for layers on disk: accelerate casts them before it writes them there."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError("device_map: integer layers cannot be on disk. Use devices, or CPU offload.")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """The dtype of float tensors: `torch_dtype`, by default the checkpoint's."""
        stored: torch.dtype = getattr(torch, self.quantization_config.structure.dtype)
        self._dtype = None if torch_dtype == stored else torch_dtype
        return stored if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Compares the sizes of the checkpoint's files with the manifest beside them, and reads their headers; returns
        the keys unchanged. Raises FileError for a file of another size or with a damaged header."""
        self._stored = {}
        for folder in {Path(file).parent for file in checkpoint_files}:
            verify(folder, {Path(file).name for file in checkpoint_files}, digests=False)
        for file in checkpoint_files:
            path = Path(file).resolve()  # files that a hub has downloaded are links
            self._stored |= {name: (path, stored) for name, stored in read_header(path)[0].items()}
        return loaded_keys

    def _process_model_before_weight_loading(
        self, model: nn.Module, keep_in_fp32_modules: Iterable[str] = (), **_: Any
    ) -> None:
        structure = self.quantization_config.structure
        self._keep = frozenset(keep_in_fp32_modules)
        modules = dict(model.named_modules(remove_duplicate=False))
        missing = sorted(set(structure.kinds) - set(modules))
        if missing:
            fact = f"no layer {missing[0]}, which quantization_config names"
            raise MisfitError(f"{type(model).__name__}: {fact}. Load it into the class that config.json names.")
        install(model, {name: empty_layer(structure, name, modules[name]) for name in structure.kinds})
        check_stored(model, {name: stored for name, (_, stored) in self._stored.items()}, structure)
        accelerate(model, self.quantization_config.backend)
        model.register_to_config(quantization_config=self.quantization_config)  # type: ignore[operator]

    def check_if_quantized_param(self, *_: Any, **__: Any) -> bool:
        """Always True: every tensor goes through `create_quantized_param`."""
        return True

    def check_quantized_param_shape(self, name: str, current: Tensor, loaded: Tensor) -> bool:
        """Raises MisfitError: diffusers asks only where shapes differ, which `check_stored` has refused already."""
        raise _misfit(name, f"has shape {list(loaded.shape)}, the model {list(current.shape)}")

    def create_quantized_param(  # type: ignore[override]
        self, model: nn.Module, value: Tensor, name: str, device: Any, *_: Any, **__: Any
    ) -> None:
        """Puts one stored tensor in its place. A `value` that diffusers has not cast is mapped from the file and stays
        mapped: its pages are read when the layer runs, and leave memory when the weight is packed."""
        path, stored = self._stored[name]
        value, parts = value if value.dtype == torch_dtype(stored) else read_tensor(path, stored), name.split(".")
        owner, leaf = model.get_submodule(".".join(parts[:-1])), parts[-1]
        exact = ".".join(parts[:-1]) in self.quantization_config.structure.kinds and leaf not in _CAST
        if self._dtype is not None and value.is_floating_point() and not exact:
            value = value.to(torch.float32 if self._keep & set(parts) else self._dtype)
        value = value.to(device)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = nn.Parameter(value, requires_grad=False)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        """Raises MisfitError for a tensor that was not loaded."""
        for name, tensor in model.state_dict().items():
            if tensor.is_meta and not hasattr(model, "_hf_hook"):
                raise _misfit(name, "was not loaded")


def check_stored(model: nn.Module, stored: Mapping[str, Stored], structure: Structure) -> None:
    """Raises MisfitError unless names, shapes and kinds of dtypes of the stored tensors match those of `model`."""
    wanted = model.state_dict()
    missing, surplus = sorted(set(wanted) - set(stored)), sorted(set(stored) - set(wanted))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _misfit(missing[0] + more, "not in the checkpoint; would be random")
    if surplus:
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise _misfit(surplus[0] + more, f"has no place in {type(model).__name__}")
    for name, tensor in wanted.items():
        found, (owner, _, leaf) = stored[name], name.rpartition(".")
        dtype = torch_dtype(found)
        if found.shape != tuple(tensor.shape):
            raise _misfit(name, f"has shape {list(found.shape)}, the model {list(tensor.shape)}")
        exact = owner in structure.kinds and leaf not in _CAST
        same = dtype == tensor.dtype if exact else dtype.is_floating_point == tensor.is_floating_point()
        if not same:
            raise _misfit(name, f"is {found.dtype}, the model needs {_word(tensor.dtype)}")


def adopt(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Puts integer layers, by all their names, into a diffusers model, which then behaves as a loaded one.

    The model saves these layers, and refuses to be cast.
    """
    install(model, layers)
    accelerate(model)
    config = OctavoConfig(**structure_of(layers).as_dict())
    model.register_to_config(quantization_config=config)  # type: ignore[operator]
    model.is_quantized, model.quantization_method = True, config.quant_method  # type: ignore[assignment]
    model.hf_quantizer = OctavoQuantizer(config)  # type: ignore[assignment]


def _misfit(name: str, fact: str) -> OctavoError:
    return MisfitError(f"{name}: {fact}. Export the checkpoint again, or load it into its own class.")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# diffusers has no entry point for quantizers: these tables are where it looks them up
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = OctavoQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = OctavoConfig

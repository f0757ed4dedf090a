"""Loads and saves integer layers through diffusers: the quantizer and the config for `quant_method` "octavo".

diffusers builds the model on the meta device, lets the quantizer replace layers by integer layers, and then hands over
the stored tensors one by one. Before the first tensor, the names, dtypes and shapes of all stored tensors are compared
with those of the model, so that no tensor stays random and no integer layer stays float. Scales and integers keep their
stored dtype; `torch_dtype` changes float tensors only.
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
from octavo.capture.tensors import dtype_name, read_tensor, torch_dtype

from ...layers.install import install
from ...layers.modules import QuantizedLayer
from ...runtime import accelerate
from ..manifest import verify
from .layers import empty_layer, structure_of
from .structure import QUANT_METHOD, Structure

_CAST = ("bias", "mul_scale")  # the tensors of an integer layer that are in the model's float dtype


class Method(StrEnum):
    """The quant_method as an enum, since diffusers reads the attribute `value` of a quant_method."""

    OCTAVO = QUANT_METHOD


class OctavoConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json. It says, for example, which scheme each integer layer has; the module
    `structure` lists all keys.

    The key "backend" may be added by hand: the name of the backend in `runtime.BACKENDS` that computes the integer
    layers. Without it Octavo chooses a backend for the device.
    """

    def __init__(self, **content: Any) -> None:
        self.quant_method = Method.OCTAVO  # type: ignore[assignment]
        self.structure = Structure.read(content)
        self.backend: str | None = content.get("backend")

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], *_: Any, **__: Any) -> "OctavoConfig":
        """Returns the config for a dict that `to_dict` returned. Raises FileError for any other dict."""
        return cls(**config_dict)

    def to_dict(self) -> dict[str, Any]:
        more = {} if self.backend is None else {"backend": self.backend}
        return self.structure.as_dict() | more

    to_diff_dict = to_dict


class OctavoQuantizer(DiffusersQuantizer):
    """Loads directories in format `diffusers`. Does not quantize float models: that needs a calibration."""

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
        """Raises UsageError for a device_map with "disk", because accelerate would cast the integers when it writes
        them to disk."""
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise UsageError(
                "device_map: integer layers cannot be offloaded to disk. Use a device or 'cpu' in place of 'disk'."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Returns the dtype that float tensors are loaded in: `torch_dtype`, or the dtype that they have in the
        checkpoint if `torch_dtype` is None."""
        stored: torch.dtype = getattr(torch, self.quantization_config.structure.dtype)
        self._dtype = None if torch_dtype == stored else torch_dtype
        return stored if torch_dtype is None else torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Checks the checkpoint's files and returns `loaded_keys` unchanged. diffusers calls this method before it
        loads a tensor.

        Reads the headers of the files. Raises FileError for a damaged header, and for a file whose size differs from
        that in the checkpoint's manifest.
        """
        self._stored = {}
        for folder in {Path(file).parent for file in checkpoint_files}:
            verify(folder, {Path(file).name for file in checkpoint_files}, digests=False)
        for file in checkpoint_files:
            path = Path(file).resolve()  # files downloaded from a hub are links
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
            fact = f"has no layer {missing[0]}, which quantization_config names"
            raise MisfitError(
                f"{type(model).__name__}: {fact}. Load the checkpoint with the class that its config.json names."
            )
        install(model, {name: empty_layer(structure, name, modules[name]) for name in structure.kinds})
        check_stored(model, {name: stored for name, (_, stored) in self._stored.items()}, structure)
        accelerate(model, self.quantization_config.backend)
        model.register_to_config(quantization_config=self.quantization_config)  # type: ignore[operator]

    def check_if_quantized_param(self, *_: Any, **__: Any) -> bool:
        """Returns True for every tensor, so that diffusers calls `create_quantized_param`, which puts the tensor into
        the model, for all of them."""
        return True

    def check_quantized_param_shape(self, name: str, current: Tensor, loaded: Tensor) -> bool:
        """Raises MisfitError. diffusers calls this method if the stored tensor `loaded` and the model's tensor
        `current`, both called `name`, differ in shape. Octavo normally refuses the checkpoint before diffusers comes to
        this tensor."""
        raise _misfit(name, f"has shape {list(loaded.shape)} in the checkpoint and {list(current.shape)} in the model")

    def create_quantized_param(  # type: ignore[override]
        self, model: nn.Module, value: Tensor, name: str, device: Any, *_: Any, **__: Any
    ) -> None:
        """Puts `value`, the stored tensor `name`, into the model, on `device`. If torch_dtype differs from the stored
        dtype, a float tensor is cast: to float32 in modules that diffusers keeps in float32, elsewhere to torch_dtype.
        The scales, the deq and the bounds of timestep bins of integer layers are never cast.

        A `value` that is not cast stays mapped from its file, so it takes memory only once the layer runs. If a backend
        packs the weight into a layout of its own, the memory of the mapped weight is freed again.
        """
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
    """Compares the tensors `stored` in a checkpoint with the tensors of `model`, whose integer layers have no values
    yet. `structure` lists these layers.

    Raises MisfitError for a tensor that is only in the checkpoint or only in the model, and for a wrong shape or dtype.
    In an integer layer, all tensors except the bias and the smoothing multiplier must have the dtype that they have in
    the model. Other float tensors may be stored in any float dtype.
    """
    state = model.state_dict()
    missing, surplus = sorted(set(state) - set(stored)), sorted(set(stored) - set(state))
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise _misfit(missing[0] + more, "not in the checkpoint, so its values in the model would be random")
    if surplus:
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise _misfit(surplus[0] + more, f"has no place in {type(model).__name__}")
    for name, tensor in state.items():
        entry, (owner, _, leaf) = stored[name], name.rpartition(".")
        dtype = torch_dtype(entry)
        if entry.shape != tuple(tensor.shape):
            fact = f"has shape {list(entry.shape)} in the checkpoint and {list(tensor.shape)} in the model"
            raise _misfit(name, fact)
        exact = owner in structure.kinds and leaf not in _CAST
        same = dtype == tensor.dtype if exact else dtype.is_floating_point == tensor.is_floating_point()
        if not same:
            raise _misfit(name, f"is {entry.dtype}, but the model needs {dtype_name(tensor.dtype)}")


def adopt(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> None:
    """Puts integer layers into a diffusers model, so that it behaves like a model loaded from a `diffusers` checkpoint:
    save_pretrained writes the integer layers, and the model refuses to be cast.

    `layers` is a dict from name to integer layer; a layer that is used in several places is in it under each of its
    names.
    """
    install(model, layers)
    accelerate(model)
    config = OctavoConfig(**structure_of(layers).as_dict())
    model.register_to_config(quantization_config=config)  # type: ignore[operator]
    model.is_quantized, model.quantization_method = True, config.quant_method  # type: ignore[assignment]
    model.hf_quantizer = OctavoQuantizer(config)  # type: ignore[assignment]


def _misfit(name: str, fact: str) -> OctavoError:
    remedy = "Calibrate again, or load the checkpoint with the class that its config.json names."
    return MisfitError(f"{name}: {fact}. {remedy}")


# diffusers has no entry point for quantizers of other packages; it looks quantizers up in these tables
AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = OctavoQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = OctavoConfig

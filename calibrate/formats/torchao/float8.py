"""Describes the weights of FP8 layers as torchao 0.18 describes its `Float8Tensor`, in JSON."""

from typing import Any

import torch

from octavo.capture.tensors import dtype_name

from ...layers.modules import QuantizedLayer

_CODES: dict[str, Any] = {"_type": "torch.dtype", "_data": "float8_e4m3fn"}
_AUTO: dict[str, Any] = {"_type": "KernelPreference", "_data": "AUTO"}
_PRODUCT: dict[str, bool] = {"emulate": False, "use_fast_accum": True, "pad_inner_dim": False}  # torchao's defaults
_PER_ROW: dict[str, Any] = {"_type": "PerRow", "_version": 1, "_data": {"dim": -1}}
# diffusers requires a config for quantizing, although it does not use the config when it loads a quantized model
CONFIG: dict[str, Any] = {
    "_type": "Float8DynamicActivationFloat8WeightConfig",
    "_version": 2,
    "_data": {
        "activation_dtype": _CODES,
        "activation_value_lb": None,
        "activation_value_ub": None,
        "alg_id": 0,
        "granularity": [_PER_ROW, _PER_ROW],
        "kernel_preference": _AUTO,
        "mm_config": {"_type": "Float8MMConfig", "_version": 1, "_data": _PRODUCT},
        "packing_format": {"_type": "Float8PackingFormat", "_data": "PLAIN"},
        "set_inductor_config": True,
        "weight_dtype": _CODES,
    },
}


def description(layer: QuantizedLayer) -> dict[str, Any]:
    """Returns the metadata that describe the weight of an FP8 layer, with the keys of torchao's Float8Tensor in
    torchao's order."""
    product = None if layer.weight_only else {"_type": "Float8MMConfig", "_data": _PRODUCT}
    return {
        "_type": "Float8Tensor",
        "_data": {
            "block_size": [1, layer.weight.shape[1]],
            "mm_config": product,
            "act_quant_kwargs": None if layer.weight_only else _inputs(layer.dtype),
            "kernel_preference": _AUTO,
            "dtype": {"_type": "torch.dtype", "_data": dtype_name(layer.dtype)},
        },
        "_tensor_data_names": ["qdata", "scale"],
    }


def _inputs(dtype: torch.dtype) -> dict[str, Any]:
    """Returns the description of how inputs in `dtype` become codes: with a scale for each token.

    `hp_value_lb` is the smallest number that torchao takes for the largest absolute value of a token. Without it,
    torchao divides a token of zeros by zero. With this number, 448 times the smallest normal number of `dtype`, the
    scale is always a normal number.
    """
    return {
        "_type": "QuantizeTensorToFloat8Kwargs",
        "_data": {
            "float8_dtype": _CODES,
            "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
            "mm_config": None,
            "hp_value_lb": 448 * torch.finfo(dtype).smallest_normal,
            "hp_value_ub": None,
            "kernel_preference": _AUTO,
        },
    }

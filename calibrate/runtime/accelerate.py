"""Replaces the integer layers of a model by layers that run on a fast backend."""

from torch import nn

from octavo.capture.errors import UsageError

from ..layers.install import names_of, replace
from ..layers.modules import QuantizedConv2d, QuantizedLayer, QuantizedLinear
from .attention import ATTENTION
from .int8_modules import BACKENDS, Int8Conv2d, Int8GELU, Int8Linear
from .operators import attend
from .shared_codes import SharedCodes

Int8Layer = Int8Linear | Int8Conv2d


def optimized(layer: QuantizedLayer, backend: str | None = None) -> Int8Layer:
    """Returns the fast form of the integer layer `layer`, an Int8Linear or Int8Conv2d with the same tensors, which runs
    on `backend`, a name in BACKENDS; None: on the backend of its input's device. If `layer` already is a fast form, its
    backend is changed in place, and `layer` is returned.

    Raises UsageError if `backend` is not a name in BACKENDS.
    """
    if backend not in (None, *BACKENDS):
        raise UsageError(f"backend: {backend!r} is unknown. Choose one of {', '.join(BACKENDS)}.")
    if not isinstance(layer, Int8Layer):
        layer = Int8Conv2d.of(layer) if isinstance(layer, QuantizedConv2d) else Int8Linear.of(layer)
    layer.backend = backend
    return layer


def accelerate(model: nn.Module, backend: str | None = None, attention: str | bool = "auto") -> None:
    """Makes all integer layers of `model` run on `backend`, a name in BACKENDS; None: on the backend of their input's
    device. Changes `model` in place; its names, tensors and hooks stay the same.

    With `backend` "cpu" or None, forwards of the model on a CPU also compute attention, and the layers that stay float,
    by the kernels that were measured to be fastest on this processor. `attention` limits the kernels for attention:
    "auto" or True allows all; "float" allows those that compute in floating point; "integers" allows only the one that
    computes with integers; "torch" or False allows only torch's.

    Raises UsageError if `backend` is not a name in BACKENDS, or `attention` is another word.
    """
    word = ("auto" if attention else "torch") if isinstance(attention, bool) else attention
    if not isinstance(word, str) or word not in ATTENTION:
        raise UsageError(f"attention: {attention!r} is unknown. Choose one of {', '.join(ATTENTION)}.")
    shared_codes = SharedCodes()
    for first, names in names_of(model).items():
        layer = model.get_submodule(first)
        if isinstance(layer, (QuantizedLinear, QuantizedConv2d)):
            fast = optimized(layer, backend)
            fast.share(shared_codes)
            for name in names if fast is not layer else ():
                replace(model, name, fast)
    for first, names in names_of(model).items():
        module = model.get_submodule(first)
        if _is_gelu(module):
            fused = Int8GELU(module.proj, module.approximate).train(module.training)  # type: ignore[arg-type]
            for name in names:
                replace(model, name, fused)
    attend(model, word if backend in (None, "cpu") else None)


def _is_gelu(module: nn.Module) -> bool:
    """Returns whether `module` may be replaced by Int8GELU. It may if it is diffusers' class GELU, which computes a
    linear layer and then GELU, if the linear layer is an Int8Linear, and if neither module has hooks."""
    kind = type(module)
    if (kind.__module__, kind.__name__) != ("diffusers.models.activations", "GELU"):
        return False
    modules = [module, *module.children()]
    return isinstance(module.proj, Int8Linear) and not any(m._forward_hooks or m._forward_pre_hooks for m in modules)

"""Defines LinearState and Conv2dState, the classes of the integer layers that a backend computes. Such a layer holds
its tensors, and on a CPU also the weight in oneDNN's memory layout.

The module `int8_modules` has subclasses of both classes, with a forward that calls the backend. Operators in graphs of
torch.compile get a number instead of a layer, and find the layer by this number in LAYERS.
"""

import weakref
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from octavo.capture.errors import MisfitError
from octavo.capture.paging import page_out

from ..layers.modules import IntegerLayer, QuantizedConv2d, QuantizedLayer, QuantizedLinear
from ..layers.noise_level import NoiseLevel
from ..layers.scheme import QParams
from ..native import kernels
from .onednn_weights import Packed, pack
from .shared_codes import Quantization, SharedCodes

LAYERS: "weakref.WeakValueDictionary[int, Int8Layer]" = weakref.WeakValueDictionary()  # all living layers, by number


def number_of(layer: "Int8Layer") -> Tensor:
    """Registers `layer` in LAYERS and returns its key there, as a 0-d int64 tensor. Graphs of torch.compile pass this
    number to their operators, which accept tensors but no layers."""
    LAYERS[id(layer)] = layer
    return torch.tensor(id(layer), device="cpu")


class Int8Layer(IntegerLayer):
    """An integer layer that runs on `backend`, a name in BACKENDS. If `backend` is None, the layer runs on the backend
    for the device of its input; the reference backend serves devices without a backend of their own. `number` is the
    layer's key in LAYERS, a 0-d int64 tensor. `shared_codes` has the codes of the last input, which this layer shares
    with other layers of the model.

    On the CPU, the first forward of a layer packs the weights of all integer layers of the model, that is, copies them
    to oneDNN's layout, and frees the plain weights, so that only one copy is in memory. A plain weight is restored when
    it is read, and when the module is moved, copied, saved or loaded; it is freed again in the next forward.
    """

    backend: str | None = None
    number: Tensor  # 0-d int64; the key of the layer in LAYERS
    shared_codes: SharedCodes | None = None  # the codes of the last input, shared with the other layers of the model
    _packed: Packed | None = None
    _quantizations: tuple[Quantization, ...] | None = None  # of the input, for each timestep bin
    _products: tuple[kernels.Linear, ...] | None = None  # of a linear layer, for each timestep bin

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.number = number_of(self)

    @classmethod
    def of(cls, layer: QuantizedLayer) -> Self:
        """Returns a fast layer that computes the same as the integer layer `layer`. The two layers share their tensors
        and the NoiseLevel object, which holds the noise level of the denoiser's current call."""
        geometry = (layer.geometry,) if isinstance(layer, QuantizedConv2d) else ()
        fast = cls(layer.numbers, *geometry)
        fast.noise_level = layer.noise_level
        return fast.train(layer.training)

    @property
    def packed(self) -> Packed:
        """The layer's tensors in the form that the CPU backend uses. The first access packs the weights of all integer
        layers of the model that are on the CPU."""
        if self._packed is None:
            self._pack()
            # all layers at once: weights packed later, between the tensors of calls, would fragment memory
            for layer in self.shared_codes.layers if self.shared_codes else ():
                weight = layer._parameters.get("weight")
                if layer.integer and not layer.weight_only and weight is not None and weight.device.type == "cpu":
                    layer._pack()
        assert self._packed is not None
        return self._packed

    def _pack(self) -> None:
        self._packed = pack(self, (self.shared_codes or SharedCodes()).layouts)  # type: ignore[arg-type]
        if (weight := self._parameters.pop("weight", None)) is not None:
            page_out(weight)

    def unpack(self) -> None:
        """Restores the plain int8 weight as a parameter from the packed weight, and drops everything that forwards have
        computed from the layer's tensors."""
        self._quantizations = self._products = None
        if self._packed is not None:
            weight = nn.Parameter(self._packed.plain(), requires_grad=False)
            self._parameters = {"weight": weight, **self._parameters}
            self._packed = None

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            self.unpack()
        return super().__getattr__(name)

    def bins(self, rows: int | None) -> int | list[int]:
        """Returns the index of the timestep bin to which the noise level of the current call belongs. If the samples of
        a batch have noise levels of their own, returns a list with an index for each of the `rows` samples. `rows` is
        None for an input without a batch. Returns 0 for a layer whose range does not depend on the noise level."""
        if not self.input_type.by_level:
            return 0
        bins: int | list[int] = (self.noise_level or NoiseLevel()).bins(self.edges, rows).tolist()
        return bins

    def quantization(self, index: int) -> Quantization:
        """Returns how the layer's input becomes codes in the timestep bin with the index `index`: the scale, the zero
        point, and the transform that is applied to the input first (smoothing or a rotation)."""
        if self._quantizations is None:
            numbers = zip(self.input_scale.view(-1).tolist(), self.input_zero_point.view(-1).tolist(), strict=True)
            self._quantizations = tuple(Quantization(*pair, self.transform) for pair in numbers)
        return self._quantizations[index]

    def qparams(self, index: int) -> QParams:
        """Returns scale and zero point of the layer's input in the timestep bin with the index `index`."""
        return QParams(self.input_scale.view(-1)[index], self.input_zero_point.view(-1)[index])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if fn(torch.empty(0)).dtype != torch.float32:
            raise MisfitError(
                "an 8-bit layer cannot be cast: its scales have to stay float32. "
                "Load the model again with the torch_dtype you want."
            )
        self.unpack()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        self.unpack()
        return self.__dict__ | {"number": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.number = number_of(self)
        self.share(self.shared_codes)

    def share(self, shared_codes: SharedCodes | None) -> None:
        """Gives this layer the object `shared_codes`. If several layers have the same object and receive the same
        tensor, only the first of them computes its codes. If `shared_codes` is None, this layer always computes the
        codes itself."""
        self.shared_codes = shared_codes
        if shared_codes is not None:
            shared_codes.layers.add(self)


class LinearState(Int8Layer, QuantizedLinear):
    """Holds the tensors of an integer linear layer for backends. The subclass Int8Linear adds the forward."""

    def product(self, library: kernels.Kernels, index: int) -> kernels.Linear:
        """Returns an object that computes, by a kernel of `library`, the layer's output from the codes of its input, in
        the timestep bin `index`. For a dynamic layer, the output still has to be multiplied by the scale of each row,
        and the bias added."""
        if self._products is None:
            weight = self.weight.detach().contiguous()
            deq = self.deq if self.calibrated else self.weight_scale
            offsets = self.quant_bias.view(-1, self.out_features) if self.calibrated else [None]
            rows = zip(offsets, deq.view(-1, self.out_features), strict=True)
            self._products = tuple(library.linear(weight, offset, scale) for offset, scale in rows)
        return self._products[index]


class Conv2dState(Int8Layer, QuantizedConv2d):
    """Holds the tensors of an integer convolution for backends. The subclass Int8Conv2d adds the forward."""

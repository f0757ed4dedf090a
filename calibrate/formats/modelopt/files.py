"""Defines Files: what vLLM-Omni and SGLang read in a directory in the layout of ModelOpt, for the checks of both.
Importing this module needs no torch."""

from pathlib import Path
from typing import NamedTuple

from octavo.capture.store.headers import Stored

from ..diffusers.directory import Model
from .rules import ALGO, FP8_DTYPE, IGNORE, METHOD, algorithm

VLLM_NAME, SGLANG_NAME = "vLLM-Omni", "SGLang"
LAYOUT = "layout"  # subject of the verdict on a checkpoint that is meant for the other consumer alone
WEIGHT, WEIGHT_SCALE, INPUT_SCALE = ".weight", ".weight_scale", ".input_scale"
AGAIN = "Run octavo calibrate --format modelopt"
_PARTS = ("weight", "weight_scale", "input_scale", "bias")  # the tensors that an FP8 layer may have


class Files(NamedTuple):
    """The content of a directory in the layout of ModelOpt. `kind` is the class name of the model in config.json,
    `algo` the value of quant_algo as text. `ignore` are the entries that name the float layers; None if they are not a
    list of texts."""

    directory: Path
    model: Model
    kind: str
    algo: str
    ignore: list[str] | None

    @classmethod
    def open(cls, directory: Path) -> "Files":
        """Reads config.json and the headers of the weight files. Raises FileError for files that are missing or
        damaged."""
        model = Model.open(directory)
        algo, ignore = algorithm(model.quantization)
        listed = [] if ignore is None else ignore
        sound = isinstance(listed, list) and all(isinstance(entry, str) for entry in listed)
        return cls(directory, model, str(model.config.get("_class_name")), str(algo), listed if sound else None)

    @property
    def layers(self) -> list[str]:
        """The names of the layers whose weight is a matrix."""
        tensors = self.model.tensors.items()
        return [
            key.removesuffix(WEIGHT)
            for key, tensor in tensors
            if key.endswith(WEIGHT) and len(tensor.stored.shape) == 2
        ]

    @property
    def codes(self) -> list[str]:
        """The names of the layers whose weight is a matrix of FP8 codes."""
        return [name for name in self.layers if self.stored(name + WEIGHT).dtype == FP8_DTYPE]

    def stored(self, key: str) -> Stored:
        """Returns dtype and shape of the tensor `key`."""
        return self.model.tensors[key].stored

    def scale_fault(self, key: str, shapes: tuple[tuple[int, ...], ...], missing: str) -> str | None:
        """Returns what is wrong with the scale `key`, with advice; None if it is float32 of one of these `shapes`.
        `missing` says what happens without it."""
        if key not in self.model.tensors:
            return f"{key} is missing: {missing}. {AGAIN}"
        stored = self.stored(key)
        if stored.dtype != "float32" or stored.shape not in shapes:
            return f"{key} is {stored.dtype} {list(stored.shape)}, not float32 {list(shapes[0])}. {AGAIN}"
        return None

    def stray(self) -> str | None:
        """Returns the name of a tensor of an FP8 layer that neither consumer knows, such as `pre_quant_scale`, by which
        ModelOpt smooths inputs; None if there is none."""
        codes = set(self.codes)
        for key in self.model.tensors:
            owner, _, leaf = key.rpartition(".")
            if (owner in codes and leaf not in _PARTS) or owner.rpartition(".")[0] in codes:
                return key
        return None

    def config_fault(self, algos: tuple[str, ...]) -> str:
        """Returns what is wrong with the quantization_config for a consumer that knows these `algos`, with advice; ""
        if nothing is."""
        if self.algo not in algos:
            return f"{ALGO} is {self.algo}, not {' or '.join(algos)}. {AGAIN}"
        if self.ignore is None:
            return f"{IGNORE} is not a list of names. {AGAIN}"
        method = self.model.quantization.get("quant_method")
        return "" if method == METHOD else f"quant_method is not {METHOD!r}. {AGAIN}"

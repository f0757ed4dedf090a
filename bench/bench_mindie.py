"""Compares MindIE-SD's own loader with Octavo's 8-bit layers, bit for bit, on a small SD3 with outliers.

    pip install --no-deps --target DIR mindiesd einops
    python -m bench.bench_mindie DIR

DIR is a directory outside the project's environment, where pip installs MindIE-SD. MindIE-SD's loader and layers run
unchanged. The operators of torch_npu are replaced by those of tests/helpers/npu_standin.py and npu_mx_standin.py, which
follow Ascend's documentation. The column "other operator" repeats the comparison to show that it detects a difference:
with an npu_quantize that rounds before it adds the zero point, or, for MXFP8, with an npu_dynamic_mx_quant that chooses
scales with which no code is clamped.
"""

import argparse
import copy
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibrate.formats.ascend.names import file_names
from octavo.calibrate.formats.ascend.write import write_ascend
from octavo.calibrate.formats.export import kept_float
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.schemes import MXFP8
from octavo.calibrate.result import Result
from octavo.capture.files import Modes
from octavo.capture.tensors import dtype_name
from tests.helpers import npu_mx_standin, npu_standin
from tests.zoo.hard_sd3 import Call, calibrated, hard, prompts

STEPS = 8  # denoising steps of a prompt; a checkpoint with timestep ranges has one row for each
DTYPES = (torch.float16, torch.bfloat16)
WAYS: dict[str, dict[str, Any]] = {  # by the word in the table: the settings of the calibration
    "static": {"activations": "static"},
    "timestep": {"activations": "timestep"},
    "mxfp8": {"element": "mxfp8", "activations": "dynamic", "clamping": True},
}


def rounded_first(x: Tensor, scales: Tensor, zero_points: Tensor, **_: Any) -> Tensor:
    """Computes npu_quantize in the wrong order: rounds before it adds the zero point."""
    return ((x.float() / scales.float()).round() + zero_points.float()).clamp(-128, 127).to(torch.int8)


def mindie(directory: Path) -> ModuleType:
    """Imports MindIE-SD's quantization package from `directory`, with a torch_npu made of the stand-in's operators."""
    device = SimpleNamespace(
        device_count=lambda: 0, is_available=lambda: False, config=SimpleNamespace(), empty_cache=lambda: None
    )
    torch_npu = ModuleType("torch_npu")
    torch_npu.__spec__ = ModuleSpec("torch_npu", None)
    torch_npu.npu = device  # type: ignore[attr-defined]
    for name in npu_standin.KERNELS:
        setattr(torch_npu, name, operator(name))
    npu_mx_standin.put_into(torch_npu)
    torch.npu = device  # type: ignore[attr-defined]
    sys.modules["torch_npu"] = torch_npu
    sys.path.insert(0, str(directory))
    import mindiesd.quantization

    package: ModuleType = mindiesd.quantization
    return package


def operator(name: str) -> Callable[..., Any]:
    """Returns an operator of the stand-in with torch_npu's signature, which takes dtypes in place of their numbers."""

    def call(*arguments: Any, **options: Any) -> Any:
        numbered = {
            key: npu_standin.NUMBERS[value] if isinstance(value, torch.dtype) else value
            for key, value in options.items()
        }
        return npu_standin.KERNELS[name](*arguments, **numbered)

    return call


@contextmanager
def other_operators() -> Iterator[None]:
    """Makes npu_quantize round before it adds the zero point, and npu_dynamic_mx_quant choose scales with which no code
    is clamped, while the block runs."""
    torch_npu: Any = sys.modules["torch_npu"]
    right, blocks = npu_standin.KERNELS["npu_quantize"], torch_npu.npu_dynamic_mx_quant
    npu_standin.KERNELS["npu_quantize"] = rounded_first
    torch_npu.npu_dynamic_mx_quant = partial(blocks, scale_alg=1)
    try:
        yield
    finally:
        npu_standin.KERNELS["npu_quantize"], torch_npu.npu_dynamic_mx_quant = right, blocks


def outputs(model: nn.Module, calls: Sequence[Call], before: Callable[[Call], None]) -> Tensor:
    """Runs the model on all calls; returns the outputs in one flat tensor. Calls `before` before each call."""
    tensors = []
    for call in calls:
        before(call)
        with torch.no_grad():
            tensors.append(model(**call.kwargs)[0].flatten())
    return torch.cat(tensors)


def loaded(package: ModuleType, model: nn.Module, folder: Path, result: Result) -> nn.Module:
    """Copies the float model and lets MindIE-SD load the checkpoint in `folder` into the copy."""
    schemes = {layer.scheme for layer in result.layers.values()}
    dtype = next(iter(result.layers.values())).dtype
    policy = package.TimestepPolicyConfig("static")  # otherwise timestep layers use a range for each token
    quantized_model: nn.Module = package.quantize(
        copy.deepcopy(model), str(folder / file_names(schemes.pop())[1]), timestep_config=policy, dtype=dtype
    )
    return quantized_model


def print_row(package: ModuleType, way: str, dtype: torch.dtype, smoothing: bool) -> None:
    """Prints the row of one configuration: how many numbers of the output differ."""
    model, calls = hard(dtype=dtype), prompts(4, STEPS, dtype=dtype)
    levels = [float(call.kwargs["timestep"][0]) for call in calls[:STEPS]]
    keep_float = ()
    if way == "mxfp8":
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        keep_float = tuple(kept_float(("ascend",), model, linears, MXFP8))
    result = calibrated(model, calls, smoothing=smoothing, keep_float=keep_float, **WAYS[way])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "w8a8")
        folder.mkdir(0o750)
        write_ascend(result.layers, model, folder, Modes(), timesteps=levels)
        theirs = loaded(package, model, folder, result)

    def step(call: Call) -> None:
        package.TimestepManager.set_timestep_idx(call.step)

    with quantized(model, result.layers):
        ours = outputs(model, calls, lambda call: None)
    differing = int((outputs(theirs, calls, step) != ours).sum())
    with other_operators():
        other = int((outputs(theirs, calls, step) != ours).sum())
    cells = way, dtype_name(dtype), "yes" if smoothing else "no", len(result.layers)
    print(f"| {' | '.join(map(str, cells))} | {differing} of {ours.numel()} | {other} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    package = mindie(parser.parse_args().directory)
    print(
        "| activations | dtype | smoothing | layers | numbers that differ | other operator |\n|---|---|---|---|---|---|"
    )
    for way, dtype, smoothing in itertools.product(WAYS, DTYPES, (False, True)):
        print_row(package, way, dtype, smoothing)


if __name__ == "__main__":
    main()

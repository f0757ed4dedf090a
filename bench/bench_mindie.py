"""Compares MindIE-SD's own loader with the integer layers, bit for bit, on a small SD3 transformer with outliers.

    pip install --no-deps --target DIR mindiesd einops
    python -m bench.bench_mindie DIR

DIR holds MindIE-SD apart from the project's environment. Its loader and its layers run as they are; the operators of
torch_npu are those of tests/helpers/npu_standin.py, which computes what Ascend's documentation says. "Rounded first" is
the same with an npu_quantize that rounds before it adds the zero point: the comparison sees the difference.
"""

import argparse
import copy
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from octavo.calibrate.formats.ascend.names import file_names
from octavo.calibrate.formats.ascend.write import write_ascend
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.result import Result
from octavo.capture.files import Modes
from tests.helpers import npu_standin
from tests.zoo.hard_sd3 import Call, calibrated, hard, prompts

STEPS = 8  # denoising steps of a prompt, so that a timestep checkpoint has as many rows
DTYPES = (torch.float16, torch.bfloat16)


def rounded_first(x: Tensor, scales: Tensor, zero_points: Tensor, **_: Any) -> Tensor:
    """An npu_quantize in the wrong order."""
    return ((x.float() / scales.float()).round() + zero_points.float()).clamp(-128, 127).to(torch.int8)


def mindie(directory: Path) -> ModuleType:
    """MindIE-SD's package of quantization, imported from `directory`, with a torch_npu of the stand-in's operators."""
    device = SimpleNamespace(
        device_count=lambda: 0, is_available=lambda: False, config=SimpleNamespace(), empty_cache=lambda: None
    )
    torch_npu = ModuleType("torch_npu")
    torch_npu.__spec__ = ModuleSpec("torch_npu", None)
    torch_npu.npu = device  # type: ignore[attr-defined]
    for name in npu_standin.KERNELS:
        setattr(torch_npu, name, operator(name))
    torch.npu = device  # type: ignore[attr-defined]
    sys.modules["torch_npu"] = torch_npu
    sys.path.insert(0, str(directory))
    import mindiesd.quantization

    found: ModuleType = mindiesd.quantization
    return found


def operator(name: str) -> Callable[..., Any]:
    """An operator of the stand-in as torch_npu has it, with dtypes where the schema has numbers."""

    def call(*arguments: Any, **options: Any) -> Any:
        numbered = {
            key: npu_standin.NUMBERS[value] if isinstance(value, torch.dtype) else value
            for key, value in options.items()
        }
        return npu_standin.KERNELS[name](*arguments, **numbered)

    return call


@contextmanager
def wrong_order() -> Iterator[None]:
    """Inside, npu_quantize rounds before it adds the zero point."""
    right = npu_standin.KERNELS["npu_quantize"]
    npu_standin.KERNELS["npu_quantize"] = rounded_first
    try:
        yield
    finally:
        npu_standin.KERNELS["npu_quantize"] = right


def outputs(model: nn.Module, calls: Sequence[Call], before: Callable[[Call], None]) -> Tensor:
    """The outputs of all calls in one tensor; `before` is called before each."""
    made = []
    for call in calls:
        before(call)
        with torch.no_grad():
            made.append(model(**call.kwargs)[0].flatten())
    return torch.cat(made)


def loaded(package: ModuleType, model: nn.Module, folder: Path, result: Result) -> nn.Module:
    """A copy of the float model into which MindIE-SD loads the checkpoint in `folder`."""
    schemes = {layer.scheme for layer in result.layers.values()}
    dtype = next(iter(result.layers.values())).dtype
    policy = package.TimestepPolicyConfig("static")  # else timestep layers find the range of each token
    made: nn.Module = package.quantize(
        copy.deepcopy(model), str(folder / file_names(schemes.pop())[1]), timestep_config=policy, dtype=dtype
    )
    return made


def print_row(package: ModuleType, activations: str, dtype: torch.dtype, smoothing: bool) -> None:
    """Prints how many numbers of the output differ."""
    model, calls = hard(dtype=dtype), prompts(4, STEPS, dtype=dtype)
    levels = [float(call.kwargs["timestep"][0]) for call in calls[:STEPS]]
    result = calibrated(model, calls, activations=activations, smoothing=smoothing)
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
    with wrong_order():
        other = int((outputs(theirs, calls, step) != ours).sum())
    cells = activations, str(dtype).removeprefix("torch."), "yes" if smoothing else "no", len(result.layers)
    print(f"| {' | '.join(map(str, cells))} | {differing} of {ours.numel()} | {other} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    package = mindie(parser.parse_args().directory)
    print(
        "| activations | dtype | smoothing | layers | numbers that differ | rounded first |\n|---|---|---|---|---|---|"
    )
    for activations, dtype, smoothing in itertools.product(("static", "timestep"), DTYPES, (False, True)):
        print_row(package, activations, dtype, smoothing)


if __name__ == "__main__":
    main()

"""Shows that ComfyUI's own code loads and computes files in format `comfy` in FP8 and MXFP8.

    python -m bench.consumers comfy --comfyui DIR

For a tiny model of each family, with random weights, the program writes a file in FP8 and one in MXFP8, and lets
ComfyUI load both on the CPU (`bench.comfy_child`). It checks that no tensor is missing or left over, and that the codes
and the scales are those that were written.

In FP8 ComfyUI is made to compute on the CPU what it computes on CUDA: with an input scale that is a power of two, its
codes of inputs are those of Octavo's layer, and its output is, bit for bit, what torch's product of FP8 matrices gives
for them; the layer of Octavo, whose sums are exact, differs only by the rounding of float32 sums. With another input
scale its codes are those of `tests.zoo.comfy_models.eager_fp8`.

torch has no product in MXFP8 on a CPU, so ComfyUI dequantizes the weights. The codes of inputs, which ComfyUI computes
with the functions that it uses on CUDA, are those of Octavo's layer.
"""

import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from octavo.calibrate.formats.comfy.check import COMFYUI, check
from octavo.calibrate.formats.comfy.names import family_of, native_names, together
from octavo.calibrate.formats.comfy.structure import FILES, FP8, MARKER, MXFP8
from octavo.calibrate.formats.comfy.write import join, write_comfy
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.modules import QuantizedLayer, QuantizedLinear
from octavo.calibrate.layers.weights import decoded
from octavo.capture.files import Modes
from tests.zoo.comfy_models import eager_fp8, in_rows, randomized
from tests.zoo.fp8_layers import INPUT_SCALE, fp8_layers

from .comfy_child import DTYPES, input_for
from .consumer_comfy import CASES, LEAST, Case, computed, output, sd3
from .consumer_jobs import Row, decibels

BINARY = 2.0**-6  # an input scale that is a power of two
FLOATS = ("embed", "proj_out", "norm_out", "_in", "final_layer")  # words in the names of layers that stay float
# dB between outputs with float32 sums and with exact ones; in bfloat16 a few of them are rounded to the other side
NEAR = {"float32": 120.0, "bfloat16": 70.0}


class Kind(NamedTuple):
    """A kind of file: its `scheme`, that of the layers that compute as ComfyUI does on a CPU (`computing`), the name of
    its file, the formats that ComfyUI emulates, and the input scale of static layers."""

    scheme: str
    computing: str
    file: str
    emulated: list[str]
    input_scale: float = BINARY


KINDS = {
    "FP8": Kind("W8A8_FP8", "W8A8_FP8", FILES[1], []),
    "MXFP8": Kind("W8A8_MXFP8", "W8A16_MXFP8", FILES[2], [MXFP8]),
    "FP8 with another input scale": Kind("W8A8_FP8", "W8A8_FP8", FILES[1], [], INPUT_SCALE),
}


def prove(folder: Path, comfyui: Path) -> Iterator[Row]:
    """Writes files for each of CASES into `folder`, in FP8 and MXFP8, and lets the ComfyUI in the directory `comfyui`
    load and compute them. Yields a row for each."""
    for name, make in CASES.items():
        for word, kind in KINDS.items():
            if kind.input_scale != BINARY and make is not sd3:
                continue
            try:
                torch.manual_seed(0)
                ok, fact = _proven(make(), kind, folder / f"{name} {word}".replace(" ", "-"), comfyui)
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                ok, fact = False, str(error).strip().splitlines()[-1]
            yield Row(f"{name}, {word}", "computed", ok, fact)


def _written(model: nn.Module, kind: Kind, place: Path, scheme: str) -> dict[str, QuantizedLinear]:
    """Writes the file of `model` into `place`; returns the layers of `scheme`, with the same codes."""
    place.mkdir(parents=True, exist_ok=True)
    (place / kind.file).unlink(missing_ok=True)
    groups = together(model)
    write_comfy(fp8_layers(model, kind.scheme, groups, kind.input_scale, FLOATS), model, place, Modes())
    return fp8_layers(model, scheme, groups, kind.input_scale, FLOATS)


def _proven(case: Case, kind: Kind, place: Path, comfyui: Path) -> tuple[bool, str]:
    """Writes the file of a case, runs ComfyUI on it, and returns whether all holds, and the facts."""
    model = randomized(case.model)
    computing = _written(model, kind, place, kind.computing)
    results, notes = computed(case, place / kind.file, place, comfyui, emulated=kind.emulated)
    layers = fp8_layers(model, kind.scheme, together(model), kind.input_scale, FLOATS)
    count, faults, least = _compared(model, layers, results, kind)
    facts = faults[:1] or [f"{count} layers, codes of weights and inputs equal, outputs agree to {least}"]
    if not case.theirs:
        return not faults and not notes, "; ".join([*facts, *notes])
    with torch.no_grad():
        exact = case.restored(output(model(**case.ours)))
        with quantized(model, computing):
            ours = case.restored(output(model(**case.ours)))
    apart, loss = (decibels(reference, results["output"]) for reference in (ours, exact))
    facts += [f"output {apart:.1f} dB from Octavo's, {loss:.1f} dB from the float model's", *notes]
    return not faults and not notes and apart > LEAST, "; ".join(facts)


def _compared(
    model: nn.Module, layers: Mapping[str, QuantizedLayer], results: dict[str, Tensor], kind: Kind
) -> tuple[int, list[str], str]:
    """Compares the layers that ComfyUI loaded and computed with `layers`; returns their number, the differences, and
    how close the outputs are."""
    faults: list[str] = []
    least = dict.fromkeys(DTYPES, float("inf"))
    loaded = {key.removesuffix("|weight") for key in results if key.endswith("|weight")}
    matrices = list(_matrices(model, layers))
    if loaded != {matrix.name for matrix in matrices}:
        return len(matrices), [f"ComfyUI loaded {len(loaded)} of {len(matrices)} layers"], ""
    for matrix in matrices:
        theirs = {key.partition("|")[2]: value for key, value in results.items() if key.startswith(f"{matrix.name}|")}
        find = (
            _fp8_faults(matrix, theirs, least, kind) if kind.file == FILES[1] else _mxfp8_faults(matrix, theirs, least)
        )
        faults += [f"{matrix.name} {fault}" for fault in find]
    return len(matrices), faults, " and ".join(f"{least[word]:.0f} dB in {word}" for word in DTYPES)


class Matrix(NamedTuple):
    """A matrix in a file: its name, one of the layers that it is made of, and its codes (as uint8), scales and bias."""

    name: str
    layer: QuantizedLayer
    codes: Tensor
    scales: Tensor
    bias: Tensor | None


def _matrices(model: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Iterator[Matrix]:
    """Yields the matrices that the 8-bit `layers` of `model` become."""
    for native, rows in native_names(model.state_dict(), family_of(model)).items():
        owner, _, leaf = native.rpartition(".")
        names = [name.rpartition(".")[0] for name in rows.names]
        if leaf != "weight" or names[0] not in layers:
            continue
        parts = [layers[name] for name in names]
        biases = [layer.bias.detach() for layer in parts if layer.bias is not None]
        yield Matrix(
            owner,
            parts[0],
            join([layer.weight.detach().view(torch.uint8) for layer in parts], rows),
            join([layer.weight_scale for layer in parts], rows),
            join(biases, rows) if biases else None,
        )


def _fp8_faults(matrix: Matrix, theirs: Mapping[str, Tensor], least: dict[str, float], kind: Kind) -> Iterator[str]:
    """Yields in words how an FP8 layer of ComfyUI, with the results `theirs`, differs from what it should be, and notes
    the least agreement of outputs with exact ones in `least`."""
    weight, scale, bias = matrix.codes.view(torch.float8_e4m3fn), matrix.scales[0], matrix.bias
    input_scale = matrix.layer.input_scale
    if (
        not torch.equal(theirs["weight"].view(torch.uint8), matrix.codes)
        or theirs["weight_scale"].item() != scale.item()
    ):
        yield "has other numbers in ComfyUI"
    for word, dtype in DTYPES.items():
        x = input_for(matrix.name, weight.shape[1], dtype)
        ours = matrix.layer.input.codes(x).q
        if kind.input_scale != BINARY:
            ours = (x * (1.0 / input_scale).to(dtype)).clamp(-448.0, 448.0)
        ours = ours.to(torch.float8_e4m3fn).flatten(0, 1)
        if not torch.equal(theirs[f"{word}|codes"].float(), ours.float()):  # a zero may have another sign
            yield f"has other codes of inputs in {word}"
        if theirs[f"{word}|scale"].item() != input_scale.item():
            yield "has another input scale"
        whole = F.ScalingType.TensorWise
        added = None if bias is None else bias.to(dtype)
        product = F.scaled_mm(ours, weight.t(), input_scale, whole, scale, whole, bias=added, output_dtype=dtype)
        if not torch.equal(theirs[word].flatten(0, 1), product):
            yield f"does not compute torch's product of FP8 matrices in {word}"
        exact = eager_fp8(x, weight, scale, input_scale, bias)
        least[word] = min(least[word], decibels(exact, theirs[word]))
        if least[word] < NEAR[word]:
            yield f"computes something else in {word}"


def _mxfp8_faults(matrix: Matrix, theirs: Mapping[str, Tensor], least: dict[str, float]) -> Iterator[str]:
    """Yields in words how an MXFP8 layer of ComfyUI differs from what it should be. The parameters are those of
    `_fp8_faults`."""
    codes, scales, bias = matrix.codes, matrix.scales, matrix.bias
    rows, width = codes.shape
    read = in_rows(theirs["weight_scale"], rows, width // 32)
    if not torch.equal(theirs["weight"].view(torch.uint8)[:rows], codes) or not torch.equal(read, scales):
        yield "has other numbers in ComfyUI"
    values = codes.view(torch.float8_e4m3fn).float() * decoded(scales).repeat_interleave(32, 1)
    if not torch.equal(theirs["values"][:rows], values):
        yield "stands for other values in ComfyUI"
    for word, dtype in DTYPES.items():
        x = input_for(matrix.name, width, dtype)
        ours = matrix.layer.input.codes(x)
        if not torch.equal(theirs[f"{word}|codes"].float()[: len(x) * x.shape[1]], ours.q.flatten(0, 1)):
            yield f"has other codes of inputs in {word}"
        exponents = in_rows(theirs[f"{word}|scale"], len(x) * x.shape[1], width // 32)
        if not torch.equal(decoded(exponents), ours.scale.flatten(0, 1)[:, ::32]):
            yield f"has other scales of inputs in {word}"
        exact = F.linear(x, values.to(dtype), None if bias is None else bias.to(dtype))
        least[word] = min(least[word], decibels(exact, theirs[word]))
        if not torch.equal(theirs[word], exact):
            yield f"computes something else in {word}"


def silent(folder: Path, comfyui: Path) -> Iterator[Row]:
    """Damages the FP8 file of a Stable Diffusion 3.5 in ways that ComfyUI passes over, and lets it compute each; yields
    rows like `prove`. A row holds if `octavo inspect` has a negative verdict on the damaged file."""
    torch.manual_seed(0)
    case, place = sd3(), folder / "silent-fp8"
    model = randomized(case.model)
    _written(model, KINDS["FP8"], place, "W8A8_FP8")
    with torch.no_grad():
        exact = case.restored(output(model(**case.ours)))
    tensors = load_file(place / FILES[1])
    layers = [name.removesuffix(f".{MARKER}") for name in tensors if name.endswith(f".{MARKER}")]
    halves = {f"{name}.weight_scale": tensors[f"{name}.weight_scale"] / 2 for name in layers}
    doubles = {f"{name}.pre_quant_scale": torch.full(tensors[f"{name}.weight"].shape[1:], 2.0) for name in layers}
    damages = {
        "as written": tensors,
        "one marker lost": {name: value for name, value in tensors.items() if name != f"{layers[0]}.{MARKER}"},
        "no input scales": {name: value for name, value in tensors.items() if not name.endswith(".input_scale")},
        "pre_quant_scale": tensors | halves | doubles,
    }
    for word, changed in damages.items():
        file = place / f"{word.replace(' ', '-')}.safetensors"
        save_file(changed, file)
        results, _ = computed(case, file, place, comfyui, emulated=[])
        bad = [verdict for verdict in check(file) if verdict.consumer == COMFYUI and not verdict.ok]
        verdict = bad[0].fact.split(" (and ")[0] if bad else "sound"
        fact = f"output {decibels(exact, results['output']):.1f} dB from the float model's; {verdict}"
        yield Row(f"Stable Diffusion 3.5, {FP8}, {word}", "computed", bool(bad) == (word != "as written"), fact)

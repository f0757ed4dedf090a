"""Compares MindIE-SD's own quantized attention with the one whose error Octavo reports.

    pip install --no-deps --target DIR mindiesd einops
    python -m bench.bench_mindie_attention DIR

A small SD3 is written in the format `ascend` with quantized attention of each type, with and without a rotation.
MindIE-SD's loader reads it and sets `fa_quant` of each attention module, whose rotations are compared with those that
were written. Then `fa_quant` and Octavo compute the attention of random numbers; the table has the SQNR of the former
with respect to the latter. Rounding the output to bfloat16 costs 55 dB.

MindIE-SD's code runs unchanged, but on operators that follow Ascend's documentation (tests/helpers/npu_mx_standin.py,
and those below): the codes are those that Ascend documents, while the softmax and the products are in float32, because
how the fused kernel rounds them is not documented.
"""

import argparse
import copy
import itertools
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from octavo.calibrate.attention.inputs import Inputs, attended
from octavo.calibrate.attention.kinds import KINDS
from octavo.calibrate.attention.measure import AttentionRow
from octavo.calibrate.attention.names import ASCEND
from octavo.calibrate.attention.rotations import HADAMARD, NONE, rotation_of
from octavo.calibrate.formats.ascend.names import ROTATIONS, file_names
from octavo.calibrate.formats.ascend.write import write_ascend
from octavo.capture.files import Modes
from tests.helpers.npu_mx_standin import BLOCK, dynamic_mx_quant
from tests.zoo.hard_sd3 import calibrated, hard, prompts

from .bench_mindie import mindie
from .consumer_jobs import decibels

DTYPE = torch.bfloat16
SHAPES = ((1, 4, 300, 128), (1, 2, 40, 64))  # batch, heads, tokens, channels of a head


def mx_quant(x: Tensor, *, dst_type: Any, axis: int) -> tuple[Tensor, Tensor]:
    """Computes npu_dynamic_mx_quant of `x` (tokens, heads, channels) along its last or first axis. Returns the codes,
    and in place of Ascend's scales a factor for each code."""
    moved = x.movedim(axis, -1)
    flat = moved.reshape(-1, moved.shape[-1])
    codes, exponents = dynamic_mx_quant(flat, dst_type=dst_type)
    powers = (exponents.flatten(1).float() - 127).exp2().repeat_interleave(BLOCK, 1)[:, : flat.shape[1]]
    return codes.view(moved.shape).movedim(-1, axis), powers.view(moved.shape).movedim(-1, axis)


def block_quant(x: Tensor, *, dst_type: Any, row_block_size: int, col_block_size: int) -> tuple[Tensor, Tensor]:
    """Computes npu_dynamic_block_quant of `x` (heads, tokens, channels). Returns the codes, and in place of Ascend's
    scales a factor for each code."""
    factors = torch.empty(x.shape)
    for tokens in range(0, x.shape[1], row_block_size):
        for channels in range(0, x.shape[2], col_block_size):
            block = (slice(None), slice(tokens, tokens + row_block_size), slice(channels, channels + col_block_size))
            factors[block] = x[block].float().abs().amax((1, 2), keepdim=True) / 448
    return (x.float() / factors).to(torch.float8_e4m3fn), factors


def fused(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor]:
    """Computes npu_fused_infer_attention_score_v2 for one batch item, in float32."""
    parts = (
        codes.float() * options[f"dequant_scale_{name}"]
        for name, codes in (("query", query), ("key", key), ("value", value))
    )
    if options["input_layout"] == "TND":
        parts = (part.transpose(0, 1)[None] for part in parts)
    output = attended(*parts, None, options["softmax_scale"]).to(options["out_dtype"])
    return (output[0].transpose(0, 1) if options["input_layout"] == "TND" else output,)


def put_operators(package: ModuleType) -> None:
    """Gives the stand-in of torch_npu that `package`, MindIE-SD's, imported the operators of attention."""
    torch_npu: Any = sys.modules["torch_npu"]
    torch_npu.npu_dynamic_mx_quant, torch_npu.npu_dynamic_block_quant = mx_quant, block_quant
    torch_npu.npu_fused_infer_attention_score_v2 = fused
    layer: Any = sys.modules[f"{package.__name__}.layer"]
    layer.fused_infer_attention_score_v2 = fused


def print_rows(package: ModuleType, type: str, rotated: bool) -> None:
    """Writes a checkpoint, lets MindIE-SD load it, and prints a row for each of SHAPES."""
    model = hard(dtype=DTYPE)
    result = calibrated(model, prompts(2, 2, dtype=DTYPE), activations="dynamic")
    names = [name for name, module in model.named_modules() if name.endswith("attn")]
    for index, shape in enumerate(SHAPES):
        row = AttentionRow("", type, HADAMARD if rotated else NONE, shape[-1], (50.0,), None)
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "w8a8")
            folder.mkdir(0o750)
            write_ascend(result.layers, model, folder, Modes(), attention=dict.fromkeys(names, row))
            theirs = package.quantize(copy.deepcopy(model), str(folder / file_names("W8A8_DYNAMIC")[1]), dtype=DTYPE)
        rotation = rotation_of(shape[-1]).to(DTYPE) if rotated else torch.eye(shape[-1], dtype=DTYPE)
        modules = [theirs.get_submodule(name).fa_quant for name in names]
        same = all(torch.equal(getattr(module, word), rotation) for module in modules for word in ROTATIONS)
        torch.manual_seed(index)
        query, key, value = (torch.randn(shape, dtype=DTYPE) for _ in range(3))
        ours = KINDS[type].run(Inputs.of(query, key, value), rotated, torch.arange(shape[-2]))
        near = decibels(ours, modules[0](query, key, value, layout="BNSD").float())
        cells = type, "yes" if rotated else "no", "x".join(map(str, shape)), f"{len(modules)} of {len(names)}"
        print(f"| {' | '.join(cells)} | {'equal' if same else 'different'} | {near:.1f} dB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    package = mindie(parser.parse_args().directory)
    print("| type | rotated | shape | modules with fa_quant | rotations | SQNR |\n|---|---|---|---|---|---|")
    put_operators(package)
    for type, rotated in itertools.product(ASCEND, (False, True)):
        print_rows(package, type, rotated)


if __name__ == "__main__":
    main()

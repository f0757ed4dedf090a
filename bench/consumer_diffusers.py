"""Shows that diffusers loads and computes directories in the formats `diffusers`, `torchao` and `sdnq`.

    python -m bench.consumers diffusers torchao sdnq

The libraries are installed into folders of their own and run in processes of their own, on the CPU: for the format
`diffusers` with Octavo, for the others without. sdnq (GPL-3.0) is not part of this project. For a tiny model of each
family and each scheme, diffusers loads the directory with from_pretrained. The program checks that no tensor is missing
or left over; that the integers and scales are those that were written; and that each layer computes what Octavo's layer
computes in its reference implementation. sdnq divides by the scale of a token in the order max / 127 and adds the bias
before it rounds to the dtype. It keeps the inputs of small layers float; these outputs are not compared.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .consumer_jobs import LEVEL, REFERENCE, Job, Proof, agreement, answer, decibels

DIFFUSERS = "diffusers==0.42.1"
FAMILIES = ("sd3", "flux", "flux2", "qwen_image", "wan", "z_image")
LEAST = {"float32": 100.0, "bfloat16": 45.0}  # dB of a layer's output; bfloat16 itself has about 50


def judge(job: Job, facts: Mapping[str, Any]) -> tuple[bool, str]:
    """Returns whether the facts of a directory are as they should be, and the facts in words."""
    faults = [] if facts["equal"] else ["other numbers than those that were written"]
    faults += [f"{facts['unmatched']} tensors missing or left over"] if facts["unmatched"] else []
    few = f", {facts['compared']} of them compared" if facts["compared"] < facts["layers"] else ""
    far = [f"{facts['apart']:.0f} dB from Octavo's"] if facts["apart"] < facts["least"] else []
    fact = ", ".join([f"{facts['layers']} layers{few}", agreement(facts["least"]), *far, *faults])
    return bool(facts["compared"]) and not faults and facts["least"] > LEAST[job.dtype], fact


def _proof(name: str, packages: Sequence[str], schemes: Mapping[str, torch.dtype], **variables: str) -> Proof:
    """Returns the proof for diffusers with the `packages` of the library `name`."""
    module = "bench.consumer_diffusers"
    return Proof(module, name, (DIFFUSERS, *packages), FAMILIES, schemes, "computed", judge, variables)


_ALL = dict.fromkeys(("W8A8", "W8A8_DYNAMIC", "W8A16"), torch.float32)
_FP8 = {"W8A8_FP8_DYNAMIC": torch.bfloat16, "W8A16_FP8": torch.float32}
_SDNQ = {"W8A8_DYNAMIC": torch.float32, "W8A16": torch.bfloat16}
PROOFS = {
    "diffusers": _proof("diffusers", (), _ALL | {"W8A8_TIMESTEP": torch.float32}),
    "torchao": _proof("torchao", ("torchao==0.18.0",), _ALL | _FP8),
    "sdnq": _proof("sdnq", ("sdnq==0.2.8",), _SDNQ, SDNQ_USE_TORCH_COMPILE="0"),
}


def _octavo(layer: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[bool, bool]:
    """Returns whether a layer of Octavo has these `tensors`, and that its output can be compared."""
    layer.noise_level = import_module("octavo.calibrate.layers.noise_level").NoiseLevel.of(torch.tensor(LEVEL))
    own = layer.state_dict()
    return own.keys() == tensors.keys() and all(torch.equal(own[key], tensors[key]) for key in tensors), True


def _torchao(layer: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[bool, bool]:
    """Returns whether a layer with a weight of torchao has these integers and scales, and that its output can be
    compared. A static layer has deq / input scale for the scale of its weight, up to a rounding of float32."""
    weight: Any = layer.weight
    if tensors["weight"].dtype == torch.float8_e4m3fn:
        assert type(weight).__name__ == "Float8Tensor"
        bits = (codes.view(torch.uint8) for codes in (weight.qdata, tensors["weight"]))
        return torch.equal(*bits) and torch.equal(weight.scale.flatten(), tensors["weight_scale"]), True
    assert type(weight).__name__ == "Int8Tensor"
    scale, same = tensors["weight_scale"], not weight.zero_point.any()
    if "input_scale" in tensors:
        scale = tensors["deq"] / tensors["input_scale"]
        same &= weight.act_quant_scale.item() == tensors["input_scale"].item()
        same &= weight.act_quant_zero_point.item() == tensors["input_zero_point"].item()
    same &= torch.allclose(weight.scale.flatten(), scale.flatten(), rtol=2.0**-22, atol=0.0)
    return bool(same) and torch.equal(weight.qdata, tensors["weight"]), True


def _torchao_output(layer: Mapping[str, Any]) -> Tensor:
    """Returns the output of a layer as torchao 0.18 computes it with Octavo's numbers. torchao multiplies by the
    reciprocal of the scale of the input, which for a token is max / 127.5, and adds the bias in float."""
    tensors, x = layer["tensors"], layer["x"]
    if "FP8" in layer["scheme"]:
        return _torchao_fp8_output(layer)
    weight, bias = tensors["weight"].double(), 0 if layer["bias"] is None else layer["bias"].double()
    if layer["scheme"] == "W8A16":
        return (x.double() @ weight.t() * tensors["weight_scale"] + bias).float()
    if layer["scheme"] == "W8A8":
        scale, zero, deq = tensors["input_scale"], tensors["input_zero_point"], tensors["deq"]
    else:
        scale, zero = x.abs().amax(-1, keepdim=True) / 127.5, 0
        deq = scale.double() * tensors["weight_scale"]
    codes = (torch.round(x * (1.0 / scale)) + zero).clamp(-128, 127)
    return ((codes - zero).double() @ weight.t() * deq + bias).float()


def _torchao_fp8_output(layer: Mapping[str, Any]) -> Tensor:
    """Returns the output of an FP8 layer as torchao 0.18 computes it with Octavo's numbers. torchao computes the scale
    of a token in the dtype of the input."""
    tensors, x = layer["tensors"], layer["x"]
    weight, bias = tensors["weight"].double(), 0 if layer["bias"] is None else layer["bias"].float()
    if layer["scheme"] == "W8A16_FP8":
        values = (weight.float() * tensors["weight_scale"][:, None]).to(x.dtype)
        return (x @ values.t() + bias).to(x.dtype)
    scale = (x.abs().amax(-1, keepdim=True) / 448.0).float()
    codes = (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)
    return ((codes.double() @ weight.t()).float() * (scale * tensors["weight_scale"]) + bias).to(x.dtype)


def _sdnq(layer: nn.Module, tensors: Mapping[str, Tensor]) -> tuple[bool, bool]:
    """Returns whether a layer of sdnq has these integers and scales, and whether it multiplies integers."""
    assert type(layer).__name__ == "SDNQLinear"
    own: Any = layer
    across = own.sdnq_dequantizer.use_quantized_matmul
    weight = own.weight.t() if across else own.weight
    return torch.equal(weight, tensors["weight"]) and torch.equal(own.scale.flatten(), tensors["weight_scale"]), across


_LAYERS: dict[str, Callable[[nn.Module, Mapping[str, Tensor]], tuple[bool, bool]]] = {
    "diffusers": _octavo, "torchao": _torchao, "sdnq": _sdnq,
}  # fmt: skip


@torch.no_grad()  # torchao's weights do not work in inference mode
def compute(job: Job) -> dict[str, Any]:
    """Loads a directory with diffusers, and compares its layers with those that were written."""
    import diffusers

    if job.runtime == "diffusers":
        import_module("octavo")
    reference = torch.load(Path(job.out).parent / REFERENCE)
    model, info = getattr(diffusers, job.kind).from_pretrained(
        job.out, torch_dtype=getattr(torch, job.dtype), output_loading_info=True
    )
    assert job.runtime == "diffusers" or "octavo" not in sys.modules
    equal, compared, least, apart = True, 0, float("inf"), float("inf")
    for name, layer in reference.items():
        theirs = model.get_submodule(name)
        same, comparable = _LAYERS[job.runtime](theirs, layer["tensors"])
        equal &= same
        if comparable or layer["scheme"] == "W8A16":  # sdnq keeps the inputs of small W8A8_DYNAMIC layers float
            y = theirs(layer["x"])
            zeros = theirs(torch.zeros_like(layer["x"]))  # finite, although no scale follows from zeros
            equal &= bool(zeros.isfinite().all())
            exact = _torchao_output(layer) if job.runtime == "torchao" else layer["y"]
            compared, least = compared + 1, min(least, decibels(exact, y))
            apart = min(apart, decibels(layer["y"], y))
    unmatched = sum(len(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    facts = {"layers": len(reference), "equal": equal, "unmatched": unmatched, "compared": compared}
    return facts | {"least": least, "apart": apart}


if __name__ == "__main__":
    answer(sys.argv[1], compute)

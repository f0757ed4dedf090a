"""Shows that vLLM-Omni's own code loads directories in format `modelopt`, and computes what Octavo computes.

    python -m bench.consumers vllm-omni-fp8

The program does what bench/consumer_vllm_omni.py does, with FP8 layers, static and with rows. vLLM-Omni has FP8 kernels
for GPUs only. Each FP8 layer computes with vLLM's own kernels that call torch._scaled_mm, which also runs on a CPU.

A static layer that vLLM-Omni joins from layers with different weight scales has its codes rounded again to the largest
of these scales. The program checks that these codes are those of vLLM's formula, and says how much of Octavo's output
is left.
"""

import re
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.calibrate.formats.modelopt.models import VLLM_OMNI as NATIVE
from octavo.calibrate.formats.native import NativeModel

from .consumer_jobs import REFERENCE, Job, Proof, agreement, answer, decibels
from .consumer_modelopt_sglang import tensors_of
from .consumer_packages import VLLM_OMNI
from .consumer_vllm_omni import MODULES, configured, loaded, place, prepare

LEAST, LEAST_JOINED = 45.0, 25.0  # dB; the second for layers whose codes are rounded again
_FP8, _LARGEST = torch.float8_e4m3fn, 448.0


def judge(job: Job, facts: Mapping[str, Any]) -> tuple[bool, str]:
    """Returns whether the facts of a directory are as they should be, and the facts in words."""
    fact = f"{facts['layers']} FP8 layers, {agreement(facts['least'])}"
    if facts["joined"] < float("inf"):
        fact += f", of joined layers, whose codes are rounded again, to {facts['joined']:.0f} dB"
    for key, words in (("different", "other numbers"), ("unloaded", "not loaded")):
        if facts[key]:
            fact += f", {words} for {len(facts[key])}, such as {facts[key][0]}"
    sound = not facts["different"] and not facts["unloaded"]
    return bool(facts["layers"]) and sound and facts["least"] > LEAST and facts["joined"] > LEAST_JOINED, fact


PROOF = Proof(
    "bench.consumer_modelopt_vllm_omni", "vllm-omni", VLLM_OMNI, tuple(MODULES),
    {"W8A8_FP8": torch.bfloat16, "W8A8_FP8_DYNAMIC": torch.bfloat16}, "computed", judge,
    {"VLLM_TARGET_DEVICE": "empty"}, format="modelopt",
)  # fmt: skip


def stand_in_kernels() -> None:
    """Lets vLLM take its kernels that call torch._scaled_mm on this CPU, and makes FP8 codes by the formula of its
    operator."""
    kernels = import_module("vllm.model_executor.kernels.linear.scaled_mm.pytorch")
    linear = import_module("vllm.model_executor.kernels.linear")
    kinds = (kernels.PerTensorTorchFP8ScaledMMLinearKernel, kernels.ChannelWiseTorchFP8ScaledMMLinearKernel)
    for kind in kinds:
        kind.is_supported = classmethod(lambda *_: (True, None))

    def kernel(module_name: str | None = None, **fields: Any) -> Any:
        config = linear.FP8ScaledMMLinearLayerConfig(**fields)
        kind = next(kind for kind in kinds if kind.can_implement(config)[0])
        return kind(config, layer_param_names=["weight", "weight_scale", "input_scale", "input_scale_ub"])

    import_module("vllm.model_executor.layers.quantization.modelopt").init_fp8_linear_kernel = kernel
    import_module("vllm._custom_ops").scaled_fp8_quant = lambda x, scale, **_: (_rounded(x, scale), scale)


def _rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * (1.0 / scale)).clamp(-_LARGEST, _LARGEST).to(_FP8)


@torch.inference_mode()
def compute(job: Job) -> dict[str, Any]:
    """Loads a directory with vLLM-Omni, and compares its tensors and layers with those that were written."""
    out = Path(job.out)
    with configured():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model, names = loaded(out, *MODULES[job.family], "modelopt")
        finally:
            torch.set_default_dtype(torch.float32)
        unloaded = [name for name, _ in model.named_parameters() if name not in names]
        return _compared(job, model, torch.load(out.parent / REFERENCE), tensors_of(out)) | {"unloaded": unloaded}


def _compared(job: Job, model: Any, reference: dict[str, Any], stored: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compares the FP8 layers of vLLM-Omni's model with those that were written: which they are, their numbers, their
    outputs."""
    native = NATIVE[job.kind]
    linears = [key.removesuffix(".weight") for key in stored if key.endswith(".weight")]
    codes = {name for name in reference if stored[f"{name}.weight"].dtype == _FP8}
    groups = {own: group for own, group in native.joined(linears).items() if codes.issuperset(group)}
    modules = {
        getattr(module, "prefix", name): module
        for name, module in model.named_modules()
        if type(getattr(module, "quant_method", None)).__name__ == "ModelOptLinearMethod"
    }
    different, least, joined = sorted(set(modules) ^ set(groups)), float("inf"), float("inf")
    for own in set(modules) & set(groups):
        members = sorted(groups[own], key=place)
        expected = _expected([stored[f"{name}.weight"] for name in members], _scales(members, stored))
        module, again = modules[own], expected[2]
        input_scale = stored.get(f"{members[0]}.input_scale")
        module.quant_method.process_weights_after_loading(module)
        equal = torch.equal(module.weight.t().float(), expected[0].float())
        equal &= torch.equal(module.weight_scale.flatten(), expected[1].flatten())
        equal &= input_scale is None or torch.equal(module.input_scale.view(1), input_scale)
        if not equal:
            different.append(own)
        y = module.quant_method.apply(module, reference[members[0]]["x"], module.bias)
        close = decibels(torch.cat([reference[name]["y"] for name in members], 1), y)
        least, joined = (least, min(joined, close)) if again else (min(least, close), joined)
    different += _dequantized(model, native, codes - {name for group in groups.values() for name in group}, stored)
    return {"layers": len(modules), "different": different, "least": least, "joined": joined}


def _dequantized(model: Any, native: NativeModel, names: set[str], stored: Mapping[str, Tensor]) -> list[str]:
    """Returns those of `names`, layers that are FP8 in the files and float in vLLM-Omni, whose weights are not codes
    times scale, as vLLM-Omni multiplies them in bfloat16. A layer that vLLM-Omni joins is compared as a whole."""
    joined: dict[str, list[str]] = {}
    for name in sorted(names, key=place):
        own = re.sub(r"\.add_[qkv]_proj$", ".add_kv_proj", native.name(name))
        joined.setdefault(own, []).append(name)
    parameters, different = dict(model.named_parameters()), []
    for own, members in joined.items():
        parts = [stored[f"{name}.weight"].bfloat16() * stored[f"{name}.weight_scale"].bfloat16() for name in members]
        weight = parameters.get(f"{own}.weight", parameters.get(f"{own.removesuffix('.0')}.weight"))
        if weight is None or not torch.equal(weight, torch.cat(parts)):
            different.append(own)
    return different


def _scales(members: list[str], stored: Mapping[str, Tensor]) -> list[Tensor]:
    return [stored[f"{name}.weight_scale"] for name in members]


def _expected(weights: list[Tensor], scales: list[Tensor]) -> tuple[Tensor, Tensor, bool]:
    """Returns the codes and the scales of a layer that vLLM joins from layers with these `weights` and `scales`, and
    whether the codes are rounded again: if each has one scale, and these differ."""
    if len(scales[0]) > 1:
        return torch.cat(weights), torch.cat(scales), False
    largest = torch.cat(scales).max()
    if all(bool(scale == largest) for scale in scales):
        return torch.cat(weights), largest, False
    again = [_rounded(weight.float() * scale, largest) for weight, scale in zip(weights, scales, strict=True)]
    return torch.cat(again), largest, True


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).parent)
    stand_in_kernels()
    answer(sys.argv[1], compute)

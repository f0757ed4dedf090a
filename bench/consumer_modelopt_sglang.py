"""Shows that SGLang-diffusion's own code loads directories in format `modelopt`, and computes what Octavo computes.

    python -m bench.consumers sglang-fp8

The program does what bench/consumer_sglang.py does, with static FP8 layers. Each FP8 layer also computes, as it does on
a GPU with CUTLASS: SGLang's preparation of the weights and its layer run unchanged. Only two kernels are replaced: the
one that makes codes of an input by its formula, and the one that multiplies codes by torch._scaled_mm.
"""

import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from octavo.calibrate.formats.modelopt.models import SGLANG as NATIVE
from octavo.calibrate.formats.modelopt.models import vllm_scale_owner

from .consumer_jobs import REFERENCE, Job, Proof, agreement, answer, decibels
from .consumer_packages import SGLANG
from .consumer_sglang import MODULES, loaded, prepare

LEAST = 45.0  # dB; SGLang multiplies inputs by a reciprocal, and both round outputs to bfloat16
_FP8, _LARGEST = torch.float8_e4m3fn, 448.0
_MEMBERS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")  # in their order in a joined layer


def judge(job: Job, facts: Mapping[str, Any]) -> tuple[bool, str]:
    """Returns whether the facts of a directory are as they should be, and the facts in words."""
    fact = f"{facts['layers']} FP8 layers, {agreement(facts['least'])}"
    for key, words in (("different", "other numbers"), ("unloaded", "not loaded"), ("left", "left over")):
        if facts[key]:
            fact += f", {words} for {len(facts[key])} tensors, such as {facts[key][0]}"
    faults = any(facts[key] for key in ("different", "unloaded", "left"))
    return bool(facts["layers"]) and not faults and facts["least"] > LEAST, fact


PROOF = Proof(
    "bench.consumer_modelopt_sglang", "sglang", SGLANG, tuple(MODULES), {"W8A8_FP8": torch.bfloat16}, "computed", judge,
    format="modelopt",
)  # fmt: skip


@torch.inference_mode()
def compute(job: Job) -> dict[str, Any]:
    """Loads a directory with SGLang, and compares its tensors and layers with those that were written."""
    out = Path(job.out)
    model: Any = loaded(out, *MODULES[job.family], "ModelOptFp8Config")
    reference, stored = torch.load(out.parent / REFERENCE), tensors_of(out)
    linears = [key.removesuffix(".weight") for key in stored if key.endswith(".weight")]
    codes = {name for name in reference if stored[f"{name}.weight"].dtype == _FP8}
    groups = {own: group for own, group in NATIVE[job.kind].joined(linears).items() if codes.issuperset(group)}
    modules = {_own(name): module for name, module in model.named_modules() if _is_fp8(module)}
    different, least = sorted(set(modules) ^ set(groups)), float("inf")
    for own in set(modules) & set(groups):
        members = sorted(groups[own], key=_place)
        if not _equal(modules[own], members, stored):
            different.append(own)
        least = min(least, _agreement(modules[own], [reference[member] for member in members]))
    facts = {"layers": len(modules), "least": least}
    taken = {name for group in groups.values() for name in group}
    taken |= {vllm_scale_owner(job.kind, name) for name in taken}  # scales for vLLM-Omni, which SGLang skips
    rest = {key: tensor for key, tensor in stored.items() if key.rpartition(".")[0] not in taken}
    others, unloaded, left = _others(model, rest, set(modules))
    return facts | {"different": different + others, "unloaded": unloaded, "left": left}


def tensors_of(out: Path) -> dict[str, Tensor]:
    """Returns the tensors in the weight files of `out`."""
    from safetensors.torch import load_file

    return {key: tensor for path in sorted(out.glob("*.safetensors")) for key, tensor in load_file(path).items()}


def _is_fp8(module: torch.nn.Module) -> bool:
    return type(getattr(module, "quant_method", None)).__name__ == "ModelOptFp8LinearMethod"


def _own(name: str) -> str:
    """Returns the name by which SGLang looks up a module in `ignore`."""
    return name.removesuffix(".1") if name.endswith("_mod.1") else name


def _place(name: str) -> int:
    leaf = name.rpartition(".")[2]
    return _MEMBERS.index(leaf) if leaf in _MEMBERS else 0


def _equal(module: Any, members: list[str], stored: Mapping[str, Tensor]) -> bool:
    """Returns whether the tensors of an FP8 layer are those of its members in the files."""
    equal = True
    for leaf in ("weight", "weight_scale", "input_scale", "bias"):
        parts = [stored[f"{name}.{leaf}"] for name in members if f"{name}.{leaf}" in stored]
        own = getattr(module, leaf, None)
        if own is None or not parts:
            equal &= own is None and not parts
            continue
        expected = torch.cat(parts).expand(own.shape) if leaf.endswith("scale") else torch.cat(parts)
        equal &= own.dtype == expected.dtype and torch.equal(own.data.float(), expected.float())
    return equal


def _agreement(module: Any, layers: list[dict[str, Any]]) -> float:
    """Lets SGLang prepare and compute an FP8 layer, and returns how close its output is to that of Octavo's `layers`,
    in dB."""
    utilities = import_module("sglang.srt.layers.quantization.fp8_utils")
    utilities.static_quant_fp8, utilities.fp8_scaled_mm, utilities.triton_scaled_mm = _codes, _product, _product
    utilities.get_w8a8_channelwise_fp8_config = lambda **_: None
    import_module("sglang.srt.layers.quantization.utils").scaled_fp8_quant = _codes
    module.quant_method.cutlass_fp8_supported = True
    module.quant_method.process_weights_after_loading(module)
    y = module.quant_method.apply(module, layers[0]["x"], module.bias)
    return decibels(torch.cat([layer["y"] for layer in layers], 1), y)


def _codes(x: Tensor, scale: Tensor, repeat_scale: bool = False) -> tuple[Tensor, Tensor]:
    """The formula of SGLang's kernels for codes with a given scale."""
    codes = (x.float() * (1.0 / scale.float())).clamp(-_LARGEST, _LARGEST).to(_FP8)
    return codes, scale.expand(len(x), 1).contiguous() if repeat_scale else scale


def _product(
    x: Tensor, weight: Tensor, x_scale: Tensor, weight_scale: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """Multiplies codes (rows, in) and (in, out) with scales for rows and for outputs."""
    rows, outputs = x_scale.view(-1, 1).contiguous(), weight_scale.view(1, -1).contiguous()
    result: Tensor = torch._scaled_mm(x, weight, scale_a=rows, scale_b=outputs, bias=bias, out_dtype=out_dtype)
    return result


def _others(model: Any, stored: Mapping[str, Tensor], fp8: set[str]) -> tuple[list[str], list[str], list[str]]:
    """Compares the tensors of SGLang's other layers with those `stored` for them: the float layers, and the FP8 layers
    that SGLang holds as float. Returns the names of those that differ, of those that are not in the files, and of those
    in the files that SGLang has not."""
    sources = {own: source for own, (source, _, _) in model.reverse_param_names_mapping.items()}
    different, unloaded, left = [], [], set(stored)
    for own, tensor in model.named_parameters():
        if _own(own.rpartition(".")[0]) in fp8:
            continue
        source = sources.get(own)
        if source is None or source not in stored:
            unloaded.append(own)
            continue
        name, expected = source.rpartition(".")[0], stored[source]
        left -= {source}
        if expected.dtype == _FP8:
            left -= {f"{name}.weight_scale", f"{name}.input_scale"}
            expected = (expected.float() * stored[f"{name}.weight_scale"]).to(tensor.dtype)
        if not torch.equal(tensor, expected.to(tensor.dtype)):
            different.append(own)
    return different, unloaded, sorted(left)


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).parent)
    answer(sys.argv[1], compute)

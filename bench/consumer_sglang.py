"""Shows that SGLang-diffusion's own code loads directories in format `sglang`.

    python -m bench.consumers sglang

SGLang is not part of this project: it is installed into a folder of its own and runs in a process of its own, on the
CPU. Its search for the description and the weights, its models, its schemes and its loader run unchanged, up to the
step that prepares tensors for the NPU. For a tiny model of each family the program writes the files, with static and
with dynamic int8 inputs and in MXFP8, and SGLang loads them. The program checks that every parameter of SGLang's model
is in the files and every tensor of the files has a place, and that SGLang holds the numbers that were written. It
rounds the weight scales to bfloat16, which only dynamic int8 layers use. In MXFP8, SGLang also prepares and computes
each layer, with the operators of tests/helpers/npu_mx_standin.py, and the program compares the outputs with Octavo's.
"""

import json
import os
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .consumer_environment import stand_in
from .consumer_jobs import EQUAL, REFERENCE, Job, Proof, agreement, answer, decibels
from .consumer_packages import ABSENT_FOR_SGLANG, ASK_FIRST, SGLANG

MODULES = {
    "qwen_image": ("qwen_image", "QwenImageTransformer2DModel", "qwenimage", "QwenImageDitConfig"),
    "flux": ("flux", "FluxTransformer2DModel", "flux", "FluxConfig"),
    "flux2": ("flux_2", "Flux2Transformer2DModel", "flux", "FluxConfig"),
    "wan": ("wanvideo", "WanTransformer3DModel", "wanvideo", "WanVideoConfig"),
}
_PACKAGE = "sglang.multimodal_gen"


def judge(job: Job, facts: Mapping[str, Any]) -> tuple[bool, str]:
    """Returns whether the facts of a directory are as they should be, and the facts in words."""
    fact = f"{facts['layers']} layers" + (f", {agreement(facts['least'])}" if job.scheme == MXFP8 else "")
    for key, words in (("different", "other numbers"), ("unloaded", "not loaded"), ("left", "left over")):
        if facts[key]:
            fact += f", {words} for {len(facts[key])} tensors, such as {facts[key][0]}"
    equal = job.scheme != MXFP8 or facts["least"] > EQUAL
    return bool(facts["layers"]) and equal and not any(facts[key] for key in ("different", "unloaded", "left")), fact


MXFP8 = "W8A8_MXFP8"
SCHEMES = {"W8A8": torch.bfloat16, "W8A8_DYNAMIC": torch.bfloat16, MXFP8: torch.bfloat16}
PROOF = Proof("bench.consumer_sglang", "sglang", SGLANG, tuple(MODULES), SCHEMES, "loaded", judge)


class _Arguments:
    """Stands for the arguments of SGLang's server: one process, and no choice about anything else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return 1 if name.endswith(("_degree", "_size")) else None


def prepare(folder: Path) -> None:
    """Imports SGLang with stand-ins, and starts its process group of one process, with a file in `folder`."""
    for name in ASK_FIRST:
        import_module(name)
    stand_in(*ABSENT_FOR_SGLANG)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    (folder / "meeting").unlink(missing_ok=True)
    state = import_module(f"{_PACKAGE}.runtime.distributed.parallel_state")
    state.maybe_init_distributed_environment_and_model_parallel(
        tp_size=1, sp_size=1, distributed_init_method=f"file://{folder / 'meeting'}"
    )
    import_module(f"{_PACKAGE}.runtime.server_args.server_args").set_global_server_args(_Arguments())
    from tests.helpers import npu_mx_standin

    torch_npu = ModuleType("torch_npu")
    npu_mx_standin.put_into(torch_npu)
    import_module(f"{_PACKAGE}.runtime.layers.quantization.modelslim_mxfp8_scheme").torch_npu = torch_npu


def compute(job: Job) -> dict[str, Any]:
    """Loads a directory with SGLang, and compares its tensors with those that were written, and in MXFP8 its outputs
    with Octavo's."""
    out = Path(job.out)
    model, reference = loaded(out, *MODULES[job.family]), torch.load(out.parent / REFERENCE)
    facts = _compared(model, reference, out)
    return facts | {"least": _computed(model, reference)} if job.scheme == MXFP8 else facts


def loaded(
    out: Path, module: str, kind: str, config_module: str, config_kind: str, method: str = "ModelSlimConfig"
) -> torch.nn.Module:
    """Returns SGLang's model with the weights in `out`, for which SGLang finds the quantization `method`."""
    content = json.loads((out / "config.json").read_text())
    config = getattr(import_module(f"{_PACKAGE}.configs.models.dits.{config_module}"), config_kind)()
    config.update_model_arch({key: value for key, value in content.items() if not key.startswith("_")})
    arch = config.arch_config
    quantization = import_module(f"{_PACKAGE}.runtime.utils.quantization_utils").get_quant_config(
        content, str(out), reverse_param_names_mapping=arch.reverse_param_names_mapping
    )
    assert type(quantization).__name__ == method
    model_class = getattr(import_module(f"{_PACKAGE}.runtime.models.dits.{module}"), kind)
    if method != "ModelSlimConfig":
        quantization.packed_modules_mapping = getattr(model_class, "packed_modules_mapping", None) or {}
    loader = import_module(f"{_PACKAGE}.runtime.loader.fsdp_load")
    files = import_module(f"{_PACKAGE}.runtime.loader.utils")._list_safetensors_files(str(out))
    loader.process_model_weights_after_loading = lambda model: None  # it moves tensors to the NPU
    loader.finalize_loaded_model = lambda model: None
    model: torch.nn.Module = loader.maybe_load_fsdp_model(
        model_cls=model_class,
        init_params={"config": config, "hf_config": content, "quant_config": quantization},
        weight_dir_list=files, device=torch.device("cpu"), hsdp_replicate_dim=1, hsdp_shard_dim=1,
        param_dtype=None, reduce_dtype=torch.float32, strict=False,
    )  # fmt: skip
    return model


def _compared(model: Any, reference: dict[str, Any], out: Path) -> dict[str, Any]:
    """Compares the tensors of SGLang's model with those in the files, and its int8 layers with those that were
    written."""
    from safetensors.torch import load_file

    stored = {key: tensor for path in sorted(out.glob("*.safetensors")) for key, tensor in load_file(path).items()}
    sources = {own: source for own, (source, _, _) in model.reverse_param_names_mapping.items()}
    state = model.state_dict()
    different = []
    for own, tensor in state.items():
        source = sources.get(own)
        if source is not None and not torch.equal(tensor, stored[source].to(tensor.dtype)):
            different.append(own)
    layers = 0
    for name, layer in reference.items():
        own = next((own for own, source in sources.items() if source == f"{name}.weight"), None)
        if own is None or state[own].dtype not in (torch.int8, torch.float8_e4m3fn):
            continue
        layers += 1
        parts = {
            key.rpartition(".")[2]: state[key] for key in state if key.rpartition(".")[0] == own[: -len(".weight")]
        }
        expected = {"weight": layer["tensors"]["weight"]}
        if layer["scheme"] == "W8A8":
            expected |= {"deq_scale": layer["tensors"]["deq"], "quant_bias": layer["tensors"]["quant_bias"]}
            expected |= {"input_scale": layer["tensors"]["input_scale"].bfloat16().view(1)}
        elif layer["scheme"] == MXFP8:
            expected |= {"weight_scale": layer["tensors"]["weight_scale"]}
        else:
            expected |= {"weight_scale": layer["tensors"]["weight_scale"].bfloat16().view(-1, 1)}
        different += [f"{name}.{key}" for key, value in expected.items() if not _same(parts[key], value)]
    unloaded = sorted(name for name, _ in model.named_parameters() if name not in sources)
    left = sorted(source for own, source in sources.items() if own not in state)
    left += sorted(set(stored) - set(sources.values()))
    return {"layers": layers, "different": different, "unloaded": unloaded, "left": left}


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Returns whether two tensors have the same dtype, shape and numbers."""
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


@torch.inference_mode()
def _computed(model: Any, reference: dict[str, Any]) -> float:
    """Lets SGLang prepare and compute its MXFP8 layers; returns the least of the `decibels` of their outputs."""
    sources = {source: own for own, (source, _, _) in model.reverse_param_names_mapping.items()}
    least = float("inf")
    for name, layer in reference.items():
        module = model.get_submodule(sources[f"{name}.weight"].removesuffix(".weight"))
        if module.weight.dtype == torch.float8_e4m3fn:
            module.quant_method.process_weights_after_loading(module)
            least = min(least, decibels(layer["y"], module.quant_method.apply(module, layer["x"], module.bias)))
    return least


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).parent)
    answer(sys.argv[1], compute)

"""Shows that vLLM-Omni's own code loads directories in format `vllm-omni`, and computes what Octavo computes.

    python -m bench.consumers vllm-omni

vLLM-Omni and vLLM are not part of this project: they are installed into a folder of their own and run in a process of
their own, on the CPU, as they do on an Ascend NPU. Their configs, models, loaders and int8 layers run unchanged; only
the operators of torch_npu are those of tests/helpers/npu_standin.py and npu_mx_standin.py. For a tiny model of each
family the program writes the files; vLLM-Omni reads config.json, builds its model and loads the weights. The program
checks that every parameter is loaded, that codes and scales are those that were written, also in joined layers, and
that each int8 layer puts out what Octavo's layer does, up to bfloat16, and each MXFP8 layer exactly that.
"""

import json
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from .consumer_environment import stand_in
from .consumer_jobs import EQUAL, REFERENCE, Job, Proof, agreement, answer, decibels
from .consumer_packages import ABSENT_FOR_VLLM, ASK_FIRST, VLLM_OMNI

MODULES = {
    "qwen_image": ("qwen_image.qwen_image_transformer", "QwenImageTransformer2DModel"),
    "flux": ("flux.flux_transformer", "FluxTransformer2DModel"),
    "flux2": ("flux2.flux2_transformer", "Flux2Transformer2DModel"),
    "wan": ("wan2_2.wan2_2_transformer", "WanTransformer3DModel"),
    "z_image": ("z_image.z_image_transformer", "ZImageTransformer2DModel"),
}
INT8, MXFP8 = "W8A8_DYNAMIC", "W8A8_MXFP8"
LEAST = {INT8: 50.0, MXFP8: EQUAL}  # dB; in int8, both round the output to bfloat16


def judge(job: Job, facts: Mapping[str, Any]) -> tuple[bool, str]:
    """Returns whether the facts of a directory are as they should be, and the facts in words."""
    faults = [] if facts["equal"] else ["other numbers than those that were written"]
    faults += [f"{facts['unloaded']} parameters not loaded"] if facts["unloaded"] else []
    fact = ", ".join([f"{facts['layers']} layers", agreement(facts["least"]), *faults])
    return bool(facts["layers"]) and not faults and facts["least"] > LEAST[job.scheme], fact


PROOF = Proof(
    "bench.consumer_vllm_omni", "vllm-omni", VLLM_OMNI, tuple(MODULES), {INT8: torch.bfloat16, MXFP8: torch.bfloat16},
    "computed", judge, {"VLLM_TARGET_DEVICE": "empty"},
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Imports vLLM-Omni with stand-ins, and starts its process group of one process, with a file in `folder`."""
    for name in ASK_FIRST:
        import_module(name)
    stand_in(*ABSENT_FOR_VLLM)
    _torch_npu()
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.platforms import current_omni_platform as platform

    platform.is_npu, platform.is_cuda = lambda: True, lambda: False
    platform.get_device_count, platform.set_device = lambda: 1, lambda *_: None
    platform.get_torch_device = lambda *_: torch.device("cpu")
    backend = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"
    platform.get_diffusion_attn_backend_cls = lambda *_, **__: backend
    (folder / "meeting").unlink(missing_ok=True)
    with configured():
        parallel_state.init_distributed_environment(1, 0, f"file://{folder / 'meeting'}", 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")


def configured() -> AbstractContextManager[Any]:
    """Returns a context with a new configuration of vLLM."""
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config

    context: AbstractContextManager[Any] = set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu")))
    return context


@torch.inference_mode()
def compute(job: Job) -> dict[str, Any]:
    """Loads a directory with vLLM-Omni, and compares its layers with those that were written."""
    out = Path(job.out)
    with configured():
        torch.set_default_dtype(torch.bfloat16)
        try:
            method = "mxfp8" if job.scheme == MXFP8 else "int8"
            model, names = loaded(out, *MODULES[job.family], method)
        finally:
            torch.set_default_dtype(torch.float32)
        facts = _compared(model, torch.load(out.parent / REFERENCE), out)
    unloaded = [name for name, _ in model.named_parameters() if name not in names]
    return facts | {"unloaded": len(unloaded)}


def _torch_npu() -> None:
    """Puts a module torch_npu in place that has the operators of the stand-in."""
    from tests.helpers import npu_mx_standin, npu_standin

    module = ModuleType("torch_npu")
    module.__spec__ = ModuleSpec("torch_npu", None)
    for name, kernel in npu_standin.KERNELS.items():
        setattr(module, name, _numbered(kernel))
    npu_mx_standin.put_into(module)
    torch.Tensor.npu = lambda tensor: tensor  # type: ignore[attr-defined]
    sys.modules["torch_npu"] = module


def _numbered(kernel: Any) -> Any:
    from tests.helpers.npu_standin import NUMBERS

    def call(*arguments: Any, **options: Any) -> Any:
        changed = {key: NUMBERS[value] if isinstance(value, torch.dtype) else value for key, value in options.items()}
        return kernel(*arguments, **changed)

    return call


def loaded(out: Path, module: str, kind: str, method: str = "int8") -> tuple[torch.nn.Module, set[str]]:
    """Returns vLLM-Omni's model with the weights in `out`, for which it finds the quantization `method`, and the names
    that its loader counts as loaded."""
    from inspect import signature

    from vllm.config.load import LoadConfig
    from vllm_omni.diffusion.data import DiffusionParallelConfig, TransformerConfig
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    content = json.loads((out / "config.json").read_text())
    config = TransformerConfig.from_dict(content)
    assert config.quant_method == method
    options: Any = SimpleNamespace(
        parallel_config=DiffusionParallelConfig(), tf_model_config=config, dtype=torch.bfloat16,
        quantization_config=config.quant_config,
    )  # fmt: skip
    model_class = getattr(import_module(f"vllm_omni.diffusion.models.{module}"), kind)
    taken = signature(model_class.__init__).parameters
    arguments = {key: value for key, value in content.items() if key in taken}
    if "od_config" in taken:
        arguments["od_config"] = options
    model = model_class(quant_config=config.quant_config, **arguments)
    loader = DiffusersPipelineLoader(LoadConfig(), options)
    if method != "modelopt":
        source = DiffusersPipelineLoader.ComponentSource(str(out), None, None)
        return model, model.load_weights(loader._get_weights_iterator(source))
    (out.parent / "transformer").unlink(missing_ok=True)
    (out.parent / "transformer").symlink_to(out.name)  # the name by which vLLM-Omni knows the directory
    source = DiffusersPipelineLoader.ComponentSource(str(out.parent), "transformer", None)
    return model, model.load_weights(loader._get_weights_iterator(source, model))  # which also adapts scales


def _compared(model: torch.nn.Module, reference: dict[str, Any], out: Path) -> dict[str, Any]:
    """Compares the 8-bit layers of vLLM-Omni's model with those that were written, first the numbers, then the outputs
    of the layers."""
    from vllm.model_executor.layers.linear import LinearBase

    from octavo.calibrate.formats.vllm_omni.models import MODELS

    native = MODELS[json.loads((out / "config.json").read_text())["_class_name"]]
    groups = native.joined(name for name in reference)
    integers = native.written(set(reference), _linears(out))
    equal, count, least = True, 0, float("inf")
    modules = {getattr(module, "prefix", name): module for name, module in model.named_modules()}
    by_name = dict(model.named_modules())
    for own, unsorted in groups.items():
        members = sorted(unsorted, key=place)
        module = modules.get(own) or by_name.get(own) or by_name.get(own.removesuffix(".0"))
        assert isinstance(module, LinearBase), own
        quantized = hasattr(module, "weight_scale")
        assert quantized == (members[0] in integers), own
        if not quantized:
            continue
        layers = [reference[name]["tensors"] for name in members]
        count += 1
        equal &= torch.equal(module.weight.float(), torch.cat([layer["weight"].float() for layer in layers]))
        scales = torch.cat([layer["weight_scale"] for layer in layers])
        equal &= torch.equal(module.weight_scale.flatten(), scales.flatten())
        module.quant_method.process_weights_after_loading(module)
        y = module.quant_method.apply(module, reference[members[0]]["x"], module.bias)
        exact = torch.cat([reference[name]["y"] for name in members], 1)
        least = min(least, decibels(exact, y))
    return {"layers": count, "equal": equal, "least": least}


def place(name: str) -> int:
    """Returns the place of a projection in the joined layer, in which queries come before keys and values."""
    return "qkv".find(name.rpartition(".")[2].removeprefix("to_").removeprefix("add_")[0])


def _linears(out: Path) -> list[str]:
    """Returns the names of the layers in the weight files of `out`."""
    from safetensors import safe_open

    names: list[str] = []
    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names += [key.removesuffix(".weight") for key in file.keys() if key.endswith(".weight")]  # noqa: SIM118
    return names


if __name__ == "__main__":
    prepare(Path(sys.argv[1]).parent)
    answer(sys.argv[1], compute)

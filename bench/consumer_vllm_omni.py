"""Shows that vLLM-Omni's own code loads directories in format `vllm-omni`, and computes what Octavo computes.

    python -m bench.consumer_vllm_omni [FOLDER]

vLLM-Omni and vLLM are not part of this project: they are installed into a folder of their own and run in a process of
their own, on the CPU, as they do on an Ascend NPU. Their configs, models, loaders and int8 layers run unchanged; only
the operators of torch_npu are those of tests/helpers/npu_standin.py. For a tiny model of each family the program writes
the files; vLLM-Omni reads config.json, builds its model and loads the weights. The program checks that every parameter
is loaded, that integers and scales are those that were written, also in joined layers, and that each int8 layer puts
out what Octavo's layer does, up to bfloat16.
"""

import json
import sys
import tempfile
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

MODULES = {
    "qwen_image": ("qwen_image.qwen_image_transformer", "QwenImageTransformer2DModel"),
    "flux": ("flux.flux_transformer", "FluxTransformer2DModel"),
    "flux2": ("flux2.flux2_transformer", "Flux2Transformer2DModel"),
    "wan": ("wan2_2.wan2_2_transformer", "WanTransformer3DModel"),
    "z_image": ("z_image.z_image_transformer", "ZImageTransformer2DModel"),
}
LEAST = 50.0  # dB; both round the output to bfloat16


def prove(folder: Path) -> list[tuple[str, str, bool, str]]:
    """Returns for each family the name, how it was shown, whether vLLM-Omni agrees, and the fact in words. Files are
    written to `folder`."""
    from .consumer_environment import installed, run
    from .consumer_models import written
    from .consumer_packages import VLLM_OMNI

    packages, rows = installed("vllm-omni", VLLM_OMNI), []
    for family in MODULES:
        out = folder / "vllm-omni" / family / "out"
        written(family, "vllm-omni", "W8A8_DYNAMIC", out)
        report = run("bench.consumer_vllm_omni", packages, "--child", out, family, VLLM_TARGET_DEVICE="empty")
        facts = json.loads(report.splitlines()[-1])
        ok = facts["equal"] and not facts["unloaded"] and facts["least"] > LEAST
        fact = f"{facts['layers']} int8 layers with the integers and scales that were written, "
        fact += f"{facts['unloaded']} parameters not loaded, outputs of layers agree to {facts['least']:.0f} dB"
        rows.append((family, "computed", bool(ok), fact))
    return rows


def child(out: Path, family: str) -> None:
    """Loads the directory `out` with vLLM-Omni, and prints what was found as JSON."""
    from .consumer_environment import stand_in
    from .consumer_models import REFERENCE
    from .consumer_packages import ABSENT_FOR_VLLM, ASK_FIRST

    for name in ASK_FIRST:
        import_module(name)
    stand_in(*ABSENT_FOR_VLLM)
    _torch_npu()
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.platforms import current_omni_platform as platform

    platform.is_npu, platform.is_cuda = lambda: True, lambda: False
    platform.get_device_count, platform.set_device = lambda: 1, lambda *_: None
    platform.get_torch_device = lambda *_: torch.device("cpu")
    backend = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"
    platform.get_diffusion_attn_backend_cls = lambda *_, **__: backend
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))), torch.inference_mode():
        method = f"file://{out.parent / 'meeting'}"
        parallel_state.init_distributed_environment(1, 0, method, 0, "gloo")
        parallel_state.initialize_model_parallel(backend="gloo")
        torch.set_default_dtype(torch.bfloat16)
        model, loaded = _loaded(out, *MODULES[family])
        torch.set_default_dtype(torch.float32)
        facts = _compared(model, torch.load(out.parent / REFERENCE), out)
        unloaded = [name for name, _ in model.named_parameters() if name not in loaded]
        print(json.dumps(facts | {"unloaded": len(unloaded)}), flush=True)


def _torch_npu() -> None:
    """Puts a module torch_npu in place that has the operators of the stand-in."""
    from tests.helpers import npu_standin

    module = ModuleType("torch_npu")
    module.__spec__ = ModuleSpec("torch_npu", None)
    for name, kernel in npu_standin.KERNELS.items():
        setattr(module, name, _numbered(kernel))
    sys.modules["torch_npu"] = module


def _numbered(kernel: Any) -> Any:
    from tests.helpers.npu_standin import NUMBERS

    def call(*arguments: Any, **options: Any) -> Any:
        changed = {key: NUMBERS[value] if isinstance(value, torch.dtype) else value for key, value in options.items()}
        return kernel(*arguments, **changed)

    return call


def _loaded(out: Path, module: str, kind: str) -> tuple[torch.nn.Module, set[str]]:
    """Returns vLLM-Omni's model with the weights in `out`, and the names that its loader counts as loaded."""
    from inspect import signature

    from vllm.config.load import LoadConfig
    from vllm_omni.diffusion.data import DiffusionParallelConfig, TransformerConfig
    from vllm_omni.diffusion.model_loader.diffusers_loader import DiffusersPipelineLoader

    content = json.loads((out / "config.json").read_text())
    config = TransformerConfig.from_dict(content)
    assert config.quant_method == "int8"
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
    source = DiffusersPipelineLoader.ComponentSource(str(out), None, None)
    return model, model.load_weights(loader._get_weights_iterator(source))


def _compared(model: torch.nn.Module, reference: dict[str, Any], out: Path) -> dict[str, Any]:
    """Compares the int8 layers of vLLM-Omni's model with those that were written, first the numbers, then the outputs
    of the layers."""
    from vllm.model_executor.layers.linear import LinearBase

    from octavo.calibrate.formats.vllm_omni.models import MODELS

    native = MODELS[json.loads((out / "config.json").read_text())["_class_name"]]
    groups = native.joined(name for name in reference)
    integers = native.written(set(reference), _linears(out))
    equal, count, least = True, 0, 400.0
    modules = {getattr(module, "prefix", name): module for name, module in model.named_modules()}
    by_name = dict(model.named_modules())
    for own, unsorted in groups.items():
        members = sorted(unsorted, key=_place)
        module = modules.get(own) or by_name.get(own) or by_name.get(own.removesuffix(".0"))
        assert isinstance(module, LinearBase), own
        is_int8 = module.weight.dtype == torch.int8
        assert is_int8 == (members[0] in integers), own
        if not is_int8:
            continue
        layers = [reference[name]["tensors"] for name in members]
        count += 1
        equal &= torch.equal(module.weight, torch.cat([layer["weight"] for layer in layers]))
        equal &= torch.equal(module.weight_scale.flatten(), torch.cat([layer["weight_scale"] for layer in layers]))
        module.quant_method.process_weights_after_loading(module)
        y = module.quant_method.apply(module, reference[members[0]]["x"], module.bias)
        exact = torch.cat([reference[name]["y"] for name in members], 1)
        error = (exact.double() - y.double()).square().sum().clamp_min(1e-30)
        least = min(least, float(10 * torch.log10(exact.double().square().sum() / error)))
    return {"layers": count, "equal": equal, "least": least}


def _place(name: str) -> int:
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


def main() -> None:
    """Runs the proof and prints a line for each family, or loads one directory in the child process."""
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), sys.argv[3])
        return
    with tempfile.TemporaryDirectory() as temporary:
        for family, how, ok, fact in prove(Path(sys.argv[1] if sys.argv[1:] else temporary)):
            print(f"{family:<12} {how:<9} {'yes' if ok else 'NO':<4} {fact}", flush=True)


if __name__ == "__main__":
    main()

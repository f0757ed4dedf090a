"""Runs ComfyUI's own loading code on one 8-bit file, and computes its layers and the whole model on the CPU.

    python -m bench.comfy_child COMFYUI JOB

is called by `bench.consumer_comfy`, in an environment that has ComfyUI's packages. COMFYUI is a directory with the
sources of ComfyUI. JOB is a JSON file: the path `file` of the 8-bit file, `overrides` of the sizes that ComfyUI finds
in a file, `inputs` (a safetensors file with the arguments of the model) and `out`, the safetensors file to write.
ComfyUI assumes sizes such as the number of heads from the published models; `overrides` gives those of a tiny model.
`emulated` are the formats that ComfyUI computes with dequantized weights; without it, ComfyUI chooses them, on a CPU
all but int8.
"""

import ast
import importlib
import json
import logging
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

# the class of each of ComfyUI's models, by the name that its detection gives the model
CLASSES = {
    "mmdit": ("modules.diffusionmodules.mmdit", "OpenAISignatureMMDITWrapper"),
    "flux": ("flux.model", "Flux"),
    "qwen_image": ("qwen_image.model", "QwenImageTransformer2DModel"),
    "ltxv": ("lightricks.model", "LTXVModel"),
    "wan2.1": ("wan.model", "WanModel"),
    "lumina2": ("lumina.model", "NextDiT"),
    "flux2": ("flux.model", "Flux"),
    "krea2": ("krea2.model", "SingleStreamDiT"),
    "chroma": ("chroma.model", "Chroma"),
    "auraflow": ("aura.mmdit", "MMDiT"),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def input_for(name: str, width: int, dtype: torch.dtype) -> Tensor:
    """Returns random rows of `width` channels for the layer `name`, one channel forty times as large as the others."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    x = torch.randn(2, 7, width, generator=generator)
    x[..., 1] *= 40
    return x.to(dtype)


class _Notes(logging.Handler):
    """Keeps the messages of ComfyUI about tensors that are missing or not expected."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if any(word in text for word in ("missing", "unexpected", "left over", "Missing", "Unknown")):
            self.notes.append(text)


def _all_models() -> list[Any]:
    """Returns the models that ComfyUI knows: the longest list called `models` in its source. A fork of ComfyUI may set
    a shorter list behind it."""
    import comfy.supported_models as supported

    statements = ast.parse(Path(str(supported.__file__)).read_text()).body
    lists = [
        [element.id for element in statement.value.elts if isinstance(element, ast.Name)]
        for statement in statements
        if isinstance(statement, ast.Assign)
        and isinstance(statement.value, ast.List)
        and any(isinstance(target, ast.Name) and target.id == "models" for target in statement.targets)
    ]
    return [getattr(supported, name) for name in max(lists, key=len)]


def _loaded(
    file: str, overrides: dict[str, Any], emulated: list[str] | None, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """Loads the file as ComfyUI does: it reads the file and its markers, finds the model and its sizes, makes the
    model with layers for mixed precision, and loads the tensors. Returns the model. The class that ComfyUI's
    model_base makes is imported by name here, so that a fork without model_base's imports can be used too."""
    import comfy.model_detection
    import comfy.ops
    import comfy.supported_models
    import comfy.utils

    comfy.supported_models.models = _all_models()
    tensors, metadata = comfy.utils.load_torch_file(file, return_metadata=True)
    tensors, metadata = comfy.utils.convert_old_quants(tensors, "", metadata=metadata)
    config = comfy.model_detection.model_config_from_unet(tensors, "", metadata=metadata)
    sizes = config.unet_config | overrides
    module, name = CLASSES[sizes.get("image_model", "auraflow" if "n_double_layers" in sizes else "mmdit")]
    operations = comfy.ops.pick_operations(None, torch.float32, load_device=torch.device("cpu"), model_config=config)
    if emulated is not None:
        operations = comfy.ops.mixed_precision_ops(config.quant_config, dtype, disabled=set(emulated))
    make = getattr(importlib.import_module(f"comfy.ldm.{module}"), name)
    model: nn.Module = make(**sizes, device="cpu", operations=operations, dtype=dtype)
    missing, unexpected = model.load_state_dict(config.process_unet_state_dict(tensors), strict=False)
    for word, names in (("missing", missing), ("unexpected", unexpected)):
        if names:
            logging.warning(f"{word}: {', '.join(names)}")
    return model.eval().requires_grad_(False)


def _layers(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Returns the codes, the scales, the group of the rotation (0: none) and the outputs of each 8-bit layer. For FP8
    and MXFP8, also the codes and scales of its inputs, and for MXFP8 the dequantized weight. `models` has for each word
    of DTYPES the model that computes in this dtype."""
    results: dict[str, Tensor] = {}
    for name, module in models["float32"].named_modules():
        params = getattr(getattr(module, "weight", None), "_params", None)
        if params is None:
            continue
        results[f"{name}|weight"] = module.weight._qdata
        results[f"{name}|weight_scale"] = _bytes(params.scale)
        results[f"{name}|group"] = torch.tensor(params.convrot_groupsize if getattr(params, "convrot", False) else 0)
        fp8 = module.weight._qdata.dtype == torch.float8_e4m3fn
        if fp8 and params.scale.ndim:
            results[f"{name}|values"] = module.weight.dequantize()
        for word, dtype in DTYPES.items():
            x = input_for(name, module.in_features, dtype)
            results[f"{name}|{word}"] = models[word].get_submodule(name)(x)
            if fp8:
                codes = type(module.weight).from_float(
                    x.flatten(0, 1), module.layout_type, scale=getattr(module, "input_scale", None)
                )
                results[f"{name}|{word}|codes"] = codes._qdata
                results[f"{name}|{word}|scale"] = _bytes(codes._params.scale)
    return results


def _bytes(scale: Tensor) -> Tensor:
    """Returns a scale that is an exponent as uint8, which safetensors can store; other scales as they are."""
    return scale.view(torch.uint8) if scale.dtype == torch.float8_e8m0fnu else scale


def _maps(wanted: dict[str, list[Any]]) -> dict[str, dict[str, list[Any]]]:
    """Returns for each name in `wanted` ComfyUI's map of names, which the named function of comfy.utils makes from its
    argument: a dict from a name in diffusers to the native name, the first row in it or None, and whether the halves
    are exchanged."""
    import comfy.utils

    def place(entry: Any) -> list[Any]:
        if isinstance(entry, str):
            return [entry, None, False]
        return [entry[0], None if entry[1] is None else entry[1][1], len(entry) > 2]

    made = {name: getattr(comfy.utils, function)(sizes) for name, (function, sizes) in wanted.items()}
    return {name: {key: place(entry) for key, entry in names.items()} for name, names in made.items()}


def main(comfyui: str, job_file: str) -> None:
    """Does the job in the file `job_file` with the sources of ComfyUI in the directory `comfyui`."""
    job = json.loads(Path(job_file).read_text())
    sys.path.insert(0, comfyui)
    sys.argv = ["main.py", "--cpu"]
    import comfy.options

    comfy.options.enable_args_parsing()
    if "maps" in job:
        Path(job["out"]).write_text(json.dumps(_maps(job["maps"])))
        return
    notes = _Notes()
    logging.getLogger().addHandler(notes)
    with torch.no_grad():
        emulated = job.get("emulated")
        model = _loaded(job["file"], job["overrides"], emulated)
        models = dict.fromkeys(DTYPES, model)
        if emulated is not None:  # a product in FP8 needs a bias in the dtype of the input
            models["bfloat16"] = _loaded(job["file"], job["overrides"], emulated, torch.bfloat16)
        results = _layers(models)
        arguments = load_file(job["inputs"])
        if arguments:
            results["output"] = model(**arguments, **job["options"])
    results = {name: tensor.detach().clone().contiguous() for name, tensor in results.items()}
    save_file(results, job["out"], {"notes": json.dumps(notes.notes)})


if __name__ == "__main__":
    main(*sys.argv[1:])

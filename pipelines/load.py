"""Loads a diffusers pipeline from a directory, and refuses files from which diffusers would load a wrong model."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers.pipelines
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from safetensors import safe_open
from torch import nn
from transformers.utils import logging as transformers_logging

from octavo.capture.devices import DTYPES
from octavo.capture.errors import FileError, MisfitError, NumbersError, OctavoError, UsageError, first_sentence

from .denoisers import denoisers
from .family import Family
from .files import DEMO as DEMO
from .files import DEMO_INT8 as DEMO_INT8
from .files import model_directory as model_directory
from .files import read_config, read_json
from .inspection import Component, components_in, family_at, inspect_model
from .loras import Lora, fuse_loras
from .weights import stored_dtype, weights_of

log = logging.getLogger(__name__)


@contextmanager
def quiet() -> Iterator[None]:
    """Inside the `with` block, hides the progress bars and warnings of diffusers and transformers; errors are shown."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()
            diffusers_logging.enable_progress_bar()


def default_dtype(folders: list[Path], device: torch.device) -> torch.dtype:
    """Returns the dtype to load a model in: float32 on a CPU, on any other device the dtype of the stored weights.

    `folders` are the folders of the model's components. The first folder with float weights decides; if none has any,
    the dtype is float32.
    """
    stored = next((d for folder in folders if (d := stored_dtype(folder))), "float32")
    return torch.float32 if device.type == "cpu" else DTYPES[stored]


def load_pipeline(
    directory: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    family: Family | None = None,
    text_encoder: Path | None = None,
    offload: bool = False,
    strict: bool = False,
    trust_remote_code: bool = False,
    given: Mapping[str, nn.Module] | None = None,
    loras: Sequence[Lora] = (),
) -> Any:
    """Loads the pipeline in `directory`, in eval mode; downloads nothing, opens no pickle.

    By default `device` is the CPU, `dtype` float32 on a CPU, else the stored dtype, and `family` the family that the
    files name. If the family has a loader of its own, a folder with only the denoiser is enough; that loader takes
    `text_encoder`, the folder of the text encoder. `trust_remote_code` lets code in `directory` run. `offload` keeps a
    component on `device` only while it runs. Modules in `given` replace components of the same names. `loras` are added
    to the weights. Raises UsageError for a missing directory or unknown component; FileError for a missing pipeline,
    damaged files, pickle weights, or code without `trust_remote_code`; MisfitError for missing or misshapen weights,
    with `strict` also for surplus weights; NumbersError for NaN or infinity.
    """
    device, family = device or torch.device("cpu"), family or family_at(directory)
    if family.load is not None:
        if (directory / "model_index.json").is_file():
            inspect_model(directory, trust_remote_code)
        stored = [directory, directory / "transformer"]
        pipe = family.load(directory, dtype or default_dtype(stored, device), text_encoder)
        pipe.register_modules(**(given or {}))
    else:
        pipe = _load_diffusers(directory, dtype, device, strict, trust_remote_code, given or {})
    pipe.set_progress_bar_config(disable=True)
    fuse_loras(pipe, loras)
    for name, module in denoisers(pipe).items():
        check_finite(module, name)
    if not offload or device.type == "cpu":
        return pipe.to(device, silence_dtype_warnings=True)  # of float16 on a CPU, which torch computes
    pipe.enable_model_cpu_offload(device=device)
    return pipe


def mapped_denoiser(
    directory: Path,
    component: str,
    family: Family,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Loads only the denoiser `component` of the pipeline in `directory`. The weights are memory-mapped: a weight is
    read from its file when it is used. If `family` has a loader of its own, that loader loads the denoiser, in the
    stored dtype. With `trust_remote_code`, code in the directory may run.

    Weights in the dtype of the first stored float weight are mapped and keep this dtype, whatever `dtype` is. Weights
    in another dtype are read into memory and cast to `dtype`, or to the dtype of the first weight if `dtype` is None.

    Raises UsageError for a missing directory or a component without a folder, FileError for damaged files, pickle
    weights, or custom code unless `trust_remote_code`, MisfitError for missing or misshapen weights.
    """
    if family.load is not None:
        return denoisers(family.load(directory, None, None), (component,))[component]
    parts = components_in(directory, inspect_model(directory, trust_remote_code))
    model_class = _model_class(parts[component]) if component in parts else None
    if model_class is None or _holds_several(model_class):
        fact = f"{component} is not a diffusers model with a folder of its own"
        raise UsageError(f"{directory}: {fact}. Calibrate without --memory.")
    stored = DTYPES[stored_dtype(directory / component) or "float32"]
    common: dict[str, Any] = {"torch_dtype": stored, "local_files_only": True, "use_safetensors": True}
    with quiet():
        module = load_component(directory / component, model_class, common, strict=False)
    if dtype not in (None, stored):
        _read_others(module, directory / component, stored, dtype)
    return module


def _read_others(module: nn.Module, folder: Path, stored: torch.dtype, dtype: torch.dtype | None) -> None:
    """Corrects the tensors of `module` whose files in `folder` have another dtype than `stored`. Loading has cast these
    tensors to `stored`; they are read again and cast to `dtype`."""
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for file in weights_of(folder).files:
        with safe_open(file, "pt") as weights:
            for key in weights.keys():  # noqa: SIM118
                if key in tensors and tensors[key].dtype == stored != (read := weights.get_tensor(key)).dtype:
                    tensors[key].data = read.to(dtype)


def _load_diffusers(
    directory: Path,
    dtype: torch.dtype | None,
    device: torch.device,
    strict: bool,
    trust_remote_code: bool,
    given: Mapping[str, nn.Module],
) -> Any:
    index = inspect_model(directory, trust_remote_code)
    components = components_in(directory, index)
    if unknown := sorted(set(given) - set(components)):
        raise UsageError(f"{directory}: has no component {unknown[0]}. Choose one with --component.")
    ours = [directory / name for name in sorted(components, reverse=True) if components[name].library == "diffusers"]
    dtype = dtype or default_dtype(ours, device)
    common: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
    with quiet():  # importing a pipeline's module notes each class that would like torchvision
        # the pipeline's own class: DiffusionPipeline ignores given modules for optional components
        own = getattr(diffusers, str(index.get("_class_name")), DiffusionPipeline)
        # diffusers demands that a component saved as absent be passed as None
        parts: dict[str, Any] = {name: None for name, component in components.items() if component.kind is None}
        parts |= given
        for name, component in components.items():
            if name not in given and (model_class := _model_class(component)) is not None:
                parts[name] = _load_class(component.folders, model_class, common, strict)
        try:
            pipe = own.from_pretrained(directory, trust_remote_code=trust_remote_code, **common, **parts)
        except (OctavoError, MemoryError):
            raise
        except Exception as error:  # the libraries check few values: a wrong one raises an error of any type anywhere
            raise FileError(f"{directory}: {one_line(error)}. Check the directory.") from error
        _check_tokenizers(pipe, directory)
    pipe.register_modules(**given)
    return pipe


def _check_tokenizers(pipe: Any, directory: Path) -> None:
    """Raises FileError for a tokenizer of `pipe` that cannot encode a text; the message names `directory`."""
    for name, part in vars(pipe).items():
        if "tokenizer" in name and callable(part):
            try:
                part("a", truncation=True)
            except Exception as error:  # as in `_load_diffusers`
                raise FileError(f"{directory / name}: {one_line(error)}. Download the folder again.") from error


def load_denoiser(directory: Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Loads a denoiser, float or quantized, from its own directory, in `dtype` or the stored dtype.

    config.json names the class. Raises FileError for files that do not load, MisfitError for weights of another model.
    """
    kind = _class_named_in(directory)
    with quiet():
        common = {"torch_dtype": dtype, "local_files_only": True, "use_safetensors": True}
        return load_component(directory, kind, common, strict=True)


def _model_class(component: Component) -> Any:
    """Returns the class of a component if it is a model class of transformers or diffusers, or one that a package of a
    diffusers pipeline defines.

    Returns None for any other component, such as a tokenizer.
    """
    library, name = component.library, component.kind
    if library is None or name is None:
        return None
    home = getattr(diffusers.pipelines, library, None) or {"diffusers": diffusers, "transformers": transformers}.get(
        library
    )
    kind = getattr(home, name, None)
    models = (diffusers.ModelMixin, transformers.PreTrainedModel)
    return kind if isinstance(kind, type) and issubclass(kind, models) else None


def _holds_several(kind: Any) -> bool:
    """Returns whether `kind`, a diffusers class, holds several nets, each in its own folder, as MultiControlNetModel
    does."""
    return issubclass(kind, diffusers.ModelMixin) and "from_pretrained" in vars(kind)


def _load_class(folders: tuple[Path, ...], kind: Any, common: dict[str, Any], strict: bool) -> nn.Module:
    """Loads a component of class `kind` from its folders; `common` are arguments of from_pretrained.

    Raises FileError for damaged files, MisfitError for weights that are missing or have the wrong shape. If `strict` is
    True, it also raises MisfitError for weights that the model does not have.
    """
    if not _holds_several(kind):
        return load_component(folders[0], kind, common, strict)
    nets = [load_component(folder, _class_named_in(folder), common, strict) for folder in folders]
    whole: nn.Module = kind(nets)
    return whole.eval()


def _class_named_in(folder: Path) -> Any:
    """Returns the model class that config.json in a diffusers folder names. Raises FileError for an unknown class."""
    name = read_json(folder / "config.json").get("_class_name")
    kind = getattr(diffusers, str(name), None)
    if name == "STDiT3":
        from .opensora import STDiT3 as kind
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise FileError(f"{folder / 'config.json'}: no model class '{name}' is known. Upgrade diffusers.")
    return kind


def load_component(folder: Path, kind: Any, common: dict[str, Any], strict: bool) -> nn.Module:
    """Loads a model of class `kind` from a folder; `common` are arguments of from_pretrained.

    Raises FileError for damaged files, MisfitError for weights that are missing or have the wrong shape. Weights that
    the model does not have are ignored with a warning; if `strict` is True, they raise MisfitError.
    """
    variant, files = weights_of(folder)
    if (folder / "config.json").is_file():
        read_config(folder, files)
    if variant is not None:
        common = {**common, "variant": variant}
    if issubclass(kind, transformers.PreTrainedModel):
        common = {**common, "dtype": common["torch_dtype"]}
        del common["torch_dtype"]
    try:
        module, info = kind.from_pretrained(folder, output_loading_info=True, **common)
    except (OctavoError, MemoryError):
        raise
    except Exception as error:  # as in `_load_diffusers`
        mismatch = "size mismatch" in str(error) or "shape" in str(error)
        kind = MisfitError if mismatch else FileError
        raise kind(f"{folder}: {one_line(error)}. Check the files.") from error
    missing = sorted(info["missing_keys"])
    if missing:
        count = f"{len(missing)} weight{'s' * (len(missing) > 1)} missing"
        would = "they" if len(missing) > 1 else "it"
        raise MisfitError(f"{folder}: {count} ({', '.join(missing[:5])}); {would} would be random. Download it again.")
    if info["mismatched_keys"]:
        key = sorted(str(k[0] if isinstance(k, (tuple, list)) else k) for k in info["mismatched_keys"])[0]
        raise MisfitError(f"{folder}: {key} has another shape than in the model. Check config.json.")
    surplus = sorted(info["unexpected_keys"])
    if surplus and strict:
        fact = f"has {len(surplus)} weights that the model lacks ({', '.join(surplus[:5])})"
        raise MisfitError(f"{folder}: {fact}. Check the files.")
    if surplus:
        log.warning(
            "%s: %d weights that the model lacks are ignored (%s).", folder, len(surplus), ", ".join(surplus[:5])
        )
    return module.eval()


def check_finite(module: nn.Module, name: str) -> None:
    """Raises NumbersError if a float parameter of `module`, the component `name`, holds NaN or infinity."""
    for key, parameter in module.named_parameters():
        if not parameter.is_floating_point() or parameter.is_meta or not parameter.numel():
            continue
        tensor = parameter.float() if parameter.itemsize == 1 else parameter  # torch has no isfinite for FP8
        if not _finite(tensor):
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            fact = f"{bad} of {tensor.numel()} values are not finite"
            raise NumbersError(f"{name}.{key}: {fact}. Download the weights again or use another dtype.")


def _finite(tensor: torch.Tensor) -> bool:
    low, high = torch.aminmax(tensor)  # 15 to 60 times as fast as isfinite, without a mask; with a NaN both are NaN
    return bool(low.isfinite() and high.isfinite())


def one_line(error: BaseException) -> str:
    """Returns the first sentence of a library's error message, cut to 300 characters.

    The message of a KeyError is only the key, so the class of a KeyError or IndexError is put before the message.
    """
    kind = f"{type(error).__name__} " if isinstance(error, LookupError) else ""
    return kind + first_sentence(error)[:300]

"""Loads the checkpoints of quantized denoisers into the float pipeline that they were calibrated in."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

from octavo.calibrate.formats import TABLE, format_named
from octavo.calibrate.formats.diffusers.directory import method_at
from octavo.calibrate.formats.diffusers.quantizer import adopt
from octavo.calibrate.formats.inspect import DEFAULT, quantized_parts, views
from octavo.calibrate.formats.manifest import NOT_VERIFIABLE, PATTERN, manifests_of, verify
from octavo.calibrate.formats.record import Format, Readable
from octavo.calibrate.layers.install import all_names, install, names_of, quantized, replace
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.report_file import REPORT_FILE, read_report
from octavo.calibrate.runtime import accelerate, attend, optimized
from octavo.calibrate.runtime.int8_modules import Int8GELU
from octavo.capture.errors import MisfitError, OctavoError, UsageError
from octavo.capture.fingerprint import Origin
from octavo.pipelines.denoisers import denoisers
from octavo.pipelines.inspection import family_at
from octavo.pipelines.load import load_denoiser, load_pipeline, mapped_denoiser, model_directory
from octavo.pipelines.loras import Lora, parse_loras

# largest relative difference of two float tensors that count as equal: rounding to bfloat16, the coarsest dtype of a
# model, changes a value by at most 2^-8
_CLOSE = 0.01


class Deployed(NamedTuple):
    """A float denoiser of a pipeline together with its quantized form.

    `component` is the denoiser's name in the pipeline, `module` the float denoiser. Inside `with installed() as
    integers` the pipeline runs the quantized denoiser, `integers`, instead of the float one. `report` is the content of
    report.json, {} for a checkpoint without one. `runs_on` says in words which kernels compute the quantized denoiser,
    for the page of a comparison.

    A Deployed may also stand for several denoisers: `module` is then a container of them, and `component` names all.
    `roots` has the name of each denoiser inside `module`. For one denoiser it is ("",), because `module` itself is the
    denoiser.
    """

    component: str
    module: nn.Module
    installed: Callable[[], AbstractContextManager[nn.Module]]
    report: dict[str, Any]
    runs_on: str
    roots: tuple[str, ...] = ("",)  # names below `module` of the denoisers that the pipeline calls; "" is `module`

    @classmethod
    def itself(cls, pipe: Any, component: str) -> "Deployed":
        """Returns a Deployed in which the float denoiser `component` of `pipe` stands for its quantized form too, so
        that a comparison finds no difference."""
        module = denoisers(pipe, (component,))[component]
        return cls(component, module, lambda: nullcontext(module), {}, "float layers")


def format_at(out: Path) -> tuple[Format, Path]:
    """Returns the format in which to load the checkpoint at `out`, which may hold files of several formats, and the
    path of its files: `out` or a subfolder.

    A format that diffusers loads as a whole model is preferred to a format whose layers are put into the float model.
    If `out` holds files of neither kind of format, raises UsageError if a config.json in `out` names another library,
    such as torchao. Without such a config.json, returns `ascend`; reading the checkpoint then raises an error. Raises
    FileError if config.json is damaged.
    """
    method = method_at(out)  # first, because it raises FileError for a damaged config.json
    found = [(format_named(name), place) for name, place in views(out).items()]
    loadable = [pair for pair in found if pair[0].is_model] or [pair for pair in found if pair[0].read]
    if loadable:
        return loadable[0]
    if method is not None:
        fact = f"is in the format of {method}, which Octavo cannot load"
        names = " or ".join(name for name in TABLE if format_named(name).loadable)
        raise UsageError(f"{out}: {fact}. Use its own runtime, or octavo calibrate --format {names}.")
    return format_named(DEFAULT), out


def check_deployed(out: Path) -> list[str]:
    """Checks that `load_deployed` can load the checkpoint at `out`. Returns warnings: one if the checkpoint has no
    manifest, and one for each file that the manifest does not list.

    Raises UsageError if `out` is not a directory, or if only another library, such as torchao, can load the checkpoint;
    FileError if there is no checkpoint in `out`, or if files are missing or damaged.
    """
    if not out.is_dir():
        raise UsageError(f"{out}: no such directory. Give a directory that octavo calibrate wrote.")
    if _is_pipeline(out) and not quantized_parts(out):
        raise UsageError(f"{out}: is a pipeline without a quantized model. Give MODEL first, then the checkpoint OUT.")
    notes = check_files(out)
    record, place = format_at(out)
    if record.read is not None:
        record.read(place)
    return notes


def load_deployed(pipe: Any, out: Path, component: str | None, device: torch.device) -> Deployed:
    """Loads the checkpoint at `out` onto `device`, and pairs it with the denoiser of `pipe` that it was made from.
    `component`, the name of a denoiser, wins over the name in the checkpoint's report. If neither gives a name, every
    denoiser of `pipe` is tried.

    Raises FileError for damaged files; MisfitError if the checkpoint was made from another model than the named
    denoiser or, without a name, from none of the denoisers of `pipe`.
    """
    report = read_report(out)
    only = component or report.get("component")
    choices = matching_origin(out, denoisers(pipe, (only,) if only else ()))
    runs_on = f"Octavo's {report.get('settings', {}).get('element', 'int8')} layers for {device.type}"
    record, place = format_at(out)
    if record.read is None:
        return _load_model(pipe, place, choices, device)._replace(report=report, runs_on=runs_on)
    checkpoint = record.read(place)
    facts = {name: checkpoint.difference(module) for name, module in choices.items()}
    fitting = next((name for name, fact in facts.items() if fact is None), None)
    if fitting is None:
        name, fact = next(iter(facts.items()))
        raise wrong_model(out, f"{name}: {fact}")
    layers: dict[str, Any] = {name: optimized(checkpoint.layer(name)).to(device) for name in checkpoint.layer_names}
    module = choices[fitting]
    return Deployed(fitting, module, lambda: _with_layers(module, layers), report, runs_on)


@contextmanager
def _with_layers(module: nn.Module, layers: dict[str, QuantizedLayer]) -> Iterator[nn.Module]:
    """Makes the float `module` run the integer `layers`, a dict from layer name to layer, inside the `with` block, and
    yields `module`. Where a kernel can compute a layer and the GELU that follows it in one pass, that kernel is used.
    """
    before = dict(module.named_modules(remove_duplicate=False))
    with quantized(module, layers):
        accelerate(module)
        fused = [name for names in names_of(module).values() for name in names if _is_fused(module, name)]
        try:
            yield module
        finally:
            for name in fused:
                replace(module, name, before[name])
            attend(module, None)


def _is_fused(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name), Int8GELU)


def _load_model(pipe: Any, out: Path, choices: dict[str, nn.Module], device: torch.device) -> Deployed:
    """Loads the quantized denoiser at `out` with diffusers, on `device`, and pairs it with the float denoiser that it
    replaces: one of `choices`, a dict from name to denoiser of `pipe`. Raises MisfitError if the checkpoint was made
    from none of them."""
    dtype = next(iter(choices.values())).dtype
    other: Any = load_denoiser(out, dtype if isinstance(dtype, torch.dtype) else None).to(device)
    facts = {name: _difference(module, other) for name, module in choices.items()}
    component = next((name for name, fact in facts.items() if fact is None), None)
    if component is None:
        name, fact = next(iter(facts.items()))
        raise wrong_model(out, f"{name}: {fact}")
    module = choices[component]

    @contextmanager
    def installed() -> Iterator[nn.Module]:
        parent, _, leaf = component.rpartition(".")
        owner = pipe
        for part in parent.split(".") if parent else ():
            owner = getattr(owner, part)
        setattr(owner, leaf, other)
        try:
            yield other
        finally:
            setattr(owner, leaf, module)

    return Deployed(component, module, installed, {}, "")


def _difference(module: nn.Module, other: nn.Module) -> str | None:
    """Returns a text that says how the float `module` differs from the float model that `other` was quantized from: in
    class, in the shape of a tensor, or in the values of all parameters. Returns None if they agree.

    The values agree if at least one float parameter of `module` is equal, up to rounding, to that of `other`. The
    others may differ, because export may have folded smoothing factors into float layers and norms of `other`.
    """
    if type(module) is not type(other):
        return f"it is a {type(module).__name__} and not a {type(other).__name__}"
    counterparts, same = other.state_dict(), False
    for name, tensor in module.named_parameters():
        counterpart = counterparts.get(name)
        if counterpart is None:
            continue
        if counterpart.shape != tensor.shape:
            return f"{name} is {list(tensor.shape)} and not {list(counterpart.shape)}"
        if counterpart.is_floating_point() and tensor.any():
            same = same or torch.allclose(counterpart.float(), tensor.float(), rtol=_CLOSE, atol=1e-6)
    return None if same else "no float parameter has the value that it has in the checkpoint"


def wrong_model(out: Path, fact: str) -> OctavoError:
    """Returns the MisfitError for a checkpoint at `out` that was made from another model; `fact` says what differs."""
    return MisfitError(f"{out}: was made from another model ({fact}). Give the MODEL that was captured.")


def matching_origin(out: Path, choices: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Returns the float denoisers among `choices`, a dict from name to denoiser, from which the checkpoint at `out` may
    have been made: those whose fingerprint (digests of class, names, shapes and weights) is stored in the checkpoint.

    Returns all `choices` if the checkpoint holds no fingerprint. Raises MisfitError if it holds one and no denoiser has
    it. Hashes every weight: 0.4 s per 1e9 bytes on one processor.
    """
    origin = _origin_at(out)
    if origin is None:
        return choices
    facts = {name: origin.other_structure(module) for name, module in choices.items()}
    same_structure = {name: module for name, module in choices.items() if facts[name] is None}
    if not same_structure:
        name, fact = next(iter(facts.items()))
        raise wrong_model(out, f"{name}: {fact}")
    weights = {name: origin.other_weights(module) for name, module in same_structure.items()}
    fitting = {name: module for name, module in same_structure.items() if weights[name] is None}
    if not fitting:
        fact = f"other weights of this model (fingerprint {next(iter(weights.values()))})"
        raise MisfitError(f"{out}: was made from {fact}. Give the MODEL that was captured.")
    return fitting


def _origin_at(out: Path) -> Origin | None:
    return next((manifest.origin for manifest in manifests_of(out) if manifest.origin is not None), None)


def _check_stored_origin(out: Path, model: Path, component: str, *, trust_remote_code: bool = False, **_: Any) -> None:
    """Raises MisfitError if the checkpoint at `out` was not made from the float denoiser `component` in the directory
    `model`. Does nothing if the checkpoint holds no fingerprint, or if the denoiser has no folder of its own.

    `trust_remote_code`: whether code in `model` may run. Maps the weights from disk instead of loading them. Raises
    FileError for files of the model that cannot be read.
    """
    if _origin_at(out) is None:
        return
    try:
        module = mapped_denoiser(model, component, family_at(model), trust_remote_code=trust_remote_code)
    except UsageError:  # the denoiser has no folder of its own
        return
    matching_origin(out, {component: module})


def check_files(directory: Path) -> list[str]:
    """Compares the files of the checkpoint at `directory`, or of all checkpoints in it, with the digests in their
    manifests. Returns warnings: a line for each checkpoint without a manifest and each file that no manifest lists.

    Raises FileError for a file that is missing or damaged.
    """
    notes = []
    places = [directory] if is_checkpoint(directory) else list(checkpoints_at(directory).values())
    for place in quantized_parts(directory) if _is_pipeline(directory) else places:
        files = verify(place)
        fact = "is not in the manifest of its directory, so it was not checked"
        notes += [f"{place / name}: {fact}." for name in files.extra]
        notes += [] if files.manifests else [f"{place}: {NOT_VERIFIABLE}."]
    return notes


def _is_pipeline(directory: Path) -> bool:
    return (directory / "model_index.json").is_file()


def is_checkpoint(directory: Path) -> bool:
    """Returns whether `directory` is the checkpoint of one quantized denoiser, and not a pipeline."""
    if _is_pipeline(directory):
        return False
    if (directory / REPORT_FILE).is_file() or any(directory.glob(PATTERN)):
        return True
    return method_at(directory) is not None or bool(views(directory))


def checkpoints_at(directory: Path) -> dict[str, Path]:
    """Returns the checkpoints at `directory` as a dict from the name of a denoiser to the path of its checkpoint. If
    `directory` itself is a checkpoint, it is the only one in the dict. Otherwise the dict holds the checkpoints in the
    direct subfolders. Returns {} if `directory` is a complete pipeline, even one with quantized denoisers.

    Raises UsageError if two checkpoints are of the same denoiser.
    """
    if is_checkpoint(directory):
        return {read_report(directory).get("component") or "transformer": directory}
    if not directory.is_dir() or _is_pipeline(directory):
        return {}
    places: dict[str, Path] = {}
    for place in sorted(path.parent for path in directory.glob(f"*/{REPORT_FILE}")):
        name = read_report(place).get("component")
        if name is None or not is_checkpoint(place):
            continue
        if name in places:
            fact = f"holds several checkpoints of {name}"
            raise UsageError(f"{directory}: {fact}. Give one of them, such as {places[name]}.")
        places[name] = place
    return places


def chosen_place(directory: Path, places: dict[str, Path], component: str) -> Path:
    """Returns the path of the checkpoint for the denoiser `component` among `places`, a dict from denoiser to path. If
    there is only one checkpoint, returns its path, whatever its denoiser.

    Raises UsageError if there are several, and none for `component`; `directory` is for the message.
    """
    if len(places) > 1 and component not in places:
        raise UsageError(f"{directory}: has no checkpoint of {component}. Choose one of {', '.join(places)}.")
    return places.get(component) or next(iter(places.values()))


def open_pipeline(
    source: str,
    model: str | None,
    component: str | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    loras: Sequence[Lora] = (),
    **options: Any,
) -> Any:
    """Loads the pipeline in the model directory `source`. If `source` is a checkpoint, or a directory of checkpoints,
    loads the float pipeline that the checkpoints were calibrated in, with the quantized denoisers in place of the float
    ones.

    `model` and `component` win over the model and the denoiser that the checkpoint's report names. `dtype` and `device`
    are those of the float pipeline; `loras` are added to its weights. `options` are further arguments of
    `load_pipeline`.

    Raises UsageError if `source` is a pipeline and `model` or `component` is given, if `source` is a checkpoint and
    `loras` are given, or if the model of a checkpoint is named neither by `model` nor by the checkpoint's report.
    Raises MisfitError for a checkpoint of another model, FileError for damaged files.
    """
    directory = model_directory(source)
    places = checkpoints_at(directory)
    if not places:
        if model is not None or component is not None:
            raise UsageError(
                f"{source}: is a pipeline, but --model and --component only work with a checkpoint. Remove them."
            )
        return load_pipeline(directory, dtype=dtype, device=device, loras=loras, **options)
    if loras:
        fact = "cannot be added to integers"
        raise UsageError(f"LoRA {loras[0]}: {fact}. Give it to octavo capture with --lora, and calibrate again.")
    if component is not None:
        places = {component: chosen_place(directory, places, component)}
    model = model or next(filter(None, (read_report(place).get("model") for place in places.values())), None)
    if model is None:
        raise UsageError(f"{source}: does not say which model it was made from. Give the model with --model.")
    return _quantized_pipeline(places, model_directory(model), dtype, device, options)


def _quantized_pipeline(
    places: dict[str, Path], model: Path, dtype: torch.dtype | None, device: torch.device, options: dict[str, Any]
) -> Any:
    """Loads the float pipeline in the directory `model` and replaces some of its denoisers by quantized ones. `places`
    is a dict from the name of a denoiser to the path of its checkpoint. The pipeline is loaded in `dtype` (None: a
    dtype that suits the device and the checkpoints) on `device`. `options` are further arguments of `load_pipeline`."""
    found = {name: format_at(place) for name, place in places.items()}
    models = [name for name, (record, _) in found.items() if record.read is None]
    if models and dtype is None and device.type == "cpu":
        dtype = torch.float32  # 16-bit floats are slow on a CPU
    loras = loras_of(places.values())
    for name in models if not loras else ():
        _check_stored_origin(places[name], model, name, **options)
    loaded: dict[str, Any] = {name: load_denoiser(found[name][1], dtype) for name in models}
    dtype = dtype or next((denoiser.dtype for denoiser in loaded.values()), None)
    given = {} if loras else loaded
    pipe = load_pipeline(model, dtype=dtype, device=device, given=given, loras=loras, **options)
    if loras:  # they are added to a float denoiser before the quantized one takes its place
        for name in models:
            matching_origin(places[name], denoisers(pipe, (name,)))
        pipe.register_modules(**{name: module.to(device) for name, module in loaded.items()})
    for name, (record, place) in found.items():
        if record.read is not None:
            module = matching_origin(places[name], denoisers(pipe, (name,)))[name]
            _install_layers(module, places[name], record.read(place))
    return pipe


def loras_of(places: Iterable[Path]) -> list[Lora]:
    """Returns the LoRAs that were added to the float model of the checkpoints at `places` before it was calibrated,
    from their reports. Raises UsageError for a LoRA file that does not exist."""
    return parse_loras(next(filter(None, (read_report(place).get("loras") for place in places)), []))


def _install_layers(module: torch.nn.Module, directory: Path, checkpoint: Readable) -> None:
    """Puts the integer layers of `checkpoint`, which was read from `directory`, into the float denoiser `module`.
    Raises MisfitError if the checkpoint was made from another model; `directory` is for the message."""
    fact = checkpoint.difference(module)
    if fact is not None:
        raise wrong_model(directory, fact)
    device = next(module.parameters()).device
    layers = {name: checkpoint.layer(name).to(device) for name in checkpoint.layer_names}
    named = all_names(layers, module)
    if isinstance(module, diffusers.ModelMixin):
        adopt(module, named)
    else:  # a model of transformers: diffusers can save only its own models as quantized
        install(module, named)
        accelerate(module)

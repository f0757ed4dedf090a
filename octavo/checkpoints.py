"""Loads quantized denoisers and puts them into the float pipeline that they were calibrated in."""

from collections.abc import Callable, Iterator
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

_CLOSE = 0.01  # relative: a float tensor in another float dtype differs by less


class Deployed(NamedTuple):
    """The float denoiser `module`, which is the pipeline's `component`, and its integers.

    Inside `installed()` the pipeline runs with integers; what it gives is the denoiser that then runs. `report` is the
    calibration's, {} where it was not kept; `runs_on` says what computes.
    """

    component: str
    module: nn.Module
    installed: Callable[[], AbstractContextManager[nn.Module]]
    report: dict[str, Any]
    runs_on: str
    roots: tuple[str, ...] = ("",)  # names in `module` of what the pipeline calls: itself, or several denoisers

    @classmethod
    def itself(cls, pipe: Any, component: str) -> "Deployed":
        """The float denoiser in the place of integers: what a comparison must find no difference in."""
        module = denoisers(pipe, (component,))[component]
        return cls(component, module, lambda: nullcontext(module), {}, "float layers")


def format_at(out: Path, remedy: str = "") -> Format:
    """The format that the checkpoint at `out` is loaded from: a model of diffusers before layers for a float one.

    Raises UsageError for a model that another library quantized, with a `remedy` of the caller's.
    """
    method = method_at(out)
    here = [format_named(name) for name, place in views(out).items() if place == out]
    model = next((each for each in here if each.is_model), None)
    if model is not None:
        return model
    if method is not None:
        loadable = " or ".join(each.name for name in TABLE if (each := format_named(name)).is_model or each.read)
        raise UsageError(f"{out}: quantized by {method}. {remedy or f'Give a checkpoint of the format {loadable}'}.")
    return next((each for each in here if each.read), format_named(DEFAULT))


def check_deployed(out: Path) -> list[str]:
    """Checks that there is something at `out` that `load_deployed` can load; returns the lines of `check_files`.

    Raises UsageError without a directory or for layers of another library, FileError without a checkpoint in it or for
    files that are missing or damaged.
    """
    if not out.is_dir():
        raise UsageError(f"{out}: no such directory. Give what octavo calibrate wrote.")
    notes = check_files(out)
    record = format_at(out)
    if record.read is not None:
        record.read(out)
    return notes


def load_deployed(pipe: Any, out: Path, component: str | None, device: torch.device) -> Deployed:
    """The integers at `out` and the denoiser of `pipe` they are of, on `device`.

    Raises FileError for damaged files, MisfitError when `out` is of another model.
    """
    report = read_report(out)
    only = component or report.get("component")
    choices = of_origin(out, denoisers(pipe, (only,) if only else ()))
    runs_on = f"octavo's int8 layers for {device.type}"
    record = format_at(out)
    if record.read is None:
        return _load_model(pipe, out, choices, device)._replace(report=report, runs_on=runs_on)
    checkpoint = record.read(out)
    facts = {name: checkpoint.difference(module) for name, module in choices.items()}
    fitting = next((name for name, fact in facts.items() if fact is None), None)
    if fitting is None:
        name, fact = next(iter(facts.items()))
        raise of_another(out, f"{name}: {fact}")
    layers: dict[str, Any] = {name: optimized(checkpoint.layer(name)).to(device) for name in checkpoint.layer_names}
    module = choices[fitting]
    return Deployed(fitting, module, lambda: _with_layers(module, layers), report, runs_on)


@contextmanager
def _with_layers(module: nn.Module, layers: dict[str, QuantizedLayer]) -> Iterator[nn.Module]:
    """Inside, the float `module` has these layers, and they the GELU behind them where that is one operation."""
    before = dict(module.named_modules(remove_duplicate=False))
    with quantized(module, layers):
        accelerate(module)
        fused = [name for names in names_of(module).values() for name in names if _is_fused(module, name)]
        try:
            yield module
        finally:
            for name in fused:
                replace(module, name, before[name])
            attend(module, False)


def _is_fused(module: nn.Module, name: str) -> bool:
    return isinstance(module.get_submodule(name), Int8GELU)


def _load_model(pipe: Any, out: Path, choices: dict[str, nn.Module], device: torch.device) -> Deployed:
    """A denoiser that diffusers loads, which takes the place of the float one in the pipeline."""
    dtype = next(iter(choices.values())).dtype
    other: Any = load_denoiser(out, dtype if isinstance(dtype, torch.dtype) else None).to(device)
    facts = {name: _unlike(module, other) for name, module in choices.items()}
    component = next((name for name, fact in facts.items() if fact is None), None)
    if component is None:
        name, fact = next(iter(facts.items()))
        raise of_another(out, f"{name}: {fact}")
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


def _unlike(module: nn.Module, other: nn.Module) -> str | None:
    """The first fact that tells the integer form `other` from that of the float `module`; None: it is that.

    What makes the input of a layer may be divided in it, so that float tensors may differ, but not all.
    """
    if type(module) is not type(other):
        return f"it is a {type(module).__name__} and not a {type(other).__name__}"
    there, same = other.state_dict(), False
    for name, tensor in module.named_parameters():
        counterpart = there.get(name)
        if counterpart is None:
            continue
        if counterpart.shape != tensor.shape:
            return f"{name} is {list(tensor.shape)} and not {list(counterpart.shape)}"
        if counterpart.is_floating_point() and tensor.any():
            same = same or torch.allclose(counterpart.float(), tensor.float(), rtol=_CLOSE, atol=1e-6)
    return None if same else "none of its float parameters has these values"


def of_another(out: Path, fact: str) -> OctavoError:
    """The refusal of a checkpoint that is not of the model that was given."""
    return MisfitError(f"{out}: of another model ({fact}). Give the MODEL that was captured.")


def of_origin(out: Path, choices: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """The float denoisers of `choices` that the manifest at `out` may mean; all of them where it names none.

    Raises MisfitError for other weights or another model. Hashes every weight: 0.4 s for each 1e9 bytes and processor.
    """
    origin = _origin_at(out)
    if origin is None:
        return choices
    facts = {name: origin.other_structure(module) for name, module in choices.items()}
    alike = {name: module for name, module in choices.items() if facts[name] is None}
    if not alike:
        name, fact = next(iter(facts.items()))
        raise of_another(out, f"{name}: {fact}")
    weights = {name: origin.other_weights(module) for name, module in alike.items()}
    fitting = {name: module for name, module in alike.items() if weights[name] is None}
    if not fitting:
        found = f"fingerprint {next(iter(weights.values()))}"
        raise MisfitError(f"{out}: made of other weights of this model ({found}). Give the MODEL that was captured.")
    return fitting


def _origin_at(out: Path) -> Origin | None:
    return next((each.origin for each in manifests_of(out) if each.origin is not None), None)


def _check_stored_origin(out: Path, model: Path, component: str, *, trust_remote_code: bool = False, **_: Any) -> None:
    """Raises as `of_origin` does for the weights of the float model on disk, which are not loaded."""
    if _origin_at(out) is None:
        return
    try:
        module = mapped_denoiser(model, component, family_at(model), trust_remote_code=trust_remote_code)
    except UsageError:  # the denoiser has no folder of its own
        return
    of_origin(out, {component: module})


def check_files(directory: Path) -> list[str]:
    """Compares the files of the checkpoint at `directory`, or of all that are in it, with their manifests, to the last
    bit. Returns a line for each that has none, and for each file that no manifest lists.

    Raises FileError for a file that is missing or damaged.
    """
    notes = []
    places = [directory] if is_checkpoint(directory) else list(checkpoints_at(directory).values())
    for place in quantized_parts(directory) if _is_pipeline(directory) else places:
        found = verify(place)
        notes += [f"{place / name}: not in the manifest of its directory." for name in found.extra]
        notes += [] if found.manifests else [f"{place}: {NOT_VERIFIABLE}."]
    return notes


def _is_pipeline(directory: Path) -> bool:
    return (directory / "model_index.json").is_file()


def is_checkpoint(directory: Path) -> bool:
    """Whether there is a denoiser that Octavo wrote, not a pipeline."""
    if _is_pipeline(directory):
        return False
    if (directory / REPORT_FILE).is_file() or any(directory.glob(PATTERN)):
        return True
    return method_at(directory) is not None or bool(views(directory))


def checkpoints_at(directory: Path) -> dict[str, Path]:
    """The checkpoints that are, or are in, a directory, by the component that each replaces; none in a pipeline.

    Raises UsageError for several checkpoints of one component.
    """
    if is_checkpoint(directory):
        return {read_report(directory).get("component") or "transformer": directory}
    if not directory.is_dir() or _is_pipeline(directory):
        return {}
    found: dict[str, Path] = {}
    for place in sorted(path.parent for path in directory.glob(f"*/{REPORT_FILE}")):
        name = read_report(place).get("component")
        if name is None or not is_checkpoint(place):
            continue
        if name in found:
            fact = f"holds several checkpoints of {name}"
            raise UsageError(f"{directory}: {fact}. Give one of them, such as {found[name]}.")
        found[name] = place
    return found


def chosen_place(directory: Path, places: dict[str, Path], component: str) -> Path:
    """The checkpoint that `component` is replaced by: the only one, or the one of that component."""
    if len(places) > 1 and component not in places:
        raise UsageError(f"{directory}: no checkpoint of {component}. Choose one of {', '.join(places)}.")
    return places.get(component) or next(iter(places.values()))


def open_pipeline(
    source: str,
    model: str | None,
    component: str | None,
    *,
    dtype: torch.dtype | None,
    device: torch.device,
    **options: Any,
) -> Any:
    """The pipeline of a model directory, or that of checkpoints with their denoisers in integers.

    `model` and `component` win over what the checkpoint says of its origin; `options` are those of `load_pipeline`.
    Raises UsageError for a checkpoint that does not say what it is of, and what loading raises.
    """
    directory = model_directory(source)
    places = checkpoints_at(directory)
    if not places:
        if model is not None or component is not None:
            raise UsageError(f"{source}: a pipeline, not a checkpoint. Leave --model and --component out.")
        return load_pipeline(directory, dtype=dtype, device=device, **options)
    if component is not None:
        places = {component: chosen_place(directory, places, component)}
    model = model or next(filter(None, (read_report(place).get("model") for place in places.values())), None)
    if model is None:
        raise UsageError(f"{source}: does not say which model it is of. Give it with --model.")
    return _quantized_pipeline(places, model_directory(model), dtype, device, options)


def _quantized_pipeline(
    places: dict[str, Path], model: Path, dtype: torch.dtype | None, device: torch.device, options: dict[str, Any]
) -> Any:
    """The pipeline at `model` with the checkpoints at `places`, each in the place of its component."""
    records = {n: format_at(place, f"Load it with diffusers and {method_at(place)}") for n, place in places.items()}
    models = [name for name, record in records.items() if record.read is None]
    if models and dtype is None and device.type == "cpu":
        dtype = torch.float32  # halves are slow there
    for name in models:
        _check_stored_origin(places[name], model, name, **options)
    given: dict[str, Any] = {name: load_denoiser(places[name], dtype) for name in models}
    dtype = dtype or next((denoiser.dtype for denoiser in given.values()), None)
    pipe = load_pipeline(model, dtype=dtype, device=device, given=given, **options)
    for name, record in records.items():
        if record.read is not None:
            module = of_origin(places[name], denoisers(pipe, (name,)))[name]
            _put_in(module, places[name], record.read(places[name]))
    return pipe


def _put_in(module: torch.nn.Module, directory: Path, checkpoint: Readable) -> None:
    """Puts the layers of a checkpoint into the float denoiser that it is of."""
    fact = checkpoint.difference(module)
    if fact is not None:
        raise of_another(directory, fact)
    device = next(module.parameters()).device
    layers = {name: checkpoint.layer(name).to(device) for name in checkpoint.layer_names}
    named = all_names(layers, module)
    if isinstance(module, diffusers.ModelMixin):
        adopt(module, named)
    else:  # a text encoder of transformers, which diffusers does not save as quantized
        install(module, named)
        accelerate(module)

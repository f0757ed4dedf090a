"""Finds the denoisers of a pipeline: the modules that are called once or more in each denoising step."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from octavo.capture.errors import UsageError
from octavo.capture.wrappers import inside

_DENOISER = re.compile(r"Transformer|UNet|UVit|DiT|DiffNeXt|Prior$|UniDiffuserModel|FilmDecoder")
_OTHER = re.compile(
    r"ControlNet(?!XSModel)|Text|Autoencoder|V[Aa][Ee]|VQ|Adapter|Vision|Encoder|Vocoder|Upsampl|Connector"
)


def _parts(pipeline: Any, prefix: str = "", seen: frozenset[int] = frozenset()) -> Iterator[tuple[str, Any]]:
    """Yields the dotted name and the module, for every module of a pipeline and of the pipelines inside it.

    `prefix` is put before the names; `seen` has the ids of the pipelines around this one, which are not searched again.
    """
    for name, part in vars(pipeline).items():
        if isinstance(part, DiffusionPipeline):
            if id(part) not in seen:
                yield from _parts(part, f"{prefix}{name}.", seen | {id(pipeline)})
        elif isinstance(part, nn.Module):
            yield prefix + name, part


def is_denoiser(module: nn.Module) -> bool:
    """Returns whether a component of a pipeline is a network that denoises: a diffusers transformer, UNet or prior."""
    kind = type(inside(module))
    return issubclass(kind, ModelMixin) and _denoises(kind.__name__)


def _denoises(kind: str) -> bool:
    return bool(_DENOISER.search(kind)) and not _OTHER.search(kind)


def denoisers_in(index: Mapping[str, Any]) -> list[str]:
    """Returns the names of the denoisers among the components in `index`, the content of a model_index.json."""
    kinds = {name: kind for name, kind in index.items() if isinstance(kind, list) and kind[-1] is not None}
    return [name for name, (library, kind) in kinds.items() if library == "diffusers" and _denoises(kind)]


def denoisers(pipeline: DiffusionPipeline, only: tuple[str, ...] = ()) -> dict[str, nn.Module]:
    """Returns a dict from dotted name to denoiser of `pipeline`; a denoiser with several names is listed once.

    If `only` has names, returns the modules of the pipeline with these names instead. Raises UsageError for a pipeline
    without a denoiser, and for a name in `only` that no module has.
    """
    parts = list(_parts(pipeline))
    modules: dict[str, nn.Module] = {}
    for name, module in sorted(parts, key=lambda part: part[0].count(".")):
        if is_denoiser(module) and not any(module is other for other in modules.values()):
            modules[name] = module
    kind = type(pipeline).__name__
    choices = ", ".join(sorted(name for name, _ in parts)) or "nothing"
    if not modules and not only:
        raise UsageError(f"{kind}: no transformer or UNet among its modules. Choose one of {choices} with --component.")
    for name in only:
        if name not in dict(parts):
            raise UsageError(f"{kind}: no module '{name}'. Choose one of {choices}.")
    return {name: dict(parts)[name] for name in only} if only else modules

"""`octavo calibrate --memory`: the model is read block by block, and nothing of the pipeline but the denoiser."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from octavo.calibrate.blockwise.calibration import BigCalibration
from octavo.calibrate.byte_sizes import bytes_of
from octavo.calibrate.formats.target import check_target, existing_parent
from octavo.calibrate.layers.weights import check_finite
from octavo.calibrate.replay.calls import Calls
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings
from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.files import staging
from octavo.capture.fingerprint import fingerprint_of
from octavo.capture.paging import page_out
from octavo.capture.ranks import Ranks
from octavo.capture.store.reader import Capture
from octavo.pipelines.family import Family
from octavo.pipelines.inspection import family_at
from octavo.pipelines.load import mapped_denoiser, model_directory

from ..terminal import Terminal
from .calibrate_options import CalibrateOptions
from .calibrate_output import write
from .captured_model import check_fingerprint, source_of, told


def run_big(
    options: CalibrateOptions,
    capture: Capture,
    component: str,
    family: Family,
    calls: Calls,
    settings: Settings,
    terminal: Terminal,
    ranks: Ranks,
) -> Result:
    """Calibrates and writes OUT; beside it, meanwhile, lies what blocks were given and what they became.

    Each of `ranks` has files of its own there; the first one writes OUT.
    """
    assert options.memory is not None
    limit = bytes_of(options.memory, "--memory")
    source = source_of(capture, options)
    directory = model_directory(source)
    family = family if family.load or family.pipelines else family_at(directory)
    captured = DTYPES.get(capture.manifest.get("dtype", ""))
    model = mapped_denoiser(directory, component, family, dtype=captured, trust_remote_code=options.trust_remote_code)
    cast = _casts(model, captured)
    now = fingerprint_of(type(model).__name__, _looked_at(model, component, cast))
    check_fingerprint(capture, component, now, source, options.allow_revision)
    deployed = DTYPES.get(options.dtype or "")

    def in_deployment(tensor: Tensor) -> Tensor:
        tensor = cast(tensor)
        return tensor.to(deployed) if deployed and tensor.is_floating_point() else tensor

    with staging(existing_parent(check_target(options.out, overwrite=options.overwrite))) as place:
        work = BigCalibration(
            model.requires_grad_(False), calls, settings, place=place, limit=limit,
            device=resolve_device(options.device), cast=in_deployment, progress=terminal.progress,
            ranks=ranks,
        )  # fmt: skip
        result = work.run()
        result = replace(result, report=result.report | told(options, capture, component))
        if ranks.rank == 0:
            write(result, model, options, family)
    return result


def _casts(model: nn.Module, captured: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """What gives a stored weight the dtype it was captured in; those of another one than the first keep theirs."""
    stored = next((x.dtype for x in model.parameters() if x.is_floating_point()), None)
    return lambda tensor: tensor.to(captured or stored) if tensor.dtype == stored else tensor


def _looked_at(model: nn.Module, component: str, cast: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors by name as they were captured, each let go when the next is asked for. NumbersError for NaN."""
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            check_finite(f"{component}.{name}", tensor)
        yield name, cast(tensor)
        page_out(tensor)

"""Runs `octavo calibrate --memory`: reads the denoiser block by block, and loads no other part of the pipeline."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from octavo.calibrate.blockwise.calibration import BlockwiseCalibration
from octavo.calibrate.byte_sizes import parse_size
from octavo.calibrate.calibration import planned
from octavo.calibrate.formats.target import check_target, least_size
from octavo.calibrate.layers.weights import check_finite
from octavo.calibrate.result import Result
from octavo.calibrate.settings import Settings
from octavo.capture.devices import DTYPES, resolve_device
from octavo.capture.errors import UsageError
from octavo.capture.files import staging
from octavo.capture.fingerprint import Origin, fingerprint_of
from octavo.capture.paging import page_out
from octavo.capture.ranks import Ranks
from octavo.capture.space import check_space, existing_parent
from octavo.pipelines.inspection import family_at
from octavo.pipelines.load import mapped_denoiser, model_directory

from ..terminal import Terminal
from .calibrate_options import CalibrateOptions, formats_of, settings_for
from .calibrate_output import write
from .captured_model import Captured, check_fingerprint, origin_of, source_of


def calibrate_blockwise(
    options: CalibrateOptions, captured: Captured, settings: Settings, terminal: Terminal, ranks: Ranks
) -> Result:
    """Calibrates the denoiser `captured` block by block, in no more memory than --memory. Only the first of `ranks`
    writes OUT, the directory of the checkpoint.

    During the calibration each of `ranks` keeps temporary files in a directory beside OUT: the outputs of the blocks,
    and the integer layers.
    """
    assert options.memory is not None
    limit = parse_size(options.memory, "--memory")
    model, cast, origin = _mapped(options, captured)
    settings = settings_for(options, settings, model)
    check_space(options.out, least_size(model, planned(model, settings).quantized, len(formats_of(options))))
    deployed = DTYPES.get(options.dtype or "")

    def in_deployment(tensor: Tensor) -> Tensor:
        tensor = cast(tensor)
        return tensor.to(deployed) if deployed and tensor.is_floating_point() else tensor

    target = check_target(options.out, overwrite=options.overwrite)
    with staging(existing_parent(target), options.out) as place:
        work = BlockwiseCalibration(
            model.requires_grad_(False), captured.calls, settings, directory=place, limit=limit,
            device=resolve_device(options.device), cast=in_deployment, progress=terminal.progress,
            ranks=ranks,
        )  # fmt: skip
        result = work.run()
        result = replace(result, report=result.report | origin_of(captured, options))
        if ranks.rank == 0:
            write(result, model, options, origin)
    return result


def _mapped(
    options: CalibrateOptions, captured: Captured
) -> tuple[nn.Module, Callable[[Tensor], Tensor], Origin | None]:
    """Returns three things: the captured denoiser, mapped, so that its weights stay in their files until they are used;
    a function that casts a weight from its dtype on disk to the dtype in which it was captured; and the fingerprint
    that the denoiser has in that dtype.

    Raises MisfitError if the model is not the one that was captured, UsageError if LoRAs were added to the captured
    model, NumbersError for NaN or Inf in the weights.
    """
    capture, component, family = captured.capture, captured.component, captured.family
    source = source_of(capture, options)
    if loras := capture.manifest.get("loras"):
        fact = f"a LoRA ({loras[0]}) is added to the weights of the captured model, which needs all weights in memory"
        raise UsageError(f"--memory: {fact}. Calibrate without --memory.")
    directory = model_directory(source)
    family = family if family.load or family.pipelines else family_at(directory)
    dtype = DTYPES.get(capture.manifest.get("dtype", ""))
    model = mapped_denoiser(directory, component, family, dtype=dtype, trust_remote_code=options.trust_remote_code)
    cast = _casts(model, dtype)
    now = fingerprint_of(type(model).__name__, _as_captured(model, component, cast))
    check_fingerprint(capture, component, now, source, options.allow_revision)
    origin = Origin.of_tensors(type(model).__name__, _as_captured(model, component, cast))
    return model, cast, origin


def _casts(model: nn.Module, captured: torch.dtype | None) -> Callable[[Tensor], Tensor]:
    """Returns a function that casts a tensor of `model` to the dtype `captured`. The function changes only tensors that
    have the dtype of the model's first float parameter, the dtype in which the model is stored. If `captured` is None,
    it changes nothing."""
    stored = next((x.dtype for x in model.parameters() if x.is_floating_point()), None)
    return lambda tensor: tensor.to(captured or stored) if tensor.dtype == stored else tensor


def _as_captured(model: nn.Module, component: str, cast: Callable[[Tensor], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields the name and the values of each tensor of the model, in the dtype in which the model was captured. The
    memory of a tensor is freed when the next one is requested.

    `cast` casts a tensor to that dtype. Raises NumbersError for a tensor with NaN or Inf; the message names the tensor
    and the denoiser `component`.
    """
    for name, tensor in sorted(model.state_dict().items()):
        if tensor.is_floating_point():
            check_finite(f"{component}.{name}", tensor)
        yield name, cast(tensor)
        page_out(tensor)

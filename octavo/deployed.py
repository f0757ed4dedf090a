"""What was quantized, put beside the float pipeline it was made of."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from calibrate.layers import QuantizedLayer
from calibrate.load import Checkpoint
from capture.errors import CaptureError, damage
from capture.sealed import read_bytes
from pipelines.denoisers import denoisers

_REPORT_LIMIT = 256 << 20
_CLOSE = 0.01  # relative: a float tensor in another float dtype differs by less
KINDS = (nn.Linear, nn.Conv2d)


class Deployed(NamedTuple):
    """`layers` take the place of those of the same names in `module`, which is the pipeline's `component`.

    `report` is the calibration's, {} where it was not kept; `runs_on` says what computes the layers.
    """

    component: str
    module: nn.Module
    layers: dict[str, QuantizedLayer]
    report: dict[str, Any]
    runs_on: str


def check_deployed(out: Path) -> None:
    """Raises CaptureError when there is nothing at `out` that `load_deployed` could load: 2 no directory, 3 no
    checkpoint in it."""
    if not out.is_dir():
        raise CaptureError(f"{out}: no such directory. Give what octavo calibrate wrote.", 2)
    Checkpoint(out)


def load_deployed(pipe: Any, out: Path, component: str | None, device: torch.device) -> Deployed:
    """The layers at `out` and the denoiser of `pipe` they are of, on `device`.

    Raises CaptureError: 3 for damaged files, 4 when `out` is of another model.
    """
    checkpoint = Checkpoint(out)
    found, facts = "", []
    for name, module in denoisers(pipe, (component,) if component else ()).items():
        fact = _difference(checkpoint, module)
        if fact is None:
            found = found or name
        facts.append(f"{name}: {fact}")
    if not found:
        raise CaptureError(f"{out}: of another model ({facts[0]}). Give the MODEL that was captured.", 4)
    layers = {name: checkpoint.layer(name).to(device) for name in checkpoint.layer_names}
    runs_on = f"integer-exact reference layers on {device.type}"
    return Deployed(found, denoisers(pipe, (found,))[found], layers, report_at(out), runs_on)


def report_at(out: Path) -> dict[str, Any]:
    """The report of a calibration, {} where there is none."""
    file = out / "report.json"
    if not file.exists():
        return {}
    try:
        found = json.loads(read_bytes(file, _REPORT_LIMIT))
    except (ValueError, RecursionError) as error:
        raise damage(file, "not valid JSON") from error
    if not isinstance(found, dict) or not {"layers", "totals"} <= found.keys():
        raise damage(file, "not a report")
    return found


def _difference(checkpoint: Checkpoint, module: nn.Module) -> str | None:
    """The first fact that tells a checkpoint from the float `module`; None: it was made of it."""
    modules = dict(module.named_modules(remove_duplicate=False))
    for name in checkpoint.layer_names:
        layer = modules.get(name)
        if not isinstance(layer, KINDS):
            return f"it has no layer {name}"
        stored = checkpoint.tensors[f"{checkpoint.prefix(name)}weight"].shape
        if stored != tuple(layer.weight.shape):
            return f"{name} is {list(layer.weight.shape)} and not {list(stored)}"
    for name, tensor in module.state_dict().items():
        if checkpoint.description.get(name) == "FLOAT" and tensor.is_floating_point():
            stored_tensor = checkpoint.tensors.get(name)
            if stored_tensor is None or stored_tensor.shape != tuple(tensor.shape):
                return f"{name} has another shape"
            read = checkpoint.read(name, (stored_tensor.dtype,)).float()
            if not torch.allclose(read, tensor.float().cpu(), rtol=_CLOSE, atol=1e-6):
                return f"{name} has other values"
    return None

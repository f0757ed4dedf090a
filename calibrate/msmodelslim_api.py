"""An API compatible with Huawei's quantization tool msModelSlim: parameters have the names, order, defaults and
meanings of its package ptq_tools.

No other module translates msModelSlim's parameters into `Settings`.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from octavo.capture.devices import resolve_device
from octavo.capture.errors import UsageError
from octavo.capture.files import Modes
from octavo.capture.progress import Reports, line
from octavo.capture.space import check_space
from octavo.capture.wrappers import inside

from .calibration import calibrate_folded, planned
from .formats.ascend.names import file_names
from .formats.ascend.pair import write_pair
from .formats.ascend.write import scheme_of, write_ascend
from .formats.onnx.write import write_all
from .formats.origin import origin_of
from .formats.target import least_size
from .given_model import opened
from .layers.changes import change_of
from .plan import kind_of
from .preparation.synthetic_inputs import synthetic_calls, warnings_of
from .replay.calls import device_of
from .replay.user_data import calls_of
from .result import Result
from .settings import Settings

log = logging.getLogger(__name__)
_METHODS = {"admm": "admm", "easy_quant": "easy-quant", "round_opt": "adaround"}
_DEVICES = ("cpu", "cuda", "npu")


def _no_accuracy_methods() -> dict[str, Any]:
    return {"admm": [False, 1000], "easy_quant": [False, 1000], "round_opt": False}


@dataclass(frozen=True)
class QuantConfig:
    """The configuration of a calibration, with msModelSlim's parameters.

    | parameter     | meaning                                                                                      |
    |---------------|----------------------------------------------------------------------------------------------|
    | w_bit, a_bit  | bits of weights and activations; only 8                                                      |
    | w_signed      | whether weights are signed; only True                                                        |
    | a_signed      | True or False, without effect: codes are always exported as int8, and unsigned codes, 0 to   |
    |               | 255, would be the same codes plus 128                                                        |
    | w_sym         | whether weights have no zero point; only True                                                |
    | a_sym         | whether activations have no zero point                                                       |
    | input_shape   | shape of the synthetic inputs that are made from the batch norms if there are no calib_data  |
    | act_quant     | False: only weights become integers (W8A16)                                                  |
    | act_method    | how the range of an activation is chosen. 0: min-max; 1: min-max, limited to                 |
    |               | mean +- sigma * std if sigma > 0; 2: least squared error over a histogram                    |
    | quant_mode    | 0 (data-free) or 1 (label-free), without effect: calib_data are used if there are any,       |
    |               | otherwise synthetic inputs of input_shape                                                    |
    | disable_names | layers that stay float, by name or pattern; all others are quantized. None or empty: the     |
    |               | general rule (plan.general_reason) quantizes the layers inside repeated blocks, or all       |
    |               | layers of a CNN                                                                              |
    | amp_num       | number of layers that stay float: those whose output has the largest mean squared error      |
    | keep_acc      | the rounding methods to try: dict from 'admm' or 'easy_quant' to [bool, most iterations],    |
    |               | from 'round_opt' (AdaRound) to bool. Each layer gets the best method whose bool is True, or  |
    |               | rounding to the nearest where no method is better                                            |
    | sigma         | half width of the range in standard deviations, 0 to 100                                     |
    | device        | the model's device: "cpu", "cuda" or "npu"                                                   |

    For a model without batch norms, synthetic inputs are uniform numbers from 0 to 1. The ranges of these numbers fit
    no real inputs, so W8A8 without data is then only good for trying the API.

    Raises UsageError for an invalid value, NotImplementedError for a value of msModelSlim that Octavo does not
    support.
    """

    w_bit: int = 8
    a_bit: int = 8
    w_signed: bool = True
    a_signed: bool = False
    w_sym: bool = True
    a_sym: bool = False
    input_shape: list[int] | None = None
    act_quant: bool = True
    act_method: int = 0
    quant_mode: int = 0
    disable_names: list[str] | None = None
    amp_num: int = 0
    keep_acc: dict[str, Any] | None = field(default_factory=_no_accuracy_methods)
    sigma: float = 25
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("w_bit", "a_bit"):
            if type(getattr(self, name)) is not int or getattr(self, name) != 8:
                raise UsageError(f"{name}: {getattr(self, name)!r} is not supported. Set it to 8.")
        for name in ("w_signed", "a_signed", "w_sym", "a_sym", "act_quant"):
            if type(getattr(self, name)) is not bool:
                raise UsageError(f"{name}: {getattr(self, name)!r} is not a bool. Set it to True or False.")
        _check_number("act_method", self.act_method, (int,), 0, 2)
        _check_number("quant_mode", self.quant_mode, (int,), 0, 1)
        _check_number("amp_num", self.amp_num, (int,), 0, None)
        _check_number("sigma", self.sigma, (int, float), 0, 100)
        _check_list("disable_names", self.disable_names, str)
        _check_list("input_shape", self.input_shape, int)
        if self.device.split(":")[0] not in _DEVICES:
            raise UsageError(f"device: '{self.device}' is unknown. Choose one of {', '.join(_DEVICES)}.")
        _check_keep_acc(self.keep_acc)
        self._check_built()

    def _check_built(self) -> None:
        if not self.w_signed or not self.w_sym:
            raise NotImplementedError("w_signed, w_sym: weights can only be symmetric int8. Set both to True.")

    def _methods(self) -> list[str]:
        methods = self.keep_acc or {}
        return [
            name
            for name in _METHODS
            if (switch := methods.get(name)) is True or (isinstance(switch, list) and switch[0])
        ]

    @property
    def settings(self) -> Settings:
        """The configuration as `Settings`."""
        observers = {0: "minmax", 1: "sigma" if self.sigma > 0 else "minmax", 2: "mse"}
        return Settings(
            observer=observers[self.act_method],
            sigma=float(self.sigma),
            symmetric=self.a_sym,
            activations="static" if self.act_quant else "float",
            weights=tuple(_METHODS[name] for name in self._methods()),
            iterations={
                _METHODS[name]: switch[1] for name, switch in (self.keep_acc or {}).items() if name != "round_opt"
            },
            fallback=self.amp_num,
            keep_float=tuple(self.disable_names or ()),
            defaults={} if self.disable_names else None,
            name="disable_names",
        )


def _check_number(name: str, value: Any, kinds: tuple[type, ...], low: int, high: int | None) -> None:
    if type(value) not in kinds:
        kind = "a number" if float in kinds else "a whole number"
        raise UsageError(f"{name}: {value!r} is not {kind}. Give {kind}.")
    if value < low or (high is not None and value > high):
        extent = f"less than {low}" if high is None else f"outside {low} to {high}"
        limits = f"of at least {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name}: {value} is {extent}. Give a number {limits}.")


def _check_list(name: str, value: Any, kind: type) -> None:
    if value is not None and not (isinstance(value, (list, tuple)) and all(type(item) is kind for item in value)):
        raise UsageError(f"{name}: {value!r} is not a list of {kind.__name__}. Give such a list.")


def _check_keep_acc(methods: Any) -> None:
    if methods is None:
        return
    if not isinstance(methods, Mapping) or set(methods) - set(_METHODS):
        raise UsageError(
            f"keep_acc: {methods!r} is not a dict whose keys are among {', '.join(_METHODS)}. Give such a dict."
        )
    for name, value in methods.items():
        if name == "round_opt":
            if type(value) is not bool:
                raise UsageError(f"keep_acc: '{name}' is {value!r}, not a bool. Set it to True or False.")
        elif not (isinstance(value, list) and [type(item) for item in value] == [bool, int]):
            raise UsageError(f"keep_acc: '{name}' is {value!r}. Set it to [switch, iterations], such as [True, 1000].")


class Calibrator:
    """Calibrates a model and writes the checkpoint. Octavo does not change the caller's model.

        calibrator = Calibrator(model, QuantConfig(act_method=1, quant_mode=1), calib_data)
        calibrator.run()
        calibrator.export_quant_safetensor("output")

    `calib_data` is a list of calls (samples). A call is a dict of keyword arguments, a list or tuple of positional
    arguments, or a pair (args, kwargs); it holds the arguments of the model's forward, and no targets such as labels.
    `calib_data` may also be another iterable, such as a DataLoader that shuffles or augments: the samples of its first
    pass are kept in memory, up to 1 GiB. Larger data are read again in each pass; if a sample then differs from that of
    the first pass, `run` raises MisfitError. The calls are not changed. `fuse_module_call_back(model)`, a function of
    the caller, is called first, and may change the model. Batch norms that remain are folded into the convolutions
    before them, in a copy of the model.

    The model may be inside DataParallel, the Listener with which Octavo records calls, or another wrapper that
    capture/wrappers.py lists; layers then have the names that they have in the wrapped model. A compiled model runs
    uncompiled. A model that accelerate offloads is loaded into memory during calibration. torch's default dtype and
    device, autocast, inference mode and matmul precision do not change the integers.

    Raises UsageError for a configuration that does not fit the model, FileError for data that are not such calls,
    DeviceError for a device that is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        cfg: QuantConfig,
        calib_data: Iterable[Any] | None = None,
        fuse_module_call_back: Callable[[nn.Module], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"model: expected an nn.Module, found {type(model).__name__}. Pass the denoiser.")
        if not isinstance(cfg, QuantConfig):
            raise UsageError(f"cfg: expected a QuantConfig, found {type(cfg).__name__}. Pass a QuantConfig.")
        model = inside(model)
        resolve_device(cfg.device)
        _check_amp(model, cfg)
        if fuse_module_call_back is not None:
            fuse_module_call_back(model)
        with opened(model):
            device_type = device_of(model).type
        if cfg.device.split(":")[0] != device_type:
            raise UsageError(
                f"device {cfg.device}: the model is on {device_type}. "
                f"Move the model to {cfg.device}, or set device='{device_type}'."
            )
        self.model, self.cfg = model, cfg
        self._calls = calls_of(calib_data, model)
        if self._calls is None and cfg.act_quant and not cfg.input_shape:
            raise UsageError(
                "calib_data: there are no samples. Give at least one, or set input_shape for synthetic inputs."
            )
        self._result: Result | None = None

    def run(self) -> None:
        """Replays the calibration data and chooses the integers.

        Afterwards the attribute `model` is the calibrated model: a copy of the caller's model if batch norms were
        folded. Logs progress to the logger `octavo.calibrate.msmodelslim_api` (INFO), at most every 30 seconds.

        Raises UsageError for a configuration that does not fit the model; FileError for a module name that a checkpoint
        cannot hold; MisfitError if there are no samples or a sample does not fit the model; NumbersError for weights,
        inputs or outputs that are not finite; DeviceError when memory runs out.
        """
        settings, samples, warnings = self.cfg.settings, list[Any](), list[str]()
        progress = Reports(lambda *report: log.info("%s", line(*report)))
        with opened(self.model):
            planned(self.model, settings)  # raises its errors before synthetic inputs are made, which takes a minute
            if self._calls is None and self.cfg.input_shape:
                samples = list(synthetic_calls(self.model, self.cfg.input_shape, progress=progress))
                warnings = warnings_of(self.model)
            result, model = calibrate_folded(
                self.model, self._calls or (lambda: samples), settings, progress=progress,
                graphs=self.cfg.input_shape is not None, warnings=warnings,
            )  # fmt: skip
        self._result, self.model = result, model

    @property
    def result(self) -> Result:
        """The result of `run`. Raises UsageError if `run` was not called yet."""
        if self._result is None:
            raise UsageError("Calibrator: the model is not calibrated yet. Call run() first.")
        return self._result

    def export_quant_safetensor(
        self, output_path: str | Path, safetensors_name: str | None = None, json_name: str | None = None
    ) -> None:
        """Writes weights, description and manifest into the directory `output_path`, which is created if it does not
        exist. Other files there stay. `safetensors_name` and `json_name` are the file names of weights and description;
        None: the names that MindIE-SD, Huawei's library that runs diffusion models, looks for.

        Raises UsageError before `run` and for an invalid name, StorageError for a directory that cannot be written,
        NumbersError for numbers that are not finite.
        """
        layers = self.result.layers
        weight_name, description_name = file_names(scheme_of(layers))
        names = safetensors_name or weight_name, json_name or description_name
        modes = Modes()
        with opened(self.model):
            check_space(output_path, least_size(self.model, layers))
            write_pair(
                Path(output_path).resolve(),
                names,
                lambda staged: write_ascend(layers, self.model, staged, modes, names),
                modes,
                origin_of(self.model),
            )

    def export_quant_onnx(
        self,
        model_arch: str,
        save_path: str | Path,
        input_names: list[str] | None = None,
        fuse_add: bool = True,
        save_fp: bool = False,
    ) -> None:
        """Writes ONNX models into the directory `save_path`: `{model_arch}_quant.onnx` for Ascend's compiler and
        `{model_arch}_quant_qdq.onnx` for onnxruntime; with `save_fp` also `{model_arch}_fp.onnx`, the float model that
        was calibrated. Other files there stay.

        `input_names` are the names of the model's inputs, by default input.1, input.2, ... With `fuse_add` the integer
        bias is an input of its Conv or Gemm. Without `fuse_add` an Add node adds the bias, and the results are the
        same.

        Raises UsageError before `run`; if `input_names` has not one name for each input, or has a name twice; for a
        `model_arch` that cannot begin a file name; and for layers that are not static W8A8. Raises MisfitError for a
        model that torch.onnx cannot export, StorageError for a directory that cannot be written.
        """
        result = self.result
        with opened(self.model):
            check_space(save_path, least_size(self.model, result.layers, 3 if save_fp else 2))
            write_all(
                result.layers, self.model, Path(save_path).resolve(), model_arch, result.example, input_names,
                fuse_add=fuse_add, save_fp=save_fp,
            )  # fmt: skip

    def get_quant_params(self) -> tuple[dict[str, Any], ...]:
        """Returns five dicts from layer name to tensor: input_scale (1,), input_offset (1,), weight_scale (out, 1),
        weight_offset (out, 1), quant_weight (int8, in the shape of the weight). An offset is a zero point; the offsets
        of weights are 0.

        input_scale and input_offset are None for a layer whose input has no stored range (W8A16).
        """
        layers = self.result.layers
        return (
            {name: layer.input_scale.view(-1) if layer.calibrated else None for name, layer in layers.items()},
            {name: layer.input_zero_point.view(-1) if layer.calibrated else None for name, layer in layers.items()},
            {name: layer.weight_scale.view(-1, 1) for name, layer in layers.items()},
            {name: torch.zeros_like(layer.weight_scale).view(-1, 1) for name, layer in layers.items()},
            {name: layer.weight.detach() for name, layer in layers.items()},
        )


def _check_amp(model: nn.Module, cfg: QuantConfig) -> None:
    count = sum(1 for module in model.modules() if kind_of(module) is not None and not change_of(module))
    if cfg.amp_num > count:
        raise UsageError(
            f"amp_num {cfg.amp_num}: the model has only {count} quantizable layers. Give a smaller number."
        )

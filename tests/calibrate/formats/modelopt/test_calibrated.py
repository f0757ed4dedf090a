"""A calibration as the command makes it gives layers that the format modelopt holds as they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.export import export, folding, kept_float, weight_scales_for
from octavo.calibrate.formats.inspect import check, sound
from octavo.calibrate.formats.modelopt.models import VLLM_OMNI
from octavo.calibrate.formats.native import linears_in
from octavo.calibrate.settings import Settings
from octavo.pipelines.families import TABLE

from ....zoo.exported_sd3 import WEIGHTS
from ....zoo.image_pipelines import qwen_image
from ....zoo.pipelines import wan22
from ....zoo.toy import Call

FORMATS = ("modelopt",)


@pytest.mark.parametrize(("case", "family"), [(qwen_image, "qwenimage"), (wan22, "wan")])
def test_layers_are_written_with_the_scales_of_the_calibration(
    tmp_path: Any, case: Callable[[], Any], family: str
) -> None:
    pipe, arguments = case()
    model, calls = pipe.transformer.eval().requires_grad_(False), []

    def record(module: Any, args: Any, kwargs: Any) -> None:
        calls.append(Call(args, kwargs, len(calls)))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    pipe(**arguments)
    handle.remove()
    groups = next(entry for entry in TABLE if entry.name == family).groups
    kept = kept_float(FORMATS, model, linears_in(model))
    scales = weight_scales_for(FORMATS, "W8A8_FP8", None)
    settings = Settings(
        element="fp8", weight_scales=scales, smoothing=True, fold=folding(FORMATS), multipliers=False, groups=groups,
        sqnr_calls=0,
    ).keeping(kept)  # fmt: skip
    result = calibrate(model, lambda: calls, settings)
    assert len(result.layers) > 10
    for group in VLLM_OMNI[type(model).__name__].joined(result.layers).values():
        assert len({float(result.layers[name].input_scale) for name in group}) == 1
    export(result, model, tmp_path / "out", FORMATS)
    tensors = load_file(tmp_path / "out" / WEIGHTS)
    for name, layer in result.layers.items():
        assert torch.equal(tensors[f"{name}.weight"].view(torch.uint8), layer.weight.view(torch.uint8))
        assert torch.equal(tensors[f"{name}.weight_scale"], layer.weight_scale[:1])
        assert torch.equal(tensors[f"{name}.input_scale"], layer.input_scale.view(1))
    verdicts = check(tmp_path / "out")
    assert sound(verdicts, {"modelopt"})
    assert all(verdict.ok for verdict in verdicts if verdict.consumer in ("vLLM-Omni", "SGLang", "octavo"))

"""Layers that a format's runtime can only hold as float stay float from the start, and the others are written as
integers."""

from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import nn

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.export import check_model, export, kept_float
from octavo.calibrate.plan import Plan, make_plan
from octavo.calibrate.result import Result
from octavo.capture.errors import UsageError

from ...helpers.refusals import refused
from ...zoo.comfy_models import model as model_of
from ...zoo.layer_kinds import frozen

CASES = [
    (("vllm-omni",), "flux"), (("vllm-omni",), "qwen-image"), (("sglang",), "flux"), (("comfy",), "sd3"),
    (("comfy", "vllm-omni"), "z-image"), (("sdnq", "comfy"), "wan"), (("vllm-omni", "sglang"), "flux2"),
]  # fmt: skip


def planned(model: nn.Module, *, without: str = "") -> list[str]:
    """Returns the layers of `model` that would become integers, but no layer whose name ends with `without`."""
    names = make_plan(model, defaults={}).quantized
    return [name for name in names if not (without and name.endswith(without))]


def integers_in(folder: Path) -> int:
    """Returns how many int8 matrices the safetensors files below `folder` hold."""
    count = 0
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            count += sum(file.get_slice(key).get_dtype() == "I8" for key in file.keys())  # noqa: SIM118
    return count


@pytest.mark.parametrize(("formats", "name"), CASES)
def test_what_is_left_is_written_as_integers(tmp_path, formats, name):
    model = model_of(name, torch.bfloat16)
    names = planned(model)
    reasons = kept_float(formats, model, names)
    left = {each: frozen(model.get_submodule(each), "W8A8_DYNAMIC") for each in names if each not in reasons}
    assert left
    assert all("can only hold it as float" in reason for reason in reasons.values())
    assert kept_float(formats, model, list(left)) == {}
    for form in formats:
        export(Result(Plan(()), left, {}), model, tmp_path / form, (form,))
        matrices = [module for module in left.values()]
        joined = form == "comfy"  # there several layers are one matrix
        assert 0 < integers_in(tmp_path / form) <= len(matrices)
        assert joined or integers_in(tmp_path / form) == len(matrices)


def test_layers_that_become_one_matrix_stay_float_together():
    model = model_of("sd3")
    names = planned(model, without="attn.to_k")
    reasons = kept_float(("comfy",), model, names)
    assert set(reasons) == {"pos_embed.proj", *(name for name in names if name.endswith((".to_q", ".to_v")))}


@pytest.mark.parametrize("form", ["torchao", "sdnq"])
def test_convolutions_stay_float_where_only_linear_layers_can_be_integers(form):
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16, attention_head_dim=8, norm_num_groups=8,
    )  # fmt: skip
    names = planned(unet)
    convolutions = {name for name in names if isinstance(unet.get_submodule(name), nn.Conv2d)}
    assert convolutions
    assert set(kept_float((form,), unet, names)) == convolutions


def test_a_dtype_that_the_runtime_does_not_run_in_is_refused_before_the_calibration():
    model = model_of("flux")
    refused(lambda: check_model(("sglang",), model), 2, "SGLang runs in bfloat16", "float32", "Use --dtype bfloat16")
    check_model(("sglang",), model, "bfloat16")
    with pytest.raises(UsageError, match="never uses it"):
        check_model(("sglang",), model_of("sd3"), "bfloat16")


def test_formats_that_hold_every_layer_keep_none_float():
    model = model_of("flux")
    for form in ("ascend", "diffusers"):
        assert not format_named(form).kept_float(model, planned(model), "W8A8")

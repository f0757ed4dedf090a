"""The plan lists every layer once, and says why a layer stays float."""

import pytest
import torch
from torch import nn

from octavo.calibrate.plan import make_plan, matches

from ..helpers.refusals import refused
from ..zoo.convolutions import small
from ..zoo.toy import toy


class Many(nn.Module):
    """A model with layers that have an integer form and layers of kinds that have none."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.grouped = nn.Conv2d(4, 4, 3, groups=4)
        self.volume = nn.Conv3d(4, 4, 3)
        self.words = nn.Embedding(4, 4)
        self.double = nn.Linear(4, 4).double()
        self.attention = nn.MultiheadAttention(4, 2)


def test_every_layer_is_listed_once_and_unsupported_ones_with_a_reason():
    plan = make_plan(Many())
    rows = {entry.name: entry for entry in plan.entries}
    assert len(rows) == len(plan.entries)
    assert plan.quantized == ("linear", "conv", "grouped")
    assert set(rows) == {
        "linear", "conv", "grouped", "volume", "words", "double", "attention", "attention.out_proj"
    }  # fmt: skip
    assert all(rows[name].unsupported and rows[name].reason for name in set(rows) - set(plan.quantized))


def test_a_subclass_counts_where_it_computes_what_its_kind_does():
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Standardized(nn.Conv2d):
        def _conv_forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            return super()._conv_forward(x, weight - weight.mean(), bias)

    class Depthwise(nn.Conv2d):
        def __init__(self, channels: int) -> None:
            super().__init__(channels, channels, 3, groups=channels)

    moved = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    model = nn.Sequential(nn.Linear(2, 2), Scaled(2, 2), Standardized(2, 2, 3), Depthwise(2), moved)
    plan = make_plan(model)
    assert plan.quantized == ("0", "3")
    assert [entry.kind for entry in plan.entries if entry.scheme] == ["Linear", "Conv2d"]
    assert [entry.reason for entry in plan.entries if entry.unsupported] == [
        "Scaled has no integer form", "Standardized has no integer form", "its weight is parametrized"
    ]  # fmt: skip


def test_the_general_rule_takes_linears_inside_blocks():
    model = toy()
    assert make_plan(model).quantized == ("blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down")
    model._skip_layerwise_casting_patterns = ["up$"]
    model._keep_in_fp32_modules = ["1"]
    plan = make_plan(model)
    assert plan.quantized == ("blocks.0.down",)
    assert all(entry.reason for entry in plan.entries if not entry.scheme)


def test_the_stages_of_a_convolutional_network_are_no_blocks():
    model = small()
    names = [name for name, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    assert list(make_plan(model).quantized) == names


def test_the_lists_of_a_diffusers_class_are_heeded():
    from diffusers import SD3Transformer2DModel

    from ..zoo.pipelines import make

    model = make("sd3")[0].transformer
    assert isinstance(model, SD3Transformer2DModel)
    plan = make_plan(model)
    assert "transformer_blocks.0.attn.to_q" in plan.quantized
    assert not any("norm" in name or "embed" in name or name == "proj_out" for name in plan.quantized)


def test_in_blocks_of_a_class_without_lists_modulations_and_raw_residuals_stay_float():
    block = nn.ModuleDict(
        {name: nn.Linear(4, 4) for name in ("to_q", "norm1", "img_mod", "adaLN_modulation", "time_emb_proj", "modular")}
        | {name: nn.Conv2d(4, 4, 1) for name in ("conv1", "conv_shortcut", "downsamplers")}
    )
    plan = make_plan(nn.ModuleDict({"blocks": nn.ModuleList([block]), "out": nn.Linear(4, 4)}))
    assert plan.quantized == ("blocks.0.to_q", "blocks.0.modular", "blocks.0.conv1")


def test_a_model_without_blocks_has_all_its_layers_quantized():
    assert make_plan(nn.Sequential(nn.Linear(2, 2), nn.Conv2d(2, 2, 1))).quantized == ("0", "1")


def test_patterns_of_a_family_need_not_match_and_those_of_the_user_win():
    plan = make_plan(toy(), keep_float=["blocks.1"], defaults={"proj_out": "why", "nowhere.*": "never"})
    rows = {entry.name: entry for entry in plan.entries}
    assert rows["proj_out"].reason == "why"
    assert rows["blocks.1.up"].reason == rows["blocks.1.down"].reason == "kept float on request"
    assert plan.quantized == ("patch", "blocks.0.up", "blocks.0.down", "unused")


@pytest.mark.parametrize("pattern", ["blocks.0.up", "blocks.0", "*.up", "blocks.?.up", "blocks"])
def test_patterns(pattern):
    assert matches("blocks.0.up", pattern)
    assert not matches("proj_out", pattern)


def test_a_pattern_without_match_names_the_nearest_layer():
    message = refused(lambda: make_plan(toy(), keep_float=["proj_out", "blocks.0.upp"], option="disable_names"), 2)
    assert message == "disable_names: 'blocks.0.upp' matches no layer. The nearest name is 'blocks.0.up'."


def test_keeping_all_layers_float_is_refused():
    refused(lambda: make_plan(toy(), keep_float=["*"]), 2, "no layer is left")


@pytest.mark.parametrize("name", ["naïve", "a\nb", "a b", "a/..", "..", "a\\b"])
def test_names_that_no_file_should_hold_are_refused(name):
    model = nn.Module()
    model._modules[name] = nn.Linear(2, 2)
    refused(lambda: make_plan(model), 3, "a checkpoint cannot hold a tensor of this name")


def test_a_model_without_layers_is_refused():
    refused(lambda: make_plan(nn.ReLU()), 2, "no nn.Linear")

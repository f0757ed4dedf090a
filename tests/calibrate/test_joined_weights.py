"""Weights that a consumer joins into one matrix get one scale."""

import pytest
import torch
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.export import joined
from octavo.calibrate.settings import Settings

from ..zoo.image_pipelines import flux_parts
from .test_guard import Call


class Two(nn.Module):
    """Two blocks whose weights differ in size by a factor of 3."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.blocks[1].weight.data *= 3

    def forward(self, x):
        return self.blocks[0](x) + self.blocks[1](x)


@pytest.mark.parametrize("weights", [(), ("gptq",)])
def test_joined_weights_have_one_scale_and_the_others_their_own(weights):
    torch.manual_seed(0)
    model, inputs = Two().eval(), [Call(torch.randn(2, 24, 32), index) for index in range(8)]
    settings = Settings(element="fp8", weight_scales="tensor", weights=weights)
    apart = calibrate(model, lambda: inputs, settings).layers
    assert apart["blocks.0"].weight_scale[0] < apart["blocks.1"].weight_scale[0]
    together = calibrate(model, lambda: inputs, Settings(**{**vars(settings), "joined": (("blocks.0", "blocks.1"),)}))
    scales = torch.cat([layer.weight_scale for layer in together.layers.values()])
    assert len(scales.unique()) == 1
    assert float(scales[0]) == pytest.approx(float(model.blocks[1].weight.detach().abs().max()) / 448)


def test_formats_name_the_layers_that_their_consumers_join():
    model = flux_parts()["transformer"]
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    attention = "single_transformer_blocks.0.attn"
    qkv = tuple(f"{attention}.to_{leaf}" for leaf in "kqv")
    for formats in (("comfy",), ("modelopt",), ("comfy", "modelopt")):
        groups = joined(formats, model, names)
        assert any(set(qkv) <= set(group) for group in groups)
        assert len({name for group in groups for name in group}) == sum(map(len, groups))
    assert joined(("diffusers",), model, names) == ()
    assert not any(set(qkv) & set(group) for group in joined(("comfy",), model, [n for n in names if n != qkv[0]]))

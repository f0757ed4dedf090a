"""torch.compile of a model whose layers are integers: graphs around them, and the same outputs."""

import copy

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import nn

from calibrate.layers import install
from calibrate.runtime import accelerate
from calibrate.scheme import Range

from .runtime_tiny import SCHEMES, frozen


def transformer(scheme, size=8):
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=size, num_layers=1, attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16,
        caption_projection_dim=16, pooled_projection_dim=8, pos_embed_max_size=size,
    ).eval()  # fmt: skip
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [name for name in linears if name.startswith("transformer_blocks")]
    extents = [Range(-2.0, 3.0)] * 3
    install(model, {name: frozen(model.get_submodule(name), scheme, extents=extents) for name in names})
    accelerate(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_compiled_model_puts_out_what_it_did(scheme):
    model = transformer(scheme)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model))
    with torch.no_grad():
        for level in (500.0, 100.0):
            inputs = torch.randn(1, 16, 8, 8), torch.randn(1, 5, 16), torch.randn(1, 8), torch.tensor([level])
            wanted = model(*inputs)[0]
            error = (compiled(*inputs)[0] - wanted).abs().max()
            # a code may round the other way where the graph before it adds up in another order
            assert error < 0.05 * wanted.abs().max()

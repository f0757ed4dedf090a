"""The tensors that ask ComfyUI for integer attention stand at its attention modules."""

import json

import pytest
import torch
from torch import nn

from octavo.calibrate.formats.comfy.attention import attention_tensors
from octavo.capture.errors import UsageError

from ....zoo.comfy_models import model

NATIVE = {  # model: (attention module in diffusers, module in ComfyUI)
    "flux": {"transformer_blocks.0.attn": "double_blocks.0", "single_transformer_blocks.0.attn": "single_blocks.0"},
    "wan": {"blocks.0.attn1": "blocks.0.self_attn", "blocks.1.attn2": "blocks.1.cross_attn"},
    "z-image": {"layers.0.attention": "layers.0.attention"},
    "qwen-image": {"transformer_blocks.0.attn": "transformer_blocks.0.attn"},
    "ltx": {"transformer_blocks.0.attn2": "transformer_blocks.0.attn2"},
    "chroma": {"transformer_blocks.0.attn": "double_blocks.0"},
    "krea2": {"transformer_blocks.0.attn": "blocks.0.attn"},
}


@pytest.mark.parametrize("name", NATIVE)
def test_the_config_stands_at_the_native_attention_module(name):
    tensors, refused = attention_tensors(NATIVE[name], model(name))
    assert list(tensors) == [f"{native}.comfy_attention.config" for native in NATIVE[name].values()]
    assert refused == {}
    for planned in tensors.values():
        data = planned.make()
        assert data.dtype == planned.dtype == torch.uint8
        assert json.loads(bytes(data.tolist())) == {"attention": "comfy_kitchen_int8"}


def test_models_without_such_a_module_are_refused():
    tensors, refused = attention_tensors(["transformer_blocks.0.attn"], model("sd3"))
    assert tensors == {}
    assert "Stable Diffusion 3" in refused["transformer_blocks.0.attn"]
    assert "no module" in attention_tensors(["nothing"], model("wan"))[1]["nothing"]
    with pytest.raises(UsageError, match="ComfyUI's names"):
        attention_tensors(["attn"], nn.Linear(2, 2))

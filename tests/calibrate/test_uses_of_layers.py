"""One model with all uses that diffusers' models make of layers is calibrated, exported and loaded."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.export import export
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.preparation.weight_reads import READ
from octavo.calibrate.report import NEVER_RAN
from octavo.calibrate.settings import RECIPES, Settings
from octavo.capture.recorder import Memory, Recorder

WIDTH = 16


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.plain = nn.Linear(WIDTH, WIDTH, bias=False)
        self.shared = nn.Linear(WIDTH, WIDTH)
        self.named = nn.Linear(WIDTH, WIDTH)
        self.never = nn.Linear(WIDTH, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out_proj = nn.Linear(WIDTH, WIDTH)
        self.video = nn.Linear(WIDTH, WIDTH, bias=False)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)

    def forward(self, x, chosen):
        x = x + self.shared(self.plain(x))
        x = x + self.shared(self.named(input=x))
        tokens = x.flatten(0, 1)  # packed; an expert that no token chose gets no rows
        mixed = torch.empty_like(tokens)
        for index, expert in enumerate(self.experts):
            mixed[chosen == index] = expert(tokens[chosen == index])
        x = x + mixed.view_as(x)
        biases = torch.cat([self.q_proj.bias, self.k_proj.bias, self.v_proj.bias])
        attended, _ = F.multi_head_attention_forward(
            x, x, x, WIDTH, 2, None, biases, None, None, False, 0.0, self.out_proj.weight, self.out_proj.bias,
            training=False, need_weights=False, use_separate_proj_weight=True, q_proj_weight=self.q_proj.weight,
            k_proj_weight=self.k_proj.weight, v_proj_weight=self.v_proj.weight,
        )  # fmt: skip
        x = x + attended
        x = x + self.video(x.view(len(x), 1, 2, 2, WIDTH)).view_as(x)
        return x + self.depthwise(x.mT.unflatten(2, (2, 2))).flatten(2).mT


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.proj_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, chosen, scales=None):
        for block in self.blocks:
            hidden_states = block(hidden_states, chosen)
        return (self.proj_out(hidden_states) * scales["output"][0],)


@pytest.fixture(scope="module")
def calls():
    model, memory, generator = Model(), Memory(), torch.Generator().manual_seed(1)
    with Recorder(model, memory), torch.no_grad():
        for step in range(4):
            x = torch.randn(3, 4, WIDTH, generator=generator)  # 4 tokens
            chosen = torch.randint(0, 2 + (step == 2), (12,), generator=generator)
            model(x, chosen, scales={"output": [torch.tensor(2.0)]})
    return memory.calls


@pytest.mark.parametrize("recipe", ["plain", "fast", "best", "weights alone"])
def test_all_uses_of_layers_are_calibrated_exported_and_loaded(recipe, calls, tmp_path):
    model = Model().requires_grad_(False)
    result = calibrate(model, lambda: calls, Settings(sqnr_calls=4, **RECIPES.get(recipe, {"activations": "float"})))
    float_leaves = {"never", "q_proj", "k_proj", "v_proj", "out_proj"}
    reasons = {entry.name: entry.reason for entry in result.plan.entries if not entry.scheme}
    assert set(reasons) == {f"blocks.{index}.{leaf}" for index in range(2) for leaf in float_leaves} | {"proj_out"}
    expected = {
        f"blocks.{index}.{leaf}": NEVER_RAN if leaf == "never" else READ for index in range(2) for leaf in float_leaves
    }
    assert {name: reason for name, reason in reasons.items() if name != "proj_out"} == expected
    export(result, model, tmp_path / "out")
    layers = load_ascend(tmp_path / "out")
    other = copy.deepcopy(model)
    with quantized(model, result.layers) as original, quantized(other, layers) as restored:
        for call in calls:
            assert torch.equal(original(**call.kwargs)[0], restored(**call.kwargs)[0])
    assert result.report["totals"]["output_sqnr"] > 25
    from safetensors import safe_open

    (file,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(file, "pt") as stored:
        assert torch.equal(stored.get_tensor("blocks.1.q_proj.weight"), model.blocks[1].q_proj.weight)

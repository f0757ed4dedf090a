"""The UNet of guided-diffusion: read back from a graph, and which of its layers stay float by default."""

import pytest
import torch

from octavo.calibrate.plan import make_plan

from ..zoo.guided_onnx import read_denoiser
from ..zoo.guided_unet import Consistency, GuidedUNet, random_tensors


def denoiser(seed: int) -> Consistency:
    """Returns a tiny denoiser with random weights, also in its norms."""
    network = GuidedUNet(tensors := random_tensors(seed))
    network.load_state_dict({**network.state_dict(), **tensors})
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.weight.normal_(1, 0.3)
                module.bias.normal_(0, 0.3)
    return Consistency(network).eval()


@pytest.mark.slow
def test_the_network_read_from_a_graph_computes_what_the_graph_was_exported_from(tmp_path):
    torch.manual_seed(0)
    model, file = denoiser(0), tmp_path / "denoiser.onnx"
    call = dict(
        noisy=torch.randn(2, 1, 16, 16) * 5, sigma=torch.tensor([5.0, 0.1]), difficulty=torch.tensor([0.2, 0.9])
    )
    torch.onnx.export(model, kwargs=call, f=file, dynamo=True, external_data=False, verbose=False)
    with torch.no_grad():
        exact, found = model(**call), read_denoiser(file)(**call)
    assert exact.std() > 0.1
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-5)


def test_layers_that_receive_the_residual_stream_or_modulate_norms_stay_float():
    plan = make_plan(GuidedUNet(random_tensors(0)))
    reasons = {entry.name: entry.reason for entry in plan.entries if not entry.scheme}
    assert "residual stream" in reasons["output_blocks.0.0.skip_connection"]
    assert "modulation" in reasons["input_blocks.1.0.emb_layers.1"]
    kinds = {name.split(".", 3)[-1] for name in plan.quantized}
    assert kinds >= {"in_layers.2", "out_layers.3", "qkv", "proj_out"}
    assert not any("skip_connection" in kind or "emb_layers" in kind for kind in kinds)

"""Layers whose weight's dtype is what a model casts its inputs to."""

import pytest
import torch
from torch import nn

from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.preparation.dtype_casts import REASON, layers_with_cast_inputs
from octavo.calibrate.replay.user_data import Sample
from octavo.calibrate.settings import Settings

NAMES = ("patches", "inner", "head")


class Casting(nn.Module):
    """Casts pictures as transformers' ViT does, and looks at its first float parameter as ModelMixin.dtype does."""

    def __init__(self, casts: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patches, self.inner, self.head = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 4), nn.Linear(4, 2)
        self.norm, self.casts = nn.LayerNorm(4), casts

    def forward(self, x):
        if self.casts:
            x = x.to(self.patches.weight.dtype)
        y = self.patches(x).mean((2, 3))
        dtype = next(each.dtype for each in self.parameters() if each.is_floating_point())
        return self.head(self.norm(self.inner(y).to(dtype)))


@pytest.mark.parametrize("casts", [True, False])
def test_they_stay_float_and_others_do_not(casts):
    model, x = Casting(casts), torch.randn(4, 3, 6, 6)
    before = model(x)
    assert layers_with_cast_inputs(model, Sample((x,), {}), NAMES) == ({"patches": REASON} if casts else {})
    assert torch.equal(model(x), before)
    assert model.training
    result, _ = calibrate_folded(model, lambda: [Sample((x,), {})], Settings(defaults={}))
    assert list(result.layers) == [name for name in NAMES if not casts or name != "patches"]
    assert result.report["totals"]["output_sqnr"] > 25

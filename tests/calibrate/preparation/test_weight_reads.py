"""Layers whose weight others read or set stay float; sharing a parameter is no reading."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from octavo.calibrate.calibration import calibrate
from octavo.calibrate.layers.install import install, quantized
from octavo.calibrate.preparation.dtype_casts import layers_with_cast_inputs
from octavo.calibrate.preparation.weight_reads import CHANGED, READ, weights_used_elsewhere
from octavo.calibrate.replay.calls import evaluating
from octavo.calibrate.runtime import accelerate

from ...zoo.toy import Call

WIDTH = 16


class Two(nn.Module):
    """Two linears, put together in a way that is given."""

    def __init__(self, way: Callable[["Two", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.way = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x) + self.b(x)


def stacked(model: Two, x: Tensor) -> Tensor:
    return F.linear(x, torch.cat([model.a.weight, model.a.weight]))[..., :WIDTH]


def copied_in(model: Two, x: Tensor) -> Tensor:
    model.a.weight.data.copy_(torch.eye(WIDTH))
    return model.a(x)


def put_in(model: Two, x: Tensor) -> Tensor:
    model.a.weight = nn.Parameter(torch.eye(WIDTH))
    return model.a(x)


WAYS: dict[str, tuple[Any, str]] = {
    "beside": (lambda model, x: model.a(x) + F.linear(x, model.a.weight), READ),
    "alone": (stacked, READ),
    "data": (lambda model, x: model.a(x) + x @ model.a.weight.data.t(), READ),
    "rows": (lambda model, x: F.pad(x @ model.a.weight[:4].t(), (0, WIDTH - 4)), READ),
    "its dtype by a tensor": (lambda model, x: model.a(x) + model.a.weight.new_zeros(WIDTH), READ),
    "its norm": (lambda model, x: model.a(x) / model.a.weight.norm(), READ),
    "its forward": (lambda model, x: model.a.forward(x) + model.a(x), READ),
    "copied in": (copied_in, READ),
    "put in": (put_in, CHANGED),
}


def calls(count: int = 4) -> list[Call]:
    generator = torch.Generator().manual_seed(1)
    return [Call((torch.randn(3, 5, WIDTH, generator=generator),), {}) for _ in range(count)]


@pytest.mark.parametrize("name", WAYS)
def test_a_weight_that_others_use_stays_float(name):
    way, reason = WAYS[name]
    assert weights_used_elsewhere(Two(way).eval(), calls()[0], ["a", "b"]) == {"a": reason}
    result = calibrate(Two(way).eval(), calls)
    assert set(result.layers) == {"b"}
    assert result.report["totals"]["output_sqnr"] > 35


def test_modules_that_share_a_parameter_or_run_twice_are_quantized():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.proj = nn.Embedding(20, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.head, self.twin = nn.Linear(WIDTH, 20, bias=False), nn.Linear(WIDTH, WIDTH)
            self.head.weight, self.twin.weight = self.embedding.weight, self.proj.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.twin(self.proj(self.proj(self.embedding(tokens)))))

    result = calibrate(Tied().eval(), lambda: [Call((torch.arange(at, at + 8)[None],), {}) for at in range(8)])
    assert set(result.layers) == {"proj", "head", "twin"}
    assert result.report["totals"]["output_sqnr"] > 25


@pytest.mark.parametrize(
    "way", [lambda model, x: model.a(x.to(model.a.weight)), lambda m, x: m.a(x.type_as(m.a.weight))]
)
def test_an_input_cast_to_the_weight_as_a_tensor_keeps_the_layer_float(way):
    assert set(layers_with_cast_inputs(Two(way).eval(), calls()[0], ["a", "b"])) == {"a"}


def encoder(**options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not options).eval()


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, src_key_padding_mask=torch.arange(x.shape[1])[None].expand(len(x), -1) > 2)


@pytest.mark.parametrize(
    "make",
    [encoder, lambda: encoder(norm_first=True, activation="gelu"), Padded,
     lambda: nn.TransformerDecoderLayer(WIDTH, 2, 32, batch_first=True).eval()],
    ids=["encoder", "norms first", "padded", "decoder"],
)  # fmt: skip
def test_linears_of_torch_s_transformer_layers_become_integers(make):
    model = make()
    given = [Call((*call.args, *call.args[: isinstance(model, nn.TransformerDecoderLayer)]), {}) for call in calls()]
    fused = torch.backends.mha.get_fastpath_enabled()
    result = calibrate(model, lambda: given)
    assert torch.backends.mha.get_fastpath_enabled() == fused
    assert {name.rpartition(".")[2] for name in result.layers} == {"linear1", "linear2"}
    assert result.report["totals"]["output_sqnr"] > 30
    with torch.no_grad():
        exact = model(*given[0].args)
        with quantized(model, result.layers):
            plain = model(*given[0].args)  # the attention may be fused and round otherwise
            with evaluating(model):
                assert (model(*given[0].args) - plain).norm() < 0.02 * plain.norm()
        assert torch.equal(model(*given[0].args), exact), "the model is not what it was"
        assert not any(module._forward_pre_hooks for module in model.modules())
        install(model, result.layers)
        accelerate(model)
        seen = slice(None, 3)  # the others are padding in one of the models
        assert (model(*given[0].args)[:, seen] - plain[:, seen]).norm() < 0.02 * plain.norm()

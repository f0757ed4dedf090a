"""Weight methods with FP8 and MXFP8 codes: no channel is worse than rounded to the nearest; sums lower the error."""

from dataclasses import replace

import pytest
import torch

from octavo.calibrate.layers.inputs import weights_for
from octavo.calibrate.layers.scheme import FP8, MXFP8, SYMMETRIC_ACTIVATION, Range, in_float32, qparams_of, quantize
from octavo.calibrate.layers.weights import round_to_nearest
from octavo.calibrate.rounding.easy_quant import activation_scale, easy_quant, easy_quant_pair
from octavo.calibrate.rounding.gptq import gptq
from octavo.calibrate.rounding.objective import Inputs, error

from .test_methods import rows, weight_of

RULES = {
    "channel": replace(SYMMETRIC_ACTIVATION, element=FP8),
    "tensor": replace(SYMMETRIC_ACTIVATION, element=FP8, per_tensor=True),
    "blocks": replace(SYMMETRIC_ACTIVATION, element=MXFP8),
}
every = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def sums(seed, columns=64):
    """Returns sums over rows that lie near a few directions, of an input that stays float."""
    x = rows(seed, columns=columns).double()
    return Inputs(x.T @ x, None, len(x))


@every
@pytest.mark.parametrize("method", [gptq, easy_quant], ids=["gptq", "easy-quant"])
@pytest.mark.parametrize("seed", range(3))
def test_no_channel_is_worse_than_nearest(method, rule, seed):
    weight, inputs, scheme = weight_of(seed, shape=(10, 64)), sums(seed), weights_for(rule)
    quantized, nearest = method(weight, inputs, scheme=scheme), round_to_nearest(weight, scheme=scheme)
    assert quantized.weight.dtype == torch.float8_e4m3fn
    assert bool(in_float32(quantized.weight).isfinite().all())
    assert quantized.scale.shape == nearest.scale.shape
    after, before = error(weight, quantized, inputs), error(weight, nearest, inputs)
    if rule.per_tensor:
        assert len(quantized.scale.unique()) == 1
        after, before = after.sum(), before.sum()
    assert bool((after <= before).all())


@every
def test_gptq_lowers_the_error_much(rule):
    weight, inputs, scheme = torch.randn(10, 64, generator=torch.Generator().manual_seed(0)), sums(0), weights_for(rule)
    after = error(weight, gptq(weight, inputs, scheme=scheme), inputs).sum()
    assert after < 0.5 * error(weight, round_to_nearest(weight, scheme=scheme), inputs).sum()


@every
def test_without_inputs_gptq_is_nearest(rule):
    weight, scheme = weight_of(1, shape=(10, 64)), weights_for(rule)
    quantized, nearest = gptq(weight, None, scheme=scheme), round_to_nearest(weight, scheme=scheme)
    assert torch.equal(in_float32(quantized.weight), in_float32(nearest.weight))


def test_the_search_of_an_input_scale_does_not_clip():
    weight, x, rule = weight_of(0, shape=(10, 64)), rows(0, columns=64), RULES["channel"]
    start = qparams_of(Range(float(x.min()), float(x.max())), rule, torch.float32)
    nearest = round_to_nearest(weight, scheme=weights_for(rule))
    found = activation_scale(weight, nearest, x, start, rule, torch.float32)
    assert start.scale <= found.scale <= 2 * start.scale * (1 + 1e-6)
    pair = easy_quant_pair(weight, x, start, rule, torch.float32, iterations=9)
    assert pair is not None
    assert pair[0].weight.dtype == torch.float8_e4m3fn
    codes = in_float32(quantize(x, pair[1], rule))
    assert bool(((x / pair[1].scale).abs() <= 448 * (1 + 1e-6)).all())
    assert bool(codes.isfinite().all())


@pytest.mark.parametrize("method", [gptq, easy_quant], ids=["gptq", "easy-quant"])
def test_a_shared_scale_is_left_as_it_is(method):
    weight, inputs = weight_of(2, shape=(10, 64)), sums(2)
    scheme = weights_for(replace(RULES["tensor"], largest=2 * float(weight.abs().max())))
    quantized, nearest = method(weight, inputs, scheme=scheme), round_to_nearest(weight, scheme=scheme)
    assert quantized.scale.unique().tolist() == nearest.scale.unique().tolist()
    assert float(quantized.scale[0]) == pytest.approx(scheme.largest / 448)
    assert bool((error(weight, quantized, inputs) <= error(weight, nearest, inputs)).all())

"""Every weight method lowers the error of the layer's output, and no channel is worse than rounded to the nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from octavo.calibrate.layers.scheme import ACTIVATION, SYMMETRIC_ACTIVATION, Range, dequantize, qparams_of, quantize
from octavo.calibrate.layers.weights import QuantizedWeight, round_to_nearest
from octavo.calibrate.rounding.adaround import learn_rounding
from octavo.calibrate.rounding.admm import run_stages
from octavo.calibrate.rounding.easy_quant import activation_scale, easy_quant_pair
from octavo.calibrate.rounding.gptq import gptq
from octavo.calibrate.rounding.methods import WEIGHT_METHODS
from octavo.calibrate.rounding.objective import Inputs, case_of, cholesky, descend, error, inputs_of, quadratic_form

from ...zoo.toy import DTYPES

FEW = {"adaround": 60, "admm": 56, "easy-quant": 15}  # iterations of each method, few so that the tests are fast
every = pytest.mark.parametrize("method", WEIGHT_METHODS)
some = settings(max_examples=25, deadline=None)
seeds = st.integers(0, 2**32 - 1)


def run(method, weight, inputs):
    return WEIGHT_METHODS[method](weight, inputs, **({"iterations": FEW[method]} if method in FEW else {}))


def rows(seed, tokens=200, columns=24):
    """Returns rows that lie near a few directions, as activations do. One column is zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, columns, generator=torch.Generator().manual_seed(1)) * 3
    x = torch.randn(tokens, 6, generator=generator) @ mix + 0.3 * torch.randn(tokens, columns, generator=generator)
    x[:, 3] = 0.0
    return x


def weight_of(seed, dtype=torch.float32, shape=(10, 24)):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator) * torch.logspace(-4, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    values[seed % shape[0]] = 0.0
    return values.to(dtype)


def input_sums(x, integers):
    """Returns the sums over the rows `x`, rounded to 8 bits first if `integers`."""
    qparams = qparams_of(Range(float(x.min()), float(x.max())), ACTIVATION, torch.float32) if integers else None
    return inputs_of(x, qparams, ACTIVATION)


def check(weight, quantized, inputs):
    nearest = round_to_nearest(weight)
    assert quantized.weight.dtype == torch.int8
    assert quantized.weight.shape == weight.shape
    assert int(quantized.weight.min()) >= -127
    assert quantized.scale.dtype == torch.float32
    assert quantized.scale.shape == weight.shape[:1]
    assert bool((quantized.scale >= 2.0**-126).all() and quantized.scale.isfinite().all())
    assert bool((error(weight, quantized, inputs) <= error(weight, nearest, inputs)).all())
    empty = (weight == 0).flatten(1).all(1)
    assert bool((quantized.scale[empty] == 1.0).all() and (quantized.weight[empty] == 0).all())


@every
@some
@given(
    seeds, st.sampled_from(DTYPES), st.sampled_from([1, 5, 200]), st.booleans(), st.sampled_from([(10, 24), (1, 24)])
)
def test_no_channel_is_worse_than_rounded_to_the_nearest(method, seed, dtype, tokens, integers, shape):
    weight, inputs = weight_of(seed, dtype, shape), input_sums(rows(seed, tokens), integers)
    check(weight, run(method, weight, inputs), inputs)


@some
@given(seeds, st.sampled_from([2, 3]), st.booleans(), st.booleans())
def test_gptq_rounds_each_group_of_a_convolution_as_a_weight_of_its_own(seed, groups, integers, dead):
    inputs = [rows(seed + group) for group in range(groups)]
    sums = [input_sums(x * 0 if dead and x is inputs[0] else x, integers and not dead) for x in inputs]
    weight = weight_of(seed, shape=(4 * groups, 4, 2, 3))
    cross = torch.stack([one.cross for one in sums]) if integers and not dead else None
    grouped = Inputs(torch.stack([one.gram for one in sums]), cross, sums[0].tokens)
    together = gptq(weight, grouped)
    check(weight, together, grouped)
    parts = [gptq(part, one) for part, one in zip(weight.chunk(groups), sums, strict=True)]
    assert torch.equal(together.weight, torch.cat([part.weight for part in parts]))
    torch.testing.assert_close(together.scale, torch.cat([part.scale for part in parts]))


@every
@pytest.mark.parametrize("scale", [1e-33, 1e30])
def test_small_and_large_channels(method, scale):
    weight, inputs = torch.randn(4, 24) * scale, input_sums(rows(2), True)
    check(weight, run(method, weight, inputs), inputs)


@every
@pytest.mark.parametrize("shape", [(3, 1), (4, 2, 3, 3)])
def test_single_columns_and_convolutions(method, shape):
    weight = weight_of(5, shape=shape)
    inputs = input_sums(rows(6, columns=max(weight[0].numel(), 4))[:, : weight[0].numel()].contiguous(), True)
    check(weight, run(method, weight, inputs), inputs)


@every
def test_an_input_of_zeros_and_an_unknown_one(method):
    weight = weight_of(4)
    for inputs in (None, Inputs(torch.zeros(24, 24), None, 7), Inputs(torch.zeros(24, 24), torch.zeros(24, 24), 0)):
        check(weight, run(method, weight, inputs), inputs)


@every
def test_a_method_returns_none_where_rounding_to_the_nearest_does(method):
    weight = torch.tensor([[1e-38, 1e-39], [1.0, 2.0]])
    assert run(method, weight, input_sums(torch.randn(9, 2), True)) is None
    assert run(method, weight, None) is None


@every
@pytest.mark.parametrize("integers", [False, True])
def test_repeating_gives_the_same_bits_and_leaves_the_arguments_unchanged(method, integers):
    weight, inputs = weight_of(8), input_sums(rows(8), integers)
    before = weight.clone(), inputs.gram.clone(), None if inputs.cross is None else inputs.cross.clone()
    one, other = run(method, weight, inputs), run(method, weight, inputs)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.scale, other.scale)
    assert torch.equal(weight, before[0])
    assert torch.equal(inputs.gram, before[1])
    assert inputs.cross is None or torch.equal(inputs.cross, before[2])


@every
@pytest.mark.parametrize("integers", [False, True])
def test_permuted_channels_give_permuted_errors(method, integers):
    """Nearly all integers are the same too; a few differ because products are summed in another order."""
    weight, inputs = weight_of(3, shape=(16, 24)), input_sums(rows(3), integers)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    one, other = run(method, weight, inputs), run(method, weight[order], inputs)
    assert (one.weight[order] == other.weight).double().mean() > 0.95
    torch.testing.assert_close(one.scale[order], other.scale, rtol=1e-3, atol=0)
    base = error(weight, round_to_nearest(weight), inputs).sum()
    gap = error(weight, one, inputs)[order] - error(weight[order], other, inputs)
    assert float(gap.abs().max()) < 0.01 * float(base.abs())


@pytest.mark.parametrize(("method", "most"), [("easy-quant", 0.9), ("admm", 0.4), ("adaround", 0.4), ("gptq", 0.3)])
@pytest.mark.parametrize("integers", [False, True])
def test_the_error_falls_and_falls_on_other_rows_too(method, most, integers):
    weight = torch.randn(16, 150, generator=torch.Generator().manual_seed(0))
    calibration, held_out = input_sums(rows(1, 2000, 150), integers), input_sums(rows(2, 2000, 150), integers)
    quantized, nearest = run(method, weight, calibration), round_to_nearest(weight)
    for inputs in (calibration, held_out):
        assert error(weight, quantized, inputs).sum() < most * error(weight, nearest, inputs).sum()


@pytest.mark.parametrize("integers", [False, True])
def test_gptq_rounds_what_is_best_given_the_columns_before(integers):
    weight = torch.randn(4, 140, generator=torch.Generator().manual_seed(0))
    inputs = input_sums(rows(1, 300, 140), integers)
    case, quantized = case_of(weight, inputs), gptq(weight, inputs)
    order = case.hessian.diagonal().argsort(descending=True, stable=True)
    h, t = case.hessian[order][:, order], case.target[:, order]
    d = torch.zeros_like(t)
    for column in range(140):
        share = torch.linalg.solve(h[column:, column:], h[column:, :column])[0]
        d[:, column] = (t[:, column] - d[:, :column] @ share).round().clamp(-127, 127) - t[:, column]
    assert torch.equal(quantized.weight[:, order], (t + d).round().to(torch.int8))
    assert torch.equal(quantized.scale, case.scale.float())


@pytest.mark.parametrize("integers", [False, True])
def test_no_scale_of_the_grid_beats_that_of_easy_quant(integers):
    weight, inputs = weight_of(1), input_sums(rows(1), integers)
    quantized, nearest = run("easy-quant", weight, inputs), round_to_nearest(weight)
    damping = 0.01 * inputs.gram.diagonal().mean() * torch.eye(24)
    cross = None if inputs.cross is None else inputs.cross + damping
    inputs = Inputs(inputs.gram + damping, cross, inputs.tokens)  # easy-quant judges by damped sums
    for factor in torch.linspace(0.5, 1.2, FEW["easy-quant"]).tolist():
        codes = (weight / (nearest.scale[:, None] * factor)).round().clamp(-127, 127).to(torch.int8)
        tried = error(weight, QuantizedWeight(codes, nearest.scale * factor), inputs)
        assert bool((error(weight, quantized, inputs) <= tried + 1e-9 * tried.abs()).all())


@pytest.mark.parametrize("integers", [False, True])
def test_adaround_and_admm_beat_the_nearest_before_any_descent(integers):
    case = case_of(
        torch.randn(16, 70, generator=torch.Generator().manual_seed(0)), input_sums(rows(1, 500, 70), integers)
    )
    low = case.target.floor().clamp(-127, 126)
    best = run_stages(case, 140)
    start = quadratic_form(case.target.round() - case.target, case.hessian).sum()
    assert quadratic_form(low + learn_rounding(case, low, 300) - case.target, case.hessian).sum() < 0.6 * start
    assert quadratic_form(best.values - case.target, case.hessian).sum() < 0.6 * start


def test_compensating_for_input_rounding_pays_on_seen_rows_and_costs_little_on_others():
    weight = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))
    x, other = rows(1, 12), rows(2, 2000)
    qparams = qparams_of(Range(float(other.min()), float(other.max())), ACTIVATION, torch.float32)
    calibration, held_out = (inputs_of(tokens, qparams, ACTIVATION) for tokens in (x, other))
    case = case_of(weight, calibration)
    d = case.target * case.scale[:, None] - weight.double()
    added = [
        (quadratic_form(d, i.gram) - 2 * (weight.double() @ (i.cross - i.gram).T * d).sum(1)).sum()
        for i in (calibration, held_out)
    ]
    assert added[0] < 0
    assert added[1] < 0.25 * error(weight, round_to_nearest(weight), held_out).sum()


def test_gptq_without_inputs_rounds_to_the_nearest():
    weight = weight_of(9)
    assert all(torch.equal(a, b) for a, b in zip(gptq(weight, None), round_to_nearest(weight), strict=True))


@some
@given(seeds)
def test_the_error_is_that_of_the_output_beyond_what_the_input_costs(seed):
    weight, x = weight_of(seed).double(), rows(seed)
    qparams = qparams_of(Range(float(x.min()), float(x.max())), ACTIVATION, torch.float32)
    xq = dequantize(quantize(x, qparams, ACTIVATION), qparams, ACTIVATION).double()
    quantized = round_to_nearest(weight_of(seed))
    v = quantized.weight.double() * quantized.scale.double()[:, None]
    whole = (x.double() @ weight.T - xq @ v.T).square().sum(0)
    own = ((x.double() - xq) @ weight.T).square().sum(0)
    loss = error(weight, quantized, inputs_of(x, qparams, ACTIVATION))
    torch.testing.assert_close(loss, whole - own, rtol=1e-6, atol=1e-9)


def test_directions_that_the_calibration_never_saw_keep_their_weights():
    weight, x = torch.randn(5, 24), rows(1, tokens=4)
    case = case_of(weight, input_sums(x, True))
    moved = case.target * case.scale[:, None] - weight.double()
    qparams = qparams_of(Range(float(x.min()), float(x.max())), ACTIVATION, torch.float32)
    integer_rows = dequantize(quantize(x, qparams, ACTIVATION), qparams, ACTIVATION).double()
    basis = torch.linalg.svd(integer_rows)[2][4:]  # (20, in), orthogonal to every calibration row
    assert moved.abs().max() > 1e-5
    assert (moved @ basis.T).abs().max() < 1e-7


def test_cholesky_damps_singular_matrices_and_refuses_nan():
    flat = torch.ones(6, 6, dtype=torch.float64)
    factor = cholesky(flat - 1e-9 * torch.eye(6))
    assert (factor @ factor.T - flat).abs().max() < 0.1
    with pytest.raises(ValueError, match="NaN or Inf, or is not positive"):
        cholesky(torch.full((3, 3), float("nan")))


@some
@given(seeds)
def test_a_descent_never_raises_the_error(seed):
    case = case_of(weight_of(seed), input_sums(rows(seed), True))
    start = case.target.round()
    most = torch.full_like(start, 127)
    lower = descend(case, start, -most, most, sweeps=1)
    before, after = quadratic_form(start - case.target, case.hessian), quadratic_form(lower - case.target, case.hessian)
    assert bool((after <= before * (1 + 1e-9)).all())


def cosine(weight, quantized, x, qparams, scheme):
    y = x.double() @ weight.double().T
    v = quantized.weight.double() * quantized.scale.double()[:, None]
    yq = dequantize(quantize(x, qparams, scheme), qparams, scheme).double() @ v.T
    return float((y * yq).sum() / y.norm() / yq.norm())


@pytest.mark.parametrize("scheme", [ACTIVATION, SYMMETRIC_ACTIVATION])
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_activation_scale_that_is_far_too_wide_is_lowered(scheme, dtype):
    weight, x = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)), rows(5)
    present = qparams_of(Range(4 * float(x.min()), 4 * float(x.max())), scheme, dtype)  # far too wide
    quantized = round_to_nearest(weight)
    qparams = activation_scale(weight, quantized, x, present, scheme, dtype)
    assert qparams.scale < present.scale
    assert qparams.scale.to(dtype).float() == qparams.scale
    assert cosine(weight, quantized, x, qparams, scheme) > cosine(weight, quantized, x, present, scheme)
    assert float(dequantize(quantize(torch.zeros(1), qparams, scheme), qparams, scheme)) == 0.0


def test_an_activation_of_zeros_keeps_its_scale():
    present = qparams_of(Range(-1.0, 1.0), ACTIVATION, torch.float32)
    weight = torch.randn(3, 4)
    quantized = round_to_nearest(weight)
    assert activation_scale(weight, quantized, torch.zeros(5, 4), present, ACTIVATION, torch.float32) == present


def test_easy_quant_of_weight_and_activation_beats_the_nearest():
    weight, x = torch.randn(8, 24, generator=torch.Generator().manual_seed(0)), rows(5)
    present = qparams_of(Range(2 * float(x.min()), 2 * float(x.max())), ACTIVATION, torch.float16)
    quantized, qparams = easy_quant_pair(weight, x, present, ACTIVATION, torch.float16)
    nearest = round_to_nearest(weight)
    assert cosine(weight, quantized, x, qparams, ACTIVATION) > cosine(weight, nearest, x, present, ACTIVATION)
    assert easy_quant_pair(torch.full((1, 24), 1e-39), x, present, ACTIVATION, torch.float16) is None

"""The sums over an input are those of float64, whether a compiled kernel or torch computes them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from octavo.calibrate.choice import Choice
from octavo.calibrate.layers.inputs import DynamicInput, FloatInput, StaticInput, TimestepInput
from octavo.calibrate.layers.scheme import QParams
from octavo.calibrate.layers.transforms import Multiply
from octavo.calibrate.native import kernels
from octavo.calibrate.replay.current_call import CurrentCall
from octavo.calibrate.rounding.sums import Sums

from ...helpers.examples import examples

TARGETS = list(kernels.targets())
BLOCK, LEVELS = 512, 16383  # as in native/sums.c
compiled = pytest.mark.skipif(not TARGETS, reason="no compiled kernels for this processor")
SIZES = st.tuples(
    st.sampled_from([1, 2, 3, 17, 511, 512, 513, 1100]), st.sampled_from([1, 2, 5, 6, 15, 16, 63, 65, 97, 131, 200])
)


def kernel_sums(target, steps, errors, scale, dtype, threads=1):
    """Returns the gram matrix, only on and above its diagonal, and the residual that the kernel computes."""
    gram, residual = torch.zeros(2, steps.shape[1], steps.shape[1], dtype=dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        kernels.targets()[target].add_sums(steps, errors, scale, gram, residual)
    finally:
        torch.set_num_threads(before)
    return gram.triu(), residual


def bound_of_residual(steps, errors, scale, dtype):
    """Returns the largest difference of the kernel's residual from exact sums: each error is off by at most half a
    level, and a bit more where its quotient in float32 is close to a half; then sums are rounded to `dtype`."""
    bound = torch.zeros(steps.shape[1], steps.shape[1], dtype=torch.float64)
    blocks = list(zip(steps.double().split(BLOCK), errors.double().split(BLOCK), strict=True))
    for rows, some in blocks:
        largest = some.abs().amax(0)
        bound += scale * rows.abs().sum(0)[:, None] * (0.5 / LEVELS + 2.0**-22) * largest
    return bound + len(blocks) * torch.finfo(dtype).eps * scale * (steps.double().abs().T @ errors.double().abs())


def drawn(rows, columns, kind, seed):
    torch.manual_seed(seed)
    steps = torch.randint(-255, 256, (rows, columns)).float()
    errors = torch.rand(rows, columns) - 0.5
    if kind == "largest":
        steps[:], errors[:] = 255, -1
    elif kind == "clipped":
        errors[rows // 2] *= 1000
        errors[:, 0] *= 1e6
    elif kind == "zeros":
        steps[:, 0], errors[:, -1] = 0, 0
    return steps, errors


@compiled
@examples(300, few=60)
@given(
    SIZES,
    st.sampled_from(["plain", "largest", "clipped", "zeros"]),
    st.sampled_from([1e-12, 0.003, 1.0, 700.0]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**31),
)
def test_every_target_sums_products_of_integers(size, kind, scale, dtype, seed):
    steps, errors = drawn(*size, kind, seed)
    errors *= scale
    integers = steps.long()
    exact = (integers.T @ integers).double().triu() * scale**2
    blocks = -(-len(steps) // BLOCK)
    rounding = torch.finfo(dtype).eps * blocks * (steps.double().abs().T @ steps.double().abs()) * scale**2
    residual_bound = bound_of_residual(steps, errors, scale, dtype)
    results = [kernel_sums(target, steps, errors, scale, dtype, threads) for target in TARGETS for threads in (1, 3)]
    for gram, residual in results:
        assert ((gram.double() - exact).abs() <= rounding).all()
        assert ((residual.double() - scale * steps.double().T @ errors.double()).abs() <= residual_bound).all()
        assert torch.equal(gram, results[0][0])
        assert torch.equal(residual, results[0][1])


@compiled
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_an_error_that_is_no_number_spoils_only_its_column(target, number):
    steps, errors = drawn(600, 40, "plain", 0)
    clean = kernel_sums(target, steps, errors, 0.1, torch.float32)
    errors[550, 3] = number
    gram, residual = kernel_sums(target, steps, errors, 0.1, torch.float32)
    assert torch.equal(gram, clean[0])
    others = torch.arange(40) != 3
    assert torch.equal(residual[:, others], clean[1][:, others])
    assert not residual[:, 3].isfinite().any()


STATIC = StaticInput(QParams(torch.tensor(0.02), torch.tensor(-37, dtype=torch.int32)))
TIMESTEP = TimestepInput(
    QParams(torch.tensor([0.01, 0.04]), torch.tensor([-128, 127], dtype=torch.int32)), torch.tensor([0.5])
)
INPUTS = {"static": STATIC, "timestep": TIMESTEP, "dynamic": DynamicInput(), "float": FloatInput()}


def sums_of(layer_input, calls, columns, transform=None):
    current = CurrentCall(torch.nn.Linear(1, 1))
    sums = Sums(Choice(layer_input, transform=transform), current, columns, lambda x: x, squares=True)
    for level, rows in calls:
        current.level = level
        sums.add(rows)
    return sums.inputs


def exact_sums(layer_input, calls, transform=None):
    """Returns the sums of xq xq^T and xq x^T in float64, and the largest sum of products of magnitudes."""
    gram = cross = sizes = 0.0
    for level, rows in calls:
        x = rows if transform is None else transform.input(rows)
        xq = layer_input.represented(x, level).double()
        gram, cross, sizes = gram + xq.T @ xq, cross + xq.T @ x.double(), sizes + xq.abs().T @ xq.abs()
    return gram, cross, float(sizes.max())


@pytest.mark.parametrize("target", [*TARGETS, None])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("columns", [1, 24, 301])
@pytest.mark.parametrize("smoothed", [False, True])
def test_the_sums_of_an_input_are_those_of_float64(monkeypatch, target, name, columns, smoothed):
    monkeypatch.setattr(kernels, "library", lambda: kernels.targets()[target] if target else None)
    torch.manual_seed(0)
    transform = Multiply(torch.rand(columns) + 0.5) if smoothed else None
    # strided rows as `Strided` takes them; many values lie outside of the static ranges
    calls = [(level, torch.randn(2 * count, columns)[::2]) for level, count in ((None, 600), (0.2, 1), (0.9, 33))]
    calls.append((0.2, torch.randn(columns, 40).T))
    found = sums_of(INPUTS[name], calls, columns, transform)
    gram, cross, size = exact_sums(INPUTS[name], calls, transform)
    assert found.tokens == 600 + 1 + 33 + 40
    assert found.gram.dtype == torch.float64
    assert torch.equal(found.gram, found.gram.T)
    assert (found.gram - gram).abs().max() <= 1e-6 * size
    assert (found.cross - cross).abs().max() <= 2e-4 * size
    assert torch.equal(found.gram, sums_of(INPUTS[name], calls, columns, transform).gram)


def test_columns_above_2048_are_summed_in_float32():
    calls = [(None, torch.randn(5, 2050, generator=torch.Generator().manual_seed(0)))]
    found = sums_of(STATIC, calls, 2050)
    gram, cross, size = exact_sums(STATIC, calls)
    assert found.gram.dtype == found.cross.dtype == torch.float32
    assert torch.equal(found.gram, found.gram.T)
    assert (found.gram - gram).abs().max() <= 1e-6 * size
    assert (found.cross - cross).abs().max() <= 2e-4 * size

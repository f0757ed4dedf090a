"""The compiled kernels compute what torch computes, and torch is used where the kernels are missing."""

import math
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import hatch_build
from octavo.calibrate.layers.scheme import ACTIVATION, QParams, codes
from octavo.calibrate.native import kernels
from octavo.calibrate.runtime import cpu
from octavo.calibrate.runtime.attention import CANDIDATES
from octavo.capture.errors import UsageError

TARGETS = list(kernels.targets())
# kernels of attention that this processor runs: a candidate, and the target that computes it
KERNELS = [("integers", target) for target in TARGETS]
KERNELS += [("bfloat16 kernel", target) for target, each in kernels.targets().items() if each.computes_in_bfloat16]
pytestmark = pytest.mark.skipif(not TARGETS and shutil.which("cc") is None, reason="no such processor, or no compiler")


@pytest.fixture
def fresh():
    def forget():
        for function in (kernels.library, kernels.targets, kernels._load):
            function.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture(params=TARGETS)
def target(request, monkeypatch):
    monkeypatch.setattr(kernels, "library", lambda: kernels.targets()[request.param])
    return kernels.targets()[request.param]


@pytest.fixture(params=KERNELS, ids=str)
def attention(request, monkeypatch):
    name, target = request.param
    monkeypatch.setattr(kernels, "library", lambda: kernels.targets()[target])
    return CANDIDATES[name].run


def test_an_installation_has_the_compiled_kernels(fresh):
    assert kernels.library() is not None
    assert all_targets_in(kernels.LIBRARY)


def all_targets_in(library):
    symbols = library.read_bytes()
    return all(f"attention_{target}".encode() in symbols for target in kernels.TARGETS)


@pytest.mark.slow
def test_every_target_is_compiled(tmp_path):
    assert hatch_build.compile_to(kernels.SOURCES, tmp_path / "libkernels.so") == []
    assert set(hatch_build.TARGETS) == set(kernels.TARGETS)
    assert hatch_build.digest(kernels.SOURCES) == kernels.digest(kernels.SOURCES)
    assert all_targets_in(tmp_path / "libkernels.so")


@pytest.mark.parametrize("name", [*TARGETS, "best", "", "none"])
def test_the_environment_chooses_the_target(fresh, monkeypatch, name):
    monkeypatch.setenv("OCTAVO_KERNELS", name)
    chosen = kernels.library()
    if name == "none":
        assert chosen is None
        assert kernels.absence() == "none: OCTAVO_KERNELS is none"
    else:
        assert chosen.target == (name if name in TARGETS else TARGETS[0])


@pytest.mark.parametrize("name", ["sse", *(name for name in kernels.TARGETS if name not in TARGETS)])
def test_a_target_that_cannot_run_is_refused(fresh, monkeypatch, name):
    monkeypatch.setenv("OCTAVO_KERNELS", name)
    with pytest.raises(UsageError, match="Choose one of best, none"):
        kernels.library()


def test_kernels_of_another_source_are_not_used(fresh, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "SOURCES", tmp_path)
    (tmp_path / "codes.c").write_text("int other;")
    assert kernels.library() is None
    assert "Install Octavo again" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a library", None])
def test_an_invalid_library_is_not_used(fresh, tmp_path, monkeypatch, content):
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "libkernels.so")
    if content is not None:
        kernels.LIBRARY.write_bytes(content)
    assert kernels.library() is None


def test_a_compiler_that_fails_leaves_the_old_library(tmp_path, monkeypatch):
    source, library = tmp_path / "native", tmp_path / "libkernels.so"
    source.mkdir()
    (source / "kernels.c").write_text("no C")
    library.write_bytes(b"old")
    with pytest.raises(subprocess.CalledProcessError):
        hatch_build.compile_to(source, library)
    monkeypatch.setenv("CC", "there-is-no-such-compiler")
    with pytest.raises(OSError):
        hatch_build.compile_to(source, library)
    assert library.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["libkernels.so", "native"]


def quantized(target, x, scale, zero_point):
    q = torch.full(x.shape, 77, dtype=torch.uint8)
    target.quantize(x, q, scale, zero_point)
    return q


def wanted(x, scale, zero_point):
    qparams = QParams(torch.tensor(scale), torch.tensor(zero_point))
    return (codes(x, qparams, ACTIVATION) + 128).to(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(TARGETS), st.sampled_from(list(kernels.TYPES)), st.integers(1, 9), st.integers(1, 70))
def test_an_input_is_multiplied_by_the_factors_of_its_channels_as_torch_does(name, dtype, rows, columns):
    torch.manual_seed(rows * columns)
    x, factors = (10 * torch.randn(rows, columns)).to(dtype), torch.rand(columns) + 0.01
    q = torch.full(x.shape, 77, dtype=torch.uint8)
    kernels.targets()[name].quantize(x, q, 0.05, -3, factors)
    assert torch.equal(q, wanted(x * factors.to(dtype), 0.05, -3))


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.0078125, 3e-5, 1e30])
@pytest.mark.parametrize("zero_point", [-128, -127, 0, 127])
def test_all_numbers_of_bfloat16_become_the_codes_of_the_formula(target, scale, zero_point):
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[~x.isnan()]
    assert torch.equal(quantized(target, x, scale, zero_point), wanted(x, scale, zero_point))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TARGETS),
    st.integers(1, 100_000),
    st.floats(2.0**-20, 2.0**20, width=32),
    st.integers(-128, 127),
    st.integers(0, 2**31),
)
def test_any_number_of_floats_becomes_the_codes_of_the_formula(name, count, scale, zero_point, seed):
    torch.manual_seed(seed)
    x = torch.randn(count) * scale * 100
    halves = torch.randint(-300, 300, (count,)) + 0.5
    x = torch.where(torch.rand(count) < 0.3, halves * scale, x)
    x[torch.rand(count) < 0.01] = math.inf
    assert torch.equal(quantized(kernels.targets()[name], x, scale, zero_point), wanted(x, scale, zero_point))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(TARGETS),
    st.sampled_from(list(kernels.TYPES)),
    st.sampled_from([1, 5, 6, 63, 64, 71, 130]),
    st.sampled_from([1, 2, 31, 64, 511, 512, 513, 1100]),
    st.sampled_from([1, 8, 15, 16, 17, 65, 200]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_a_linear_layer_sums_exactly(name, dtype, rows, columns, out, extreme, seed):
    torch.manual_seed(seed)
    codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
    weight = torch.randint(-127, 128, (out, columns), dtype=torch.int8)
    if extreme:
        codes, weight = torch.zeros_like(codes), torch.full_like(weight, -127)
    offset = torch.randint(-(2**20), 2**20, (out,), dtype=torch.int32) if seed % 2 else None
    scale = torch.rand(out) + 0.1
    y = kernels.targets()[name].linear(weight, offset, scale)(codes, dtype)
    sums = (codes.long() - 128) @ weight.long().T + (0 if offset is None else offset.long())
    assert torch.equal(y, (sums.to(torch.int32).float() * scale).to(dtype))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_that_of_torch(target, approximate):
    # whole numbers times 2 ** -9, up to 64 in magnitude
    weight = torch.arange(-127, 128, dtype=torch.int8)[:, None]
    codes, scale = torch.arange(0, 256, dtype=torch.uint8)[:, None], torch.full((255,), 2.0**-8)
    layer = target.linear(weight, None, scale)
    x, y = layer(codes, torch.float32), layer(codes, torch.float32, approximate)
    assert float(x.max()) > 60
    wanted = F.gelu(x.double(), approximate=approximate)
    assert ((y - wanted).abs() <= 2e-7 * x.abs() + 1e-9).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_torch_makes_the_same_codes(target, dtype, monkeypatch):
    torch.manual_seed(0)
    x, qparams = torch.randn(40, 33).to(dtype), QParams(torch.tensor(0.01), torch.tensor(-3))
    ours, torchs = torch.empty(2, 40, 33, dtype=torch.uint8)
    cpu._quantize(ours, x, qparams)
    monkeypatch.setattr(kernels, "library", lambda: None)
    cpu._quantize(torchs, x, qparams)
    assert torch.equal(ours, torchs)


def inputs(rows=300, keys=200):
    torch.manual_seed(0)
    return [torch.randn(2, count, 3, 24).bfloat16().transpose(1, 2) for count in (rows, keys, keys)]


def test_attention_does_not_depend_on_how_tensors_lie_nor_on_threads(attention):
    q, k, v = inputs()
    mask = torch.randn(2, 1, 1, 200).bfloat16()
    whole = attention(q, k, v, mask)
    assert torch.equal(attention(q.contiguous(), k.mT.contiguous().mT, v.flip(0).flip(0), mask), whole)
    assert torch.equal(attention(q, k, v, mask.expand(2, 3, 300, 200).contiguous()), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(attention(q, k, v, mask), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(all(name == "integers" for name, _ in KERNELS), reason="no bfloat16 kernel here")
def test_a_row_that_is_not_a_number_spoils_no_other_in_bfloat16():
    attention = CANDIDATES["bfloat16 kernel"].run
    q, k, v = inputs()
    whole = attention(q, k, v)
    q = q.clone()
    q[0, 1, 7, 5], q[1, 2, 299, 0] = math.nan, math.inf
    y = attention(q, k, v)
    lost = torch.zeros(2, 3, 300, dtype=torch.bool)
    lost[0, 1, 7] = lost[1, 2, 299] = True
    assert y[lost].isnan().all()
    assert torch.equal(y[~lost], whole[~lost])
    v = v.clone()
    v[0, 0, 3, 2] = math.nan
    assert torch.equal(attention(q, k, v)[0, 0, :, 2].isnan(), torch.ones(300, dtype=torch.bool))


def test_keys_that_are_masked_do_not_count_across_pieces(attention):
    q, k, v = inputs(keys=2500)
    mask = torch.rand(300, 2500) > 0.5
    mask[5], mask[6, :2000], mask[7, 100:], mask[8, 1024:2048] = False, False, False, False
    y = attention(q, k, v, mask)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    assert torch.equal(y[:, :, 5], torch.zeros(2, 3, 24).bfloat16())
    assert (y.double() - exact).norm() < 0.004 * exact.norm()


@pytest.mark.parametrize("size", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("large", [1.0, 1e24])
@pytest.mark.parametrize("masked", [False, True])
def test_the_largest_scores_may_come_late(attention, size, large, masked):
    q, k, v = inputs(keys=600)
    k[:, :, 500:] *= size
    v *= large
    mask = (torch.arange(600) > 20).view(1, 1, 1, 600).expand(2, 3, 300, 600) if masked else None
    y = attention(q, k, v, mask)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), mask)
    assert (y.double() - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_error_of_attention_is_that_of_torch(attention, size):
    q, k, v = inputs(500, 1500)
    exact = F.scaled_dot_product_attention(size * q.double(), k.double(), v.double())
    ours, torchs = (f(size * q, k, v).double() - exact for f in (attention, F.scaled_dot_product_attention))
    assert ours.norm() < 1.1 * torchs.norm()

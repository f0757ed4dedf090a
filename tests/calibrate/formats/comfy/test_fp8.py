"""The format comfy in FP8 and MXFP8: what is written, what ComfyUI computes from it, what `octavo inspect` finds."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from octavo.calibrate.formats.comfy.check import check
from octavo.calibrate.formats.comfy.format import describe
from octavo.calibrate.formats.comfy.names import family_of, native_names, together
from octavo.calibrate.formats.comfy.structure import FILES, METADATA
from octavo.calibrate.formats.comfy.write import join, swizzled
from octavo.calibrate.formats.export import export
from octavo.calibrate.formats.linears import dequantized
from octavo.calibrate.layers.modules import QuantizedLayer
from octavo.calibrate.layers.transforms import Rotate
from octavo.calibrate.plan import Plan
from octavo.calibrate.replay.sqnr import Power
from octavo.calibrate.result import Result

from ....helpers.refusals import refused
from ....zoo.comfy_models import MODELS, eager_fp8, in_rows, model
from ....zoo.fp8_layers import fp8_layer, fp8_layers

QKV, FC1 = "joint_blocks.0.x_block.attn.qkv", "joint_blocks.0.x_block.mlp.fc1"
TO_Q = "transformer_blocks.0.attn.to_q"
KINDS = {"W8A8_FP8": "float8_e4m3fn", "W8A8_MXFP8": "mxfp8"}
Tensors, Layers = dict[str, Tensor], dict[str, Any]
Change = Callable[[Tensors, Layers], object]


def exported(folder: Path, module: nn.Module, layers: Mapping[str, QuantizedLayer]) -> Path:
    """Exports `module` with these layers in the format comfy."""
    return export(Result(Plan(()), dict(layers), {}), module, folder, ("comfy",))


def read(folder: Path) -> tuple[Tensors, Layers]:
    """Returns the tensors and the layers of `_quantization_metadata` of the file in `folder`."""
    (path,) = folder.glob("*.safetensors")
    assert path.name in FILES
    with safe_open(path, "pt") as file:
        layers = json.loads(file.metadata()[METADATA])["layers"]
        return {key: file.get_tensor(key) for key in file.keys()}, layers  # noqa: SIM118


def failed(path: Path) -> list[str]:
    return [f"{v.subject}: {v.fact}" for v in check(path) if not v.ok and v.consumer == "ComfyUI"]


def layers_of(module: nn.Module, scheme: str) -> Mapping[str, QuantizedLayer]:
    """Returns layers of this `scheme` for `module`; those that ComfyUI joins have one weight scale."""
    return fp8_layers(module, scheme, together(module))


@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_fp8_has_codes_one_scale_for_each_matrix_and_the_input_scale(tmp_path, name):
    module = model(name, torch.bfloat16)
    layers = layers_of(module, "W8A8_FP8")
    tensors, metadata = read(exported(tmp_path / "out", module, layers))
    for native, row in native_names(module.state_dict(), family_of(module)).items():
        owner, _, leaf = native.rpartition(".")
        members = [layers.get(part.rpartition(".")[0]) for part in row.names]
        if leaf != "weight" or members[0] is None:
            continue
        assert metadata[owner] == {"format": "float8_e4m3fn"}
        assert json.loads(bytes(tensors[f"{owner}.comfy_quant"].tolist())) == metadata[owner]
        assert torch.equal(tensors[native], join([layer.weight.detach() for layer in members], row))
        assert tensors[native].dtype == torch.float8_e4m3fn
        for layer in members:
            assert tensors[f"{owner}.weight_scale"].shape == tensors[f"{owner}.input_scale"].shape == ()
            assert bool((tensors[f"{owner}.weight_scale"] == layer.weight_scale).all())
            assert torch.equal(tensors[f"{owner}.input_scale"], layer.input_scale)
    assert metadata
    assert failed(tmp_path / "out") == []


@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_mxfp8_has_the_scales_in_tiles(tmp_path, name):
    module = model(name, torch.bfloat16)
    layers = layers_of(module, "W8A8_MXFP8")
    tensors, metadata = read(exported(tmp_path / "out", module, layers))
    for native, row in native_names(module.state_dict(), family_of(module)).items():
        owner = native.removesuffix(".weight")
        if owner not in metadata:
            continue
        members = [layers[part.removesuffix(".weight")] for part in row.names]
        codes = join([layer.weight.detach() for layer in members], row)
        scales = join([layer.weight_scale for layer in members], row)
        assert metadata[owner] == {"format": "mxfp8"}
        assert len(tensors[native]) == -(-len(codes) // 32) * 32
        assert torch.equal(tensors[native][: len(codes)], codes)
        assert not tensors[native][len(codes) :].float().any()
        assert torch.equal(in_rows(tensors[f"{owner}.weight_scale"], *scales.shape), scales)
        assert f"{owner}.input_scale" not in tensors
    assert {tensors[f"{owner}.weight_scale"].dtype for owner in metadata} <= {torch.uint8}
    assert bool(metadata) == bool(layers)
    assert not layers or failed(tmp_path / "out") == []


@pytest.mark.parametrize("shape", [(128, 4), (32, 1), (96, 3), (300, 13), (256, 8)])
def test_every_scale_stands_where_cublas_reads_it_and_the_rest_is_zero(shape):
    scales = torch.randint(1, 255, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    stored = swizzled(scales)
    assert stored.shape == (-(-shape[0] // 128) * 128, -(-shape[1] // 4) * 4)
    assert torch.equal(in_rows(stored, *shape), scales)
    assert int((stored != 0).sum()) == scales.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_comfyui_computes_octavos_outputs_bit_for_bit_if_the_input_scale_is_a_power_of_two(dtype):
    linear = nn.Linear(256, 64).to(dtype).requires_grad_(False)
    x = torch.randn(50, 256, generator=torch.Generator().manual_seed(0)).to(dtype) * 2
    exact = nn.functional.linear(x.double(), linear.weight.double(), linear.bias.double())
    for input_scale, equal in ((2.0**-6, True), (0.0117, dtype == torch.float32)):
        layer, theirs, ours = fp8_layer(linear, "W8A8_FP8", input_scale), Power(), Power()
        y = eager_fp8(x, layer.weight, layer.weight_scale[0], layer.input_scale, layer.bias)
        theirs.add(exact, y.double())
        ours.add(exact, layer(x).double())
        assert torch.equal(y, layer(x)) == equal or not equal
        assert abs((ours.sqnr or 0.0) - (theirs.sqnr or 0.0)) < 0.3
    if dtype == torch.bfloat16:
        assert not torch.equal(y, layer(x))


def test_joined_layers_with_scales_of_their_own_are_float_and_say_so(tmp_path, caplog):
    module = model("sd3")
    layers = fp8_layers(module, "W8A8_FP8")
    with caplog.at_level(logging.WARNING):
        tensors, metadata = read(exported(tmp_path / "out", module, layers))
    assert QKV not in metadata
    assert FC1 in metadata
    assert f"{QKV}.weight_scale" not in tensors
    assert sum(QKV in record.getMessage() for record in caplog.records) == 1
    names = next(group for group in together(module) if TO_Q in group)
    assert torch.equal(tensors[f"{QKV}.weight"], torch.cat([dequantized(layers[name]) for name in names]))
    assert failed(tmp_path / "out") == []


@pytest.mark.parametrize("scheme", ["W8A8_FP8", "W8A8_MXFP8"])
def test_a_dequantized_weight_is_near_the_float_weight(scheme):
    linear = nn.Linear(64, 48).requires_grad_(False)
    weight = dequantized(fp8_layer(linear, scheme))
    assert (weight - linear.weight).abs().max() < 0.04 * linear.weight.abs().max()


def test_what_the_format_cannot_hold_is_refused_in_one_line(tmp_path):
    module = model("sd3")
    linear = module.get_submodule(TO_Q)
    for scheme, words in (("W8A8_FP8_DYNAMIC", "scheme is W8A8_FP8_DYNAMIC"), ("W8A16_FP8", "scheme is W8A16_FP8")):
        refused(lambda scheme=scheme: exported(tmp_path / "a", module, {TO_Q: fp8_layer(linear, scheme)}), 2, words)
    layer = fp8_layer(linear, "W8A8_FP8", per_tensor=False)
    refused(lambda: exported(tmp_path / "b", module, {TO_Q: layer}), 2, TO_Q, "--weight-scales tensor")
    rotated = fp8_layer(linear, "W8A8_FP8")
    rotated.rotation = Rotate.by(16).tensors["rotation"]
    refused(lambda: exported(tmp_path / "c", module, {TO_Q: rotated}), 2, TO_Q, "Rotate")


@pytest.mark.parametrize(("scheme", "kind"), KINDS.items())
def test_the_file_is_described_by_its_kind_of_layers(tmp_path, scheme, kind):
    module = model("sd3")
    folder = exported(tmp_path / "out", module, layers_of(module, scheme))
    described = describe(folder)
    assert described.schemes == {kind: len(read(folder)[1])}
    assert dict(described.lines)["layers"] == f"{described.schemes[kind]} {kind}"


@pytest.fixture(scope="module", params=KINDS)
def written(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[str, Path]:
    module = model("sd3")
    folder = tmp_path_factory.mktemp("comfy") / "out"
    return request.param, exported(folder, module, layers_of(module, request.param))


def foreign(folder: Path, target: Path, change: Change, metadata: bool = False) -> Path:
    """Writes a changed copy of the file as another program would, with metadata only where `metadata` is True."""
    tensors, layers = read(folder)
    change(tensors, layers)
    told = {METADATA: json.dumps({"format_version": "1.0", "layers": layers})} if metadata else None
    save_file(tensors, target, told)
    return target


def replaced(leaf: str, change: Callable[[Tensor], Tensor]) -> Change:
    """Returns a change of the tensor `leaf` of FC1."""
    return lambda tensors, layers: tensors.update({f"{FC1}.{leaf}": change(tensors[f"{FC1}.{leaf}"])})


def without(leaf: str) -> Change:
    return lambda tensors, layers: tensors.pop(f"{FC1}.{leaf}")


def marked(**marker: Any) -> Change:
    data = torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)
    return lambda tensors, layers: tensors.update({f"{FC1}.comfy_quant": data})


def nan_code(tensor: Tensor) -> Tensor:
    bits = tensor.view(torch.uint8).clone()
    bits[0, 0] = 0xFF
    return bits.view(tensor.dtype)


BOTH, FP8, MXFP8 = ("W8A8_FP8", "W8A8_MXFP8"), ("W8A8_FP8",), ("W8A8_MXFP8",)
FAULTS: dict[str, tuple[Sequence[str], Change, str]] = {
    "no marker": (BOTH, without("comfy_quant"), "markers: .*without a marker"),
    "another dtype": (BOTH, replaced("weight", lambda t: t.bfloat16()), "markers: .*not float8_e4m3fn"),
    "no weight scale": (BOTH, without("weight_scale"), "scales: .*missing"),
    "a code that is NaN": (BOTH, replaced("weight", nan_code), "codes: .*NaN"),
    "a smoothing multiplier": (
        BOTH, lambda tensors, layers: tensors.update({f"{FC1}.pre_quant_scale": torch.ones(32)}), "left out: .*dropped",
    ),
    "a scale for each row": (FP8, replaced("weight_scale", lambda t: t.expand(9).clone()), "scales: .*one for a whole"),
    "an integer scale": (FP8, replaced("weight_scale", lambda t: t.int()), "scales: .*is int32"),
    "a negative scale": (FP8, replaced("weight_scale", lambda t: -t), "scales: .*not positive"),
    "no input scale": (FP8, without("input_scale"), "input scales: .*silently takes 1"),
    "many input scales": (FP8, replaced("input_scale", lambda t: t.expand(2).clone()), "input scales: .*shape"),
    "an input scale that is NaN": (FP8, replaced("input_scale", lambda t: t * torch.nan), "input scales: .*finite"),
    "a rotation": (FP8, marked(format="float8_e4m3fn", convrot=True), "keys: .*'convrot'"),
    "scales in rows": (MXFP8, replaced("weight_scale", lambda t: in_rows(t, 128, 1)), "scales: .*not in tiles"),
    "scales cut off": (MXFP8, replaced("weight_scale", lambda t: t[:-1].clone()), "scales: .*has shape"),
    "float scales": (MXFP8, replaced("weight_scale", lambda t: t.float()), "scales: .*is float32"),
    "a scale that is no number": (MXFP8, replaced("weight_scale", lambda t: t | 0xFF), "scales: .*not a number"),
    "a width that blocks do not divide": (
        MXFP8, replaced("weight", lambda t: t[:, :31].contiguous()), "scales: .*not a multiple of 32",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("written", "fault"),
    [(scheme, fault) for scheme in KINDS for fault, (schemes, *_) in FAULTS.items() if scheme in schemes],
    indirect=["written"],
)
def test_each_fault_is_a_negative_verdict(tmp_path, written, fault):
    _, change, words = FAULTS[fault]
    _, folder = written
    found = failed(foreign(folder, tmp_path / "a.safetensors", change))
    assert len(found) == 1, found
    pattern = words.split(".*")
    assert all(word in found[0] for word in pattern), found


def old_names(tensors: Tensors, layers: Layers) -> None:
    """Gives scales the names that ComfyUI read before it had markers."""
    for name in list(tensors):
        owner, _, leaf = name.rpartition(".")
        if leaf == "comfy_quant":
            tensors.pop(name)
        elif leaf in ("weight_scale", "input_scale"):
            tensors[f"{owner}.{'_'.join(reversed(leaf.split('_')))}"] = tensors.pop(name)
    tensors["scaled_fp8"] = torch.zeros(1)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, layers: None,
        replaced("input_scale", lambda t: t.view(1)),
        replaced("weight_scale", lambda t: t.bfloat16().view(1)),
        lambda tensors, layers: [
            without("input_scale")(tensors, layers), marked(format="float8_e4m3fn", full_precision_matrix_mult=True)(
                tensors, layers)],
        old_names,
    ],
    ids=["as it is", "an axis", "bfloat16", "inputs stay float", "old names"],
)  # fmt: skip
def test_what_comfyui_loads_in_fp8_is_sound(tmp_path, change):
    module = model("sd3")
    folder = exported(tmp_path / "out", module, layers_of(module, "W8A8_FP8"))
    assert failed(foreign(folder, tmp_path / "a.safetensors", change)) == []


def test_old_names_without_their_flag_are_a_negative_verdict(tmp_path):
    module = model("sd3")
    folder = exported(tmp_path / "out", module, layers_of(module, "W8A8_FP8"))

    def change(tensors: Tensors, layers: Layers) -> None:
        old_names(tensors, layers)
        tensors.pop("scaled_fp8")

    found = failed(foreign(folder, tmp_path / "a.safetensors", change))
    assert any("without a marker" in line for line in found)


def test_scales_of_the_dtype_e8m0_are_read(tmp_path):
    module = model("sd3")
    folder = exported(tmp_path / "out", module, layers_of(module, "W8A8_MXFP8"))
    change = replaced("weight_scale", lambda t: t.view(torch.float8_e8m0fnu))
    assert failed(foreign(folder, tmp_path / "a.safetensors", change)) == []


@pytest.mark.parametrize("rows", [256, 320])
def test_scales_in_rows_are_found_although_their_shape_fits(tmp_path, rows):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.exp2(torch.randint(-2, 3, (rows, 1), generator=generator).float())
    linear = nn.Linear(512, rows, bias=False).requires_grad_(False)
    linear.weight *= sizes * torch.exp2(torch.randint(-2, 3, (1, 16), generator=generator).float()).repeat(1, 32)
    layer = fp8_layer(linear, "W8A8_MXFP8")
    marker = torch.tensor(list(b'{"format": "mxfp8"}'), dtype=torch.uint8)
    tiles, plain = swizzled(layer.weight_scale), torch.zeros_like(swizzled(layer.weight_scale))
    plain[:rows] = layer.weight_scale
    for word, scale in (("tiles", tiles), ("plain", plain)):
        tensors = {"a.weight": layer.weight.detach(), "a.weight_scale": scale, "a.comfy_quant": marker}
        save_file(tensors, tmp_path / f"{word}.safetensors")
    assert failed(tmp_path / "tiles.safetensors") == []
    assert "order of scales: " in failed(tmp_path / "plain.safetensors")[0]

"""A model that diffusers loads from an export has the same integers and outputs, and is saved as the same bytes."""

import copy
import json

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoModel, DiffusionPipeline
from safetensors.torch import load_file, save_file

import octavo
from octavo.calibrate.calibration import calibrate
from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.formats.diffusers.quantizer import adopt
from octavo.calibrate.formats.diffusers.write import write_diffusers
from octavo.calibrate.formats.export import check_rotation, export
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.layers.transforms import Rotate
from octavo.calibrate.replay.hooks import hooked
from octavo.calibrate.replay.sqnr import tensors_in
from octavo.calibrate.settings import Settings
from octavo.calibrate.smoothing import search
from octavo.capture.files import Modes
from octavo.pipelines.load import load_denoiser, load_pipeline
from octavo.pipelines.opensora import STDiT3
from octavo.pipelines.opensora.family import OPENSORA

from ....helpers.refusals import refused
from ....pipelines.opensora.test_transformer import call
from ....zoo.exported_sd3 import TO_Q, WEIGHTS, Exported, exported, integer_layers, load, run
from ....zoo.hard_sd3 import bits, calibrated, hard, prompts, same
from ....zoo.opensora import tiny_transformer
from ....zoo.toy import Call

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INDEX = WEIGHTS + ".index.json"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return exported(tmp_path_factory.mktemp("plain") / "out")


@pytest.mark.parametrize("activations", ["static", "timestep", "dynamic", "float"])
def test_the_integers_are_those_that_were_evaluated_and_those_for_ascend(tmp_path, activations):
    folder, model, result, calls = exported(tmp_path / "out", activations=activations)
    loaded = load(folder)
    here, there = bits(integer_layers(loaded)), bits(result.layers)
    assert {name: tensor.tolist() for name, tensor in here.items()} == {n: t.tolist() for n, t in there.items()}
    ascend = bits(load_ascend(folder))
    assert all(torch.equal(here[name], ascend[name]) for name in here if name.endswith((".weight", ".quant_bias")))
    with quantized(model, result.layers):
        wanted = run(model, calls)
    torch.testing.assert_close(run(loaded, calls), wanted, atol=1e-4, rtol=1e-4)
    octavo.accelerate(loaded, "reference")
    torch.testing.assert_close(run(loaded, calls), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
def test_saving_what_was_loaded_and_ran_gives_the_same_bytes(tmp_path, dtype):
    folder, _, _, calls = exported(tmp_path / "out", dtype, smoothing=True)
    loaded = load(folder)
    assert loaded.dtype == dtype
    run(loaded, calls)
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, tmp_path / "again"))
    assert after.pop("_name_or_path") == str(folder)  # diffusers adds this key to every model it loads
    assert after == before


def test_smoothing_factors_are_folded_into_the_layers_before_where_possible(tmp_path):
    original = exported(tmp_path / "kept", smoothing=True)
    folder, _, result, calls = exported(tmp_path / "out", formats=("diffusers",), smoothing=True, fold=True)
    multiplied, remaining, unfolded = (
        {name for name, layer in layers.items() if layer.mul_scale is not None}
        for layers in (original.result.layers, result.layers, integer_layers(load(original.folder)))
    )
    assert remaining < multiplied == unfolded
    loaded = load(folder)
    assert all(
        torch.equal(layer.weight, original.result.layers[name].weight) for name, layer in integer_layers(loaded).items()
    )
    torch.testing.assert_close(run(loaded, calls), run(load(original.folder), calls), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("activations", ["static", "timestep", "dynamic"])
@pytest.mark.parametrize("smoothing", [False, True])
def test_rotated_layers_are_saved_and_loaded(tmp_path, monkeypatch, activations, smoothing):
    monkeypatch.setattr(search, "_MAX_ERROR_RATIO", 1.5)  # so small a model gains little by a rotation of smooth inputs
    settings = {"activations": activations, "smoothing": smoothing, "rotation": "auto", "weights": ("gptq",)}
    folder, model, result, calls = exported(tmp_path / "out", formats=("diffusers",), fold=True, **settings)
    rotated = {name: Rotate(layer.rotation).size for name, layer in result.layers.items() if layer.rotation is not None}
    assert rotated
    assert set(rotated.values()) <= {16, 64}  # the model is 32 wide, its feed-forwards 128
    assert {row["name"]: row["rotation"] for row in result.report["layers"] if "rotation" in row} == rotated
    assert smoothing == any(layer.mul_scale is not None for layer in result.layers.values())
    loaded = load(folder)
    with quantized(model, result.layers):
        wanted = run(model, calls)
    octavo.accelerate(loaded, "reference")
    torch.testing.assert_close(run(loaded, calls), wanted, atol=0.05 if smoothing else 1e-5, rtol=1e-5)
    assert not [verdict for verdict in format_named("diffusers").check(folder) if not verdict.ok]
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_formats_that_cannot_hold_rotated_layers_refuse_them(tmp_path):
    for name in ("ascend", "torchao"):
        refused(lambda name=name: check_rotation([name], "auto"), 2, "--rotation auto", name, "diffusers")
        refused(lambda name=name: exported(tmp_path / name, formats=(name,), rotation="16"), 2, name, "Rotate")
    check_rotation(["ascend"], "off")
    check_rotation(["diffusers"], "auto")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("activations", ["static", "timestep", "dynamic", "float"])
def test_the_model_that_is_loaded_is_the_one_that_was_measured(tmp_path, activations, dtype):
    measured: list[torch.Tensor] = []
    for folded in (False, True):
        model, calls = hard(dtype=dtype), prompts(2, 2, dtype=dtype)
        with hooked(model, after={"": lambda *arguments: measured.append(arguments[-1][0].clone())}):
            result = calibrated(
                model, calls, smoothing=True, fold=folded, activations=activations, sqnr_calls=len(calls)
            )
        formats = ("diffusers",) if folded else ("ascend", "diffusers")
        folder = export(result, model, tmp_path / str(folded), formats)
        last = torch.cat([output.flatten() for output in measured[-len(calls) :]])  # the integer model runs last
        loaded = load(folder)
        octavo.accelerate(loaded, "reference")
        assert torch.equal(run(loaded, calls), last)
        if not folded:
            with quantized(model, load_ascend(folder)):
                assert torch.equal(run(model, calls), last)


def _adopted(layers):
    model = hard()
    adopt(model, layers)
    return model


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_and_integers_are_exact_whatever_the_dtype_of_the_rest(tmp_path, stored, dtype):
    folder = exported(tmp_path / "out", stored).folder
    loaded, tensors = load(folder, torch_dtype=dtype), load_file(folder / WEIGHTS)
    layers = integer_layers(loaded)
    for name, value in loaded.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        exact = owner in layers and leaf != "bias"
        assert value.dtype == (tensors[name].dtype if exact or not value.is_floating_point() else dtype), name
        assert torch.equal(value, tensors[name].to(value.dtype)), name


def test_several_files_load_and_are_split_the_same_again(tmp_path, plain):
    (tmp_path / "out").mkdir()
    write_diffusers(plain.result.layers, plain.model, tmp_path / "out", Modes(), shard=60_000)
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files.count(WEIGHTS) == 0
    assert len(files) > 3
    loaded = load(tmp_path / "out")
    assert torch.equal(run(loaded, plain.calls), run(load(plain.folder), plain.calls))
    loaded.save_pretrained(tmp_path / "again", max_shard_size=60_000)
    for name in files:
        if name != "config.json":
            assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


@pytest.mark.parametrize("placed", ["auto", "cpu", {"": "cpu"}])
def test_device_maps(plain, placed):
    loaded = load(plain.folder, device_map=placed)
    torch.testing.assert_close(run(loaded, plain.calls), run(load(plain.folder), plain.calls))


def test_moves_copies_and_offloading_change_no_output(plain):
    loaded = load(plain.folder)
    wanted = run(loaded, plain.calls)
    assert torch.equal(run(loaded.to("cpu"), plain.calls), wanted)
    torch.testing.assert_close(run(copy.deepcopy(loaded), plain.calls), wanted)
    cpu_offload(loaded, execution_device=torch.device("cpu"))
    with torch.no_grad():
        for _ in range(2):
            output = torch.cat([loaded(**call.kwargs)[0].flatten() for call in plain.calls])
            torch.testing.assert_close(output, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("activations", ["static", "timestep", "dynamic"])
def test_compiled_models_compute_the_same(tmp_path, activations):
    folder, _, _, calls = exported(tmp_path / "out", activations=activations)
    wanted = run(load(folder), calls)
    compiled = load(folder)
    compiled.compile(backend="eager")
    torch.testing.assert_close(run(compiled, calls), wanted)


def test_automodel_chooses_the_class(plain):
    loaded = AutoModel.from_pretrained(str(plain.folder))
    assert torch.equal(run(loaded, plain.calls), run(load(plain.folder), plain.calls))


def test_a_model_quantized_in_memory_behaves_like_a_loaded_one(tmp_path, plain):
    model = _adopted(plain.result.layers)
    for cast in (
        lambda: model.to(torch.float16),
        model.half,
        model.float,
        lambda: model.to("cpu", dtype=torch.bfloat16),
    ):
        with pytest.raises(ValueError, match="quantized"):
            cast()
    model.save_pretrained(tmp_path / "again")
    for name in (WEIGHTS, "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (plain.folder / name).read_bytes()


def test_loaded_models_refuse_to_be_cast(plain):
    loaded = load(plain.folder)
    with pytest.raises(ValueError, match="quantized"):
        loaded.to(torch.bfloat16)
    with pytest.raises(ValueError, match="quantized"):
        loaded.half()


def test_a_whole_pipeline_is_saved_and_loaded(tiny_model, tmp_path):
    pipe = load_pipeline(tiny_model)
    arguments = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    calls = []
    with pipe.transformer.register_forward_pre_hook(lambda m, a, k: calls.append(Call(a, k)), with_kwargs=True):
        pipe("a red circle", **arguments)
    export(calibrate(pipe.transformer, lambda: calls), pipe.transformer, tmp_path / "out", ("diffusers",))
    quantized_pipe = DiffusionPipeline.from_pretrained(
        tiny_model, transformer=load_denoiser(tmp_path / "out"), text_encoder_3=None, tokenizer_3=None
    )
    quantized_pipe.set_progress_bar_config(disable=True)
    quantized_pipe.save_pretrained(tmp_path / "pipe")
    assert (tmp_path / "pipe" / "transformer" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    again = DiffusionPipeline.from_pretrained(tmp_path / "pipe", text_encoder_3=None, tokenizer_3=None)
    again.set_progress_bar_config(disable=True)
    assert integer_layers(again.transformer)
    pictures = [p("a red circle", generator=torch.manual_seed(0), **arguments)[0] for p in (quantized_pipe, again)]
    torch.testing.assert_close(*pictures, atol=1e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="quantized"):
        again.to(torch.float16)


@pytest.mark.parametrize("activations", ["static", "timestep"])
def test_open_sora_is_exported_and_loaded_with_the_same_integers(tmp_path, activations):
    model = tiny_transformer().requires_grad_(False)
    calls = 2 * [Call(*call(model)), Call(*call(model, (2, 4, 6)))]  # smoothing gains, as no call stands alone
    settings = Settings(
        smoothing=True, activations=activations, groups=OPENSORA.groups, defaults=OPENSORA.keep_float, fold=True,
        sqnr_calls=len(calls),
    )  # fmt: skip
    before, measured = copy.deepcopy(model.state_dict()), list[torch.Tensor]()
    with hooked(model, after={"": lambda *arguments: measured.append(tensors_in(arguments[-1])[0].flatten().clone())}):
        result = calibrate(model, lambda: calls, settings)
    assert same(model.state_dict(), before)
    assert result.parameters  # folded tables, such as scale_shift_table, which belong to no layer
    message = refused(lambda: export(result, model, tmp_path / "no", ("diffusers", "ascend")), 2)
    assert "format ascend: its software loads no float parameters" in message
    assert not (tmp_path / "no").exists()
    export(result, model, tmp_path / "out", ("diffusers",))
    # copies, because torch may round the sums of a float layer in another way if its weights, mapped from a file, are
    # not aligned to 64 bytes
    one, other = (
        copy.deepcopy(loaded) for loaded in (STDiT3.from_pretrained(tmp_path / "out"), load_denoiser(tmp_path / "out"))
    )
    octavo.accelerate(one, "reference")
    assert torch.equal(run(one, calls), torch.cat(measured[-len(calls) :]))
    octavo.accelerate(one)
    assert len(integer_layers(one)) == len(result.layers)
    assert torch.equal(run(one, calls), run(other, calls))
    one.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "out" / WEIGHTS).read_bytes()
    assert one.get_submodule("spatial_blocks.0.attn.qkv").weight.dtype == torch.int8
    assert TO_Q not in dict(one.named_modules())


@pytest.mark.parametrize(
    ("element", "activations", "clamping"),
    [
        *(("fp8", activations, False) for activations in ("static", "timestep", "dynamic", "float")),
        *(("mxfp8", "dynamic", clamping) for clamping in (False, True)),
    ],
)
def test_fp8_layers_are_loaded_as_they_were_measured(tmp_path, element, activations, clamping):
    settings = {"element": element, "activations": activations, "clamping": clamping, "smoothing": True}
    folder, model, result, calls = exported(tmp_path / "out", formats=("diffusers",), **settings)
    loaded = load(folder)
    layers = integer_layers(loaded)
    assert {layer.input_scheme.element.name for layer in layers.values()} == {element}
    assert {layer.input_scheme.clamping for layer in layers.values()} == {clamping}
    here, there = (
        {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in bits(of).items()}
        for of in (layers, result.layers)
    )
    assert {name: tensor.tolist() for name, tensor in here.items()} == {n: t.tolist() for n, t in there.items()}
    with quantized(model, result.layers):
        wanted = run(model, calls)
    torch.testing.assert_close(run(loaded, calls), wanted, atol=1e-4, rtol=1e-4)
    octavo.accelerate(loaded, "reference")
    torch.testing.assert_close(run(loaded, calls), wanted, atol=1e-5, rtol=1e-5)
    assert all(verdict.ok for verdict in format_named("diffusers").check(folder))


def test_codes_that_are_not_numbers_are_found(tmp_path):
    folder, *_ = exported(tmp_path / "out", formats=("diffusers",), element="fp8")
    tensors = load_file(folder / WEIGHTS)
    tensors[f"{TO_Q}.weight"].view(torch.uint8)[0, 0] = 0x7F
    save_file(tensors, folder / WEIGHTS)
    (verdict,) = [verdict for verdict in format_named("diffusers").check(folder) if not verdict.ok]
    assert "NaN" in verdict.fact

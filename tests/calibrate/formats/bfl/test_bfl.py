"""diffusers' own loader reads the format bfl with the codes and scales of the layers, and `octavo inspect` finds what
it would pass over."""

from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import BFLQuantizationConfig
from diffusers.quantizers.bfl.utils import BFLFP8RLinear
from torch import Tensor, nn

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.diffusers.directory import WEIGHT_FILE
from octavo.calibrate.formats.export import check_model, export, kept_float
from octavo.calibrate.formats.inspect import check, sound, views
from octavo.calibrate.formats.linears import dequantized
from octavo.calibrate.layers.modules import QuantizedLinear
from octavo.calibrate.plan import Plan, make_plan
from octavo.calibrate.result import Result

from ....helpers.refusals import refused
from ....zoo.comfy_models import model as model_of
from ....zoo.fp8_layers import fp8_layer
from ....zoo.layer_kinds import changed

SCHEME = "W8A8_FP8_DYNAMIC"


def layers_of(model: nn.Module) -> dict[str, QuantizedLinear]:
    names = make_plan(model, defaults={}).quantized
    kept = kept_float(("bfl",), model, names, SCHEME)
    return {name: fp8_layer(model.get_submodule(name), SCHEME) for name in names if name not in kept}


@pytest.fixture(scope="module")
def flux(tmp_path_factory) -> tuple[nn.Module, dict[str, QuantizedLinear], Path]:
    """Returns a Flux.1 in bfloat16, its layers, and its checkpoint."""
    model = model_of("flux", torch.bfloat16)
    layers = layers_of(model)
    folder = tmp_path_factory.mktemp("bfl") / "out"
    return model, layers, export(Result(Plan(()), dict(layers), {}), model, folder, ("bfl",))


def load(model: nn.Module, folder: Path) -> nn.Module:
    """Loads a checkpoint with the class of `model`, as docs/formats.md says."""
    loaded: nn.Module = type(model).from_single_file(  # type: ignore[attr-defined]
        str(folder / WEIGHT_FILE), config=str(folder), quantization_config=BFLQuantizationConfig()
    )
    return loaded


@pytest.mark.parametrize("name", ["flux", "flux2", "qwen-image", "wan", "sd3", "z-image"])
def test_diffusers_loads_the_codes_and_scales_of_every_layer(tmp_path, name):
    model = model_of(name, torch.bfloat16)
    layers = layers_of(model)
    folder = export(Result(Plan(()), dict(layers), {}), model, tmp_path / "out", ("bfl",))
    loaded = load(model, folder)
    found = {name: module for name, module in loaded.named_modules() if isinstance(module, BFLFP8RLinear)}
    assert found.keys() == layers.keys()
    for each, module in found.items():
        assert torch.equal(module.weight.view(torch.uint8), layers[each].weight.view(torch.uint8))
        assert torch.equal(module.weight_scale, layers[each].weight_scale.view(-1))
    assert loaded.dtype == torch.bfloat16
    floats = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] not in layers}
    theirs = loaded.state_dict()
    assert all(torch.equal(theirs[key].to(value.dtype), value) for key, value in floats.items())


def test_on_a_cpu_a_layer_computes_with_the_dequantized_weight(flux):
    model, layers, folder = flux
    name, layer = next(iter(layers.items()))
    x = torch.randn(3, layer.weight.shape[1], dtype=torch.bfloat16)
    expected = nn.functional.linear(x, dequantized(layer), layer.bias)
    assert torch.equal(load(model, folder).get_submodule(name)(x), expected)


def test_inspect_finds_and_describes_the_checkpoint_and_from_pretrained_refuses_it(flux):
    model, layers, folder = flux
    assert views(folder) == {"bfl": folder}
    assert sound(check(folder), {"bfl"})
    describe = format_named("bfl").describe
    assert describe is not None
    assert describe(folder).schemes == {SCHEME: len(layers)}
    with pytest.raises(TypeError):  # it would take codes for weights without the config
        type(model).from_pretrained(folder)  # type: ignore[attr-defined]


def drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[f"{name}.weight_scale"]


def halve(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].bfloat16()


def negate(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight_scale"] *= -1


def widen(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].bfloat16()


@pytest.mark.parametrize(
    ("change", "words"),
    [(drop, "codes for weights"), (halve, "is bfloat16"), (negate, "not positive"), (widen, "diffusers refuses")],
)
def test_faults_are_found(tmp_path, change, words):
    model = model_of("wan", torch.bfloat16)
    layers = layers_of(model)
    folder = export(Result(Plan(()), dict(layers), {}), model, tmp_path / "out", ("bfl",))
    changed(folder, lambda tensors: change(tensors, next(iter(layers))))
    (bad,) = [v.fact for v in check(folder) if v.consumer == "diffusers (bfl)" and not v.ok]
    assert words in bad


def test_models_that_diffusers_loads_from_no_single_file_are_refused():
    model = diffusers.DiTTransformer2DModel(num_attention_heads=1, attention_head_dim=8, num_layers=1, sample_size=4)
    refused(lambda: check_model(("bfl",), model), 2, "format bfl", "DiTTransformer2DModel", "--format torchao")


def test_the_layer_of_the_first_parameter_stays_float():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert set(kept_float(("bfl",), model, ["0", "1"], SCHEME)) == {"0"}

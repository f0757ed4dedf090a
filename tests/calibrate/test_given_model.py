"""Models that are not what they seem: the integers are those of the model inside, or one line says what to do."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_module
from diffusers import SD3Transformer2DModel
from diffusers.hooks import HookRegistry
from torch import nn

from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.capture.errors import OctavoError
from octavo.capture.listener import Listener

from ..helpers.calibrators import calibrated, data, same
from ..helpers.refusals import refused
from ..zoo.toy import toy
from ..zoo.wrapped import SEEN_THROUGH, Decorated, graph, graph_in_place

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def graphs_of_other_tests_are_gone():
    torch.compiler.reset()


def inner_graph(model: nn.Module) -> nn.Module:
    model.blocks[0] = graph(model.blocks[0])
    return model


def inner_parallel(model: nn.Module) -> nn.Module:
    model.patch = nn.DataParallel(model.patch)
    model.blocks[1] = nn.DataParallel(Listener(model.blocks[1]))
    return model


def inner_graphs_in_place(model: nn.Module) -> nn.Module:
    for block in model.blocks:
        graph_in_place(block)
    return model


WRAPS = SEEN_THROUGH | {
    "Listener": Listener,
    "Listener of DataParallel": lambda model: Listener(nn.DataParallel(model)),
    "compile in place": graph_in_place,
    "compiled blocks": inner_graphs_in_place,
    "a compiled block": inner_graph,
    "a part in DataParallel": inner_parallel,
}


@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_what_is_looked_through_has_the_integers_and_names_of_the_model_inside(wrap, ran, tmp_path):
    model = wrap(toy())
    if ran:
        with torch.no_grad():
            model(**data()[0])
    names, parts = list(model.state_dict()), [(name, id(part)) for name, part in model.named_modules()]
    calibrator = calibrated(model)
    same(calibrator, calibrated(toy()))
    calibrator.export_quant_safetensor(tmp_path)
    description = json.loads((tmp_path / "quant_model_description_w8a8.json").read_text())
    weights = {name for name in description if name.endswith(".weight")}
    assert weights == {name for name in toy().state_dict() if name.endswith(".weight")}
    assert list(model.state_dict()) == names
    assert [(name, id(part)) for name, part in model.named_modules()] == parts


def test_a_child_called_module_is_part_of_the_names():
    calibrator = calibrated(Decorated(toy()))
    assert all(name.startswith("module.blocks.") for name in calibrator.result.layers)


@pytest.mark.parametrize("layer", [nn.Linear(8, 4), nn.Conv2d(3, 4, 3)], ids=lambda layer: type(layer).__name__)
def test_a_model_that_is_a_layer_is_refused_with_what_to_give(layer):
    samples = [{"input": torch.ones(2, 8) if isinstance(layer, nn.Linear) else torch.ones(2, 3, 8, 8)}]
    refused(lambda: calibrated(layer, samples), 2, "a single", "Pass torch.nn.Sequential(layer)")
    assert list(layer.state_dict()) == ["weight", "bias"]
    assert list(calibrated(torch.nn.Sequential(layer), samples).result.layers) == ["0"]


def offloads(folder: Any) -> dict[str, Callable[[nn.Module], Any]]:
    def as_pipelines_do(model: nn.Module) -> None:
        from accelerate import cpu_offload_with_hook

        cpu_offload_with_hook(model, CPU)

    return {
        "cpu_offload": lambda model: cpu_offload(model, CPU),
        "disk_offload": lambda model: disk_offload(model, folder, CPU),
        "buffers too": lambda model: cpu_offload(model, CPU, offload_buffers=True),
        "dispatch_model": lambda model: dispatch_model(model, {"": "cpu"}, "cpu", force_hooks=True),
        "enable_model_cpu_offload": as_pipelines_do,
    }


@pytest.mark.parametrize("how", offloads(None))
def test_a_model_that_accelerate_offloads_is_calibrated_and_stays_offloaded(how, tmp_path):
    model = toy()
    offloads(tmp_path / "weights")[how](model)
    before = [(name, each.device, id(each)) for name, each in model.named_parameters()]
    hooks = [vars(module).get("_hf_hook") for module in model.modules()]
    calibrator = calibrated(model)
    same(calibrator, calibrated(toy()))
    calibrator.export_quant_safetensor(tmp_path / "out")
    assert len(load_ascend(tmp_path / "out")) == 4
    assert [(name, each.device, id(each)) for name, each in model.named_parameters()] == before
    assert [vars(module).get("_hf_hook") for module in model.modules()] == hooks
    with torch.no_grad():
        assert torch.equal(model(**data()[0]), toy()(**data()[0]))
    remove_hook_from_module(model, recurse=True)
    same(calibrated(model), calibrator)


def test_weights_that_nothing_holds_are_refused():
    with torch.device("meta"):
        model = toy()
    refused(lambda: calibrated(model), 2, "is on the meta device", "Load the model again")


def sd3() -> SD3Transformer2DModel:
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=16,
        pos_embed_max_size=8,
    ).eval()  # fmt: skip


def sd3_data() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    drawn = partial(torch.randn, generator=generator)
    return [
        {
            "hidden_states": drawn(1, 4, 8, 8), "encoder_hidden_states": drawn(1, 5, 64),
            "pooled_projections": drawn(1, 16), "timestep": torch.tensor([100.0 * at]), "return_dict": False,
        }
        for at in range(4)
    ]  # fmt: skip


@pytest.mark.parametrize("kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}])
def test_group_offloading_is_refused_with_the_call_that_ends_it(kind):
    model = sd3()
    model.enable_group_offload(CPU, CPU, num_blocks_per_group=1, **kind)
    advice = "HookRegistry.check_if_exists_or_initialize(model).remove_hook('group_offloading')"
    refused(lambda: calibrated(model, sd3_data()), 2, f"diffusers.hooks.{advice}")
    eval(advice, {"HookRegistry": HookRegistry, "model": model})
    same(calibrated(model, sd3_data()), calibrated(sd3(), sd3_data()))


def test_weights_in_files_or_in_another_dtype_between_calls_are_refused(tmp_path):
    model = sd3()
    model.enable_group_offload(CPU, CPU, "leaf_level", offload_to_disk_path=str(tmp_path))
    refused(lambda: calibrated(model, sd3_data()), 2, "group offloading", "to a disk. Load the model again")
    model = sd3()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    refused(lambda: calibrated(model, sd3_data()), 2, "float8_e4m3fn", "without enable_layerwise_casting()")


@pytest.mark.parametrize("adapter", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("disabled", [False, True])
def test_adapters_are_refused_with_the_calls_that_merge_them(adapter, disabled):
    peft = pytest.importorskip("peft")
    config = {
        "lora": lambda: peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False),
        "dora": lambda: peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=["to_q"], feedforward_modules=[], init_ia3_weights=False),
    }[adapter]()
    model = sd3()
    model.add_adapter(config)
    if disabled:
        model.disable_adapters()
    refused(
        lambda: calibrated(model, sd3_data()), 2, "to_q: ", "not fused", "fuse_lora() and unload_lora() of the model"
    )
    model.fuse_lora()
    refused(lambda: calibrated(model, sd3_data()), 2, "fused but not unloaded", "or unload_lora() of the model")
    model.unload_lora()
    assert calibrated(model, sd3_data()).result.layers.keys() == calibrated(sd3(), sd3_data()).result.layers.keys()


def test_models_inside_peft_and_layers_put_in_by_hand_are_refused_with_the_calls_that_end_it():
    peft = pytest.importorskip("peft")
    wrapped = peft.get_peft_model(toy(), peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False))
    refused(lambda: calibrated(wrapped), 2, "Pass model.merge_and_unload()")
    merged = calibrated(wrapped.merge_and_unload())
    assert list(merged.result.layers) == list(calibrated(toy()).result.layers)
    model = toy()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["up"], init_lora_weights=False), model)
    refused(
        lambda: calibrated(model), 2, "Call merge() of each such layer, and replace the layer by its get_base_layer()"
    )
    for block in model.blocks:
        block.up.merge()
        block.up = block.up.get_base_layer()
    assert list(calibrated(model).result.layers) == list(merged.result.layers)


class Packed(nn.Linear):
    """A linear with integers as its weight, as other libraries quantize."""

    def __init__(self) -> None:
        super().__init__(4, 4)
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)


class Foreign(nn.Parameter):
    """A weight of a class of its own, as other libraries quantize."""


def foreign() -> nn.Module:
    layer = nn.Linear(4, 4)
    layer._parameters["weight"] = Foreign(torch.ones(4, 4))
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "integer weight": (lambda: nn.Sequential(nn.Linear(4, 4), Packed()), ("1.weight", "int8", "is already quantized")),
    "foreign weight": (
        lambda: nn.Sequential(nn.Linear(4, 4), foreign()),
        ("1.weight", "is already quantized (a Foreign of float32", "Pass the float model"),
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)), ("0: this LazyLinear", "Call the model once")),
    "torch.jit": (lambda: torch.jit.trace(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)), ("torch.jit",)),
    "float64": (lambda: nn.Sequential(nn.Linear(4, 4)).double(), ("1 layer: float64 weight", "float32")),
    "two reasons": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Bilinear(4, 4, 4)).double(),
        ("2 layers: float64 weight has no integer form; 1 layer: Bilinear has no integer form",),
    ),
    "blocks that stay float": (
        lambda: nn.ModuleDict({"blocks": nn.ModuleList([nn.ModuleDict({"norm1_linear": nn.Linear(4, 4)})])}),
        ("1 layer: diffusers keeps 'norm' out", "List in disable_names"),
    ),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_a_model_with_nothing_to_quantize_says_why(make, words):
    refused(lambda: calibrated(make(), [{"input": torch.ones(2, 4)}]), 2, *words)


@pytest.mark.parametrize("failing", ["call", "numbers", "interrupt", "export"])
def test_a_failure_leaves_the_model_as_it_was(failing, tmp_path):
    model = nn.DataParallel(inner_parallel(toy()).train())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parts = [(name, id(part), part.training) for name, part in model.named_modules()]
    samples = data()
    if failing == "call":
        samples[2]["x"] = torch.ones(1)
    if failing == "numbers":
        samples[3]["x"] = samples[3]["x"] * torch.inf
    with ExitStack() as stack:
        if failing == "interrupt":
            stack.callback(model.module.blocks[1].module.module.down.register_forward_hook(_interrupt).remove)
        with pytest.raises((OctavoError, KeyboardInterrupt)):
            _run_and_export(model, samples, tmp_path)
    assert [(name, id(part), part.training) for name, part in model.named_modules()] == parts
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def _run_and_export(model: nn.Module, samples: list[dict[str, Any]], folder: Any) -> None:
    calibrator = calibrated(model, samples)
    (folder / "file").write_text("")
    calibrator.export_quant_safetensor(folder / "file")

"""The API compatible with msModelSlim has the documented names, order, defaults and meanings."""

import inspect
import json
import re
import stat
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from octavo.calibrate.formats.ascend.checkpoint import Checkpoint
from octavo.calibrate.formats.ascend.read import load_ascend
from octavo.calibrate.msmodelslim_api import Calibrator, QuantConfig

from ..helpers.examples import some_of
from ..helpers.faults import counting, dying, fast_path, in_child
from ..helpers.refusals import refused
from ..zoo.toy import calls, toy

__all__ = ["fast_path"]

MANIFEST = "octavo-quant_model_description_w8a8.manifest"
FILES = ["quant_model_description_w8a8.json", "quant_model_weight_w8a8.safetensors"]
LABEL_FREE = {"act_method": 1, "quant_mode": 1}


def data() -> list[dict]:
    return [{"x": call.args[0], **call.kwargs} for call in calls()]


def calibrated(**config) -> Calibrator:
    calibrator = Calibrator(toy(), QuantConfig(**{**LABEL_FREE, **config}), data())
    calibrator.run()
    return calibrator


def test_names_order_and_defaults_are_the_documented_ones():
    documented = {
        "w_bit": 8, "a_bit": 8, "w_signed": True, "a_signed": False, "w_sym": True, "a_sym": False,
        "input_shape": None, "act_quant": True, "act_method": 0, "quant_mode": 0, "disable_names": None,
        "amp_num": 0, "keep_acc": {"admm": [False, 1000], "easy_quant": [False, 1000], "round_opt": False},
        "sigma": 25, "device": "cpu",
    }  # fmt: skip
    parameters = list(inspect.signature(QuantConfig).parameters)
    assert parameters == list(documented)
    assert {name: getattr(QuantConfig(), name) for name in parameters} == documented
    assert list(inspect.signature(Calibrator).parameters) == ["model", "cfg", "calib_data", "fuse_module_call_back"]
    signature = inspect.signature(Calibrator.export_quant_safetensor)
    assert list(signature.parameters)[1:] == ["output_path", "safetensors_name", "json_name"]


def test_the_documented_recipe(tmp_path):
    config = QuantConfig(
        w_bit=8, a_bit=8, w_signed=True, a_signed=True, w_sym=True, a_sym=False, act_quant=True, act_method=1,
        quant_mode=1, disable_names=None, amp_num=0, keep_acc=None, sigma=25, device="cpu",
    )  # fmt: skip
    model = toy()
    untouched = toy()
    calibrator = Calibrator(model, config, data())
    calibrator.run()
    calibrator.export_quant_safetensor(str(tmp_path / "out") + "/")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MANIFEST, *FILES]
    assert stat.S_IMODE((tmp_path / "out" / FILES[1]).stat().st_mode) == 0o400
    assert set(load_ascend(tmp_path / "out")) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}
    for (name, one), other in zip(model.state_dict().items(), untouched.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert [type(module) for module in model.modules()] == [type(module) for module in untouched.modules()]


def test_lists_tuples_and_dicts_with_anything_inside_are_the_same_samples():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, none=None, flag=True, number=1, nested=None):
            return self.layer(x * number) + nested["deep"]["y"][0]

    x = torch.randn(3, 4)
    nested = {"deep": {"y": [x, None, 3]}}
    params = []
    for sample in ({"x": x, "number": 2, "nested": nested}, [x, None, True, 2, nested], (x, None, False, 2, nested)):
        calibrator = Calibrator(Nested(), QuantConfig(**LABEL_FREE), [sample])
        calibrator.run()
        params.append(calibrator.get_quant_params()[0]["layer"])
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[0], params[2])


@pytest.mark.parametrize(
    ("config", "observer"),
    [
        ({"act_method": 0}, "minmax"),
        ({"act_method": 1}, "sigma"),
        ({"act_method": 1, "sigma": 0}, "minmax"),
        ({"act_method": 2}, "mse"),
    ],
)
def test_act_method_chooses_the_observer(config, observer):
    calibrator = calibrated(**config)
    assert calibrator.result.report["settings"]["observer"] == observer


def test_quant_params_are_those_exported(tmp_path):
    calibrator = calibrated(a_sym=True, disable_names=["patch", "proj_out"])
    calibrator.export_quant_safetensor(tmp_path)
    input_scale, input_offset, weight_scale, weight_offset, weight = calibrator.get_quant_params()
    tensors = load_file(tmp_path / FILES[1])
    assert set(input_scale) == {"blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"}
    for name in input_scale:
        assert torch.equal(input_scale[name], tensors[f"{name}.input_scale"])
        assert torch.equal(input_offset[name].float(), tensors[f"{name}.input_offset"])
        assert input_offset[name] == 0
        assert torch.equal(weight_scale[name], tensors[f"{name}.weight_scale"])
        assert torch.equal(weight_offset[name], tensors[f"{name}.weight_offset"])
        assert torch.equal(weight[name], tensors[f"{name}.weight"])


def test_names_that_are_disabled_stay_float_and_all_others_do_not():
    calibrator = calibrated(disable_names=["blocks.0.up"])
    assert set(calibrator.result.layers) == {"patch", "blocks.0.down", "blocks.1.up", "blocks.1.down", "proj_out"}
    refused(
        lambda: calibrated(disable_names=["norm_out"]),
        2,
        re.compile(r"disable_names: 'norm_out' matches no layer. The nearest name is '\w+'"),
    )
    refused(lambda: calibrated(disable_names=["*"]), 2, "disable_names: no layer is left")


def test_weights_alone_need_no_data(tmp_path):
    calibrator = Calibrator(toy(), QuantConfig(act_quant=False))
    calibrator.run()
    calibrator.export_quant_safetensor(tmp_path)
    assert (tmp_path / "quant_model_description_w8a16.json").exists()
    assert set(calibrator.get_quant_params()[0].values()) == {None}


def test_without_data_an_input_is_synthesized_the_same_twice():
    params = []
    for _ in range(2):
        calibrator = Calibrator(toy(), QuantConfig(input_shape=[1, 3, 4, 4]))
        calibrator.run()
        params.append(calibrator.get_quant_params()[0])
    assert params[0] == params[1]
    refused(lambda: Calibrator(toy(), QuantConfig()), 2, "calib_data: there are no samples")


@pytest.mark.parametrize(
    ("config", "fact"),
    [
        ({"w_bit": 4}, "w_bit: 4 is not supported. Set it to 8"),
        ({"a_bit": True}, "a_bit: True is not supported. Set it to 8"),
        ({"a_sym": "yes"}, "a_sym: 'yes'"),
        ({"act_method": 3}, "act_method: 3 is outside 0 to 2"),
        ({"quant_mode": 2}, "quant_mode: 2 is outside 0 to 1"),
        ({"quant_mode": "1"}, "quant_mode: '1' is not a whole number"),
        ({"amp_num": -1}, "amp_num: -1 is less than 0"),
        ({"sigma": 101}, "sigma: 101 is outside 0 to 100"),
        ({"sigma": "1e-3"}, "sigma: '1e-3' is not a number"),
        ({"disable_names": "proj_out"}, "disable_names: 'proj_out' is not a list of str"),
        ({"disable_names": [1]}, "disable_names"),
        ({"input_shape": [1, 2.5]}, "input_shape"),
        ({"keep_acc": {"admm": [False]}}, r"keep_acc: 'admm' is [False]. Set it to [switch, iterations]"),
        ({"keep_acc": {"round_opt": [False]}}, "keep_acc: 'round_opt'"),
        ({"keep_acc": {"adm": [False, 1]}}, "keep_acc"),
        ({"device": "tpu"}, "device: 'tpu' is unknown"),
    ],
)
def test_values_without_meaning(config, fact):
    refused(lambda: QuantConfig(**config), 2, fact)


@pytest.mark.parametrize(
    "config",
    [
        {"w_sym": False},
        {"w_signed": False},
    ],
)
def test_unsupported_weight_settings_are_refused(config):
    with pytest.raises(NotImplementedError, match="can only be symmetric int8") as caught:
        Calibrator(toy(), QuantConfig(**LABEL_FREE, **config), data())
    assert "\n" not in str(caught.value)


def test_more_fallbacks_than_layers():
    refused(
        lambda: Calibrator(toy(), QuantConfig(**LABEL_FREE, amp_num=100), data()),
        2,
        "amp_num 100: the model has only 7 quantizable layers",
    )


@pytest.mark.parametrize(
    ("value", "kind"), [(torch.zeros(3), "Tensor"), ({"x": 1}, "dict"), ("a.pth", "str"), (7, "int")]
)
def test_data_that_are_no_list(value, kind):
    refused(
        lambda: Calibrator(toy(), QuantConfig(**LABEL_FREE), value),
        3,
        f"expected a list of samples, found {kind}",
    )


def test_devices_that_are_not_there():
    for device, fact in (("npu", "device npu: torch_npu is not installed"), ("cuda", "device cuda")):
        refused(partial(Calibrator, toy(), QuantConfig(device=device), data()), 7, fact)


def test_exporting_before_calibrating(tmp_path):
    calibrator = Calibrator(toy(), QuantConfig(**LABEL_FREE), data())
    refused(lambda: calibrator.export_quant_safetensor(tmp_path), 2, "Call run() first")


def test_other_names_and_files_of_the_user_s(tmp_path):
    calibrator = calibrated()
    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):  # the second export replaces files of mode 0400
        calibrator.export_quant_safetensor(tmp_path, "weights_0.safetensors", "description_0.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.json", "description_0.json", "octavo-description_0.manifest", "weights_0.safetensors"
    ]  # fmt: skip
    assert Checkpoint(tmp_path, ("weights_0.safetensors", "description_0.json")).layer_names
    for name in ("../x.safetensors", "x.bin", "a/b.safetensors"):
        refused(partial(calibrator.export_quant_safetensor, tmp_path, name), 2, "not a file name")
    (tmp_path / "file").write_text("")
    refused(lambda: calibrator.export_quant_safetensor(tmp_path / "file"), 5, "not a directory")


@pytest.mark.parametrize("foreign", [False, True])
def test_a_kill_at_any_system_call_leaves_no_mixture_of_checkpoints(foreign, fast_path):
    one, other = calibrated(), calibrated(a_sym=True)
    folder = fast_path / "out"

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name in FILES}

    def fresh() -> None:
        one.export_quant_safetensor(folder)
        if foreign:
            (folder / "config.json").write_text("{}")

    other.export_quant_safetensor(folder)
    new = content()
    fresh()
    old = content()
    with counting() as counter:
        other.export_quant_safetensor(folder)
    for index in some_of(len(counter.names)):
        fresh()

        def work(index: int = index) -> None:
            with counting(index, dying):
                other.export_quant_safetensor(folder)

        assert in_child(work) == 9
        assert content() in (old, new) or (foreign and FILES[0] not in content())
        assert (folder / "config.json").exists() == foreign
        other.export_quant_safetensor(folder)  # removes the files that the killed export left
        assert not list(fast_path.rglob(".*"))
    assert json.loads(new[FILES[0]])["model_quant_type"] == "W8A8"


def test_the_fuse_callback_is_called_once(tmp_path: Path):
    models = []
    Calibrator(toy(), QuantConfig(**LABEL_FREE), data(), models.append)
    assert len(models) == 1


def test_the_public_names_are_these():
    import octavo

    assert octavo.Calibrator is Calibrator
    assert octavo.QuantConfig is QuantConfig


def test_accuracy_methods_and_layers_that_fall_back_reach_the_checkpoint(tmp_path):
    methods = {"admm": [True, 20], "easy_quant": [True, 20], "round_opt": True}
    calibrator = calibrated(keep_acc=methods, amp_num=2)
    calibrator.export_quant_safetensor(tmp_path)
    report = calibrator.result.report
    assert report["settings"]["weights"] == ["admm", "easy-quant", "adaround"]
    assert report["settings"]["iterations"] == {"admm": 20, "easy-quant": 20}
    assert {row["weights"] for row in report["layers"] if row["scheme"]} & {"admm", "easy-quant", "adaround"}
    fallen = [row["name"] for row in report["layers"] if "largest output error" in (row["reason"] or "")]
    assert len(fallen) == 2
    description = json.loads((tmp_path / FILES[0]).read_text())
    assert all(description[f"{name}.weight"] == "FLOAT" for name in fallen)
    loaded = load_ascend(tmp_path)
    weights = calibrator.get_quant_params()[-1]
    assert set(loaded) == set(weights)
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in loaded.items())


@pytest.mark.parametrize("method", ["admm", "easy_quant"])
def test_a_method_that_is_switched_off_changes_nothing(method):
    off = calibrated(keep_acc={method: [False, 20], "round_opt": False}).get_quant_params()[-1]
    plain = calibrated(keep_acc=None).get_quant_params()[-1]
    assert all(torch.equal(off[name], plain[name]) for name in plain)

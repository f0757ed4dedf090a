"""Checks that `octavo calibrate` of several denoisers keeps finished ones for the next run, and replaces OUT only at
the end."""

import pytest
from safetensors.torch import load_file, save_file

from octavo.capture.locks import lock

from ...helpers.commands import octavo
from ...helpers.ranked import ranked
from ...zoo.whole_wan import WAN, whole_wan

NAMES = ["transformer", "transformer_2"]


@pytest.fixture(scope="module")
def captured(tmp_path_factory):
    """Captures both denoisers of a model that only these tests use."""
    folder = tmp_path_factory.mktemp("wan")
    octavo("capture", whole_wan(folder / "model"), folder / "captured", *WAN, "--steps", 4, "--device", "cpu")
    return folder / "captured"


@pytest.fixture
def weights_of_second(captured):
    """Yields two functions that write weights of the second denoiser: the captured ones, and others, which calibrate
    refuses."""
    file = captured.parent / "model" / "transformer_2" / "diffusion_pytorch_model.safetensors"
    before, tensors = file.read_bytes(), load_file(file)
    other = tensors | {"proj_out.bias": tensors["proj_out.bias"] + 1}
    yield lambda: file.write_bytes(before), lambda: save_file(other, file, metadata={"format": "pt"})
    file.write_bytes(before)


def calibrate(captured, out, *more, code=0):
    return octavo("calibrate", captured, out, "--accuracy", "plain", "--device", "cpu", *more, code=code)


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def layers(out, name):
    return (out / name / "quant_model_weight_w8a8.safetensors").read_bytes()


def test_a_finished_denoiser_outlives_the_failure_of_the_next(captured, weights_of_second, tmp_path):
    out, (captured_ones, others) = tmp_path / "o", weights_of_second
    others()
    output = calibrate(captured, out, code=4)
    (parts,) = tmp_path.iterdir()
    assert parts.name.startswith("o.unfinished-")
    assert names(parts) == ["transformer"]
    assert f"{parts}: holds transformer, already calibrated. Run the same command again to continue." in output
    directory_lock = lock(parts)
    assert f"{parts}: in use by pid" in calibrate(captured, out, code=5)
    directory_lock.release()
    captured_ones()
    output = calibrate(captured, out, "--memory", "1GiB")
    assert "transformer, which an earlier run finished." in output
    assert output.count("layers in 8-bit integers") == 1
    assert names(tmp_path) == ["o"]
    assert names(out) == NAMES

    old = contents(out)
    others()
    output = calibrate(captured, out, "--overwrite", "--symmetric", code=4)
    assert "an earlier run" not in output
    assert contents(out) == old, "an old checkpoint was changed before all denoisers were done anew"


def test_a_run_that_fails_in_the_first_denoiser_leaves_nothing(captured, tmp_path):
    calibrate(captured, tmp_path / "o", "--keep-float", "nothing", code=2)
    assert names(tmp_path) == []


def test_several_ranks_write_what_one_process_does_and_go_on_after_a_failure(captured, weights_of_second, tmp_path):
    options, (captured_ones, others) = ("calibrate", captured, tmp_path / "o", "--accuracy", "plain"), weights_of_second
    others()
    ended = ranked(2, tmp_path / "said", *options)
    assert [rank.code for rank in ended] == [4, 4]
    captured_ones()
    ended = ranked(2, tmp_path / "said", *options)
    assert [rank.code for rank in ended] == [0, 0], ended
    assert "transformer, which an earlier run finished." in ended[0].output
    calibrate(captured, tmp_path / "one")
    assert names(tmp_path) == ["o", "one", "said"]
    assert [layers(tmp_path / "o", name) for name in NAMES] == [layers(tmp_path / "one", name) for name in NAMES]

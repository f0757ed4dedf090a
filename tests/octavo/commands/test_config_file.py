"""Checks how options are read from a TOML file, and that mistakes name the file, the option and the value."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from octavo.capture.errors import OctavoError
from octavo.cli import configurable
from octavo.commands.calibrate_options import CalibrateOptions
from octavo.commands.config_file import options_by_name, read_config
from octavo.declarations import parameters_of

from ...helpers.commands import octavo


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.toml"

    def write(text: str | bytes):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def refused(path) -> tuple[str, int]:
    with pytest.raises(OctavoError) as caught:
        read_config(path)
    assert "\n" not in str(caught.value)
    return str(caught.value), caught.value.exit_code


def test_all_kinds_of_values(config):
    path = config('observer = "mse"\nsigma = 3\nkeep-float = ["a.*"]\nsamples = 5\noverwrite = true\nquantize = "b"\n')
    assert read_config(path) == {
        "observer": "mse", "sigma": 3.0, "keep_float": ("a.*",), "samples": 5, "overwrite": True, "quantize_too": ("b",)
    }  # fmt: skip
    assert read_config(config("")) == {}


def test_an_unknown_option_names_the_nearest(config):
    path = config("keep_flot = ['a']")
    assert refused(path) == (f"{path}: unknown option 'keep_flot'; did you mean 'keep_float'?", 2)
    text, _ = refused(config("zzz = 1"))
    assert all(name in text for name in options_by_name(parameters_of(CalibrateOptions)))


def test_an_option_given_twice_has_its_line(config):
    text, code = refused(config("sigma = 1\nsigma = 2\n"))
    assert "line 2" in text
    assert code == 2
    assert "given twice" in refused(config("keep_float = []\nkeep-float = []\n"))[0]


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ('sigma = "1e-3"', "sigma: '1e-3' is not a number"),
        ("sigma = true", "sigma: True is not a number"),
        ("sigma = 101", "sigma: 101 is outside 0 to 100"),
        ("sigma = -0.5", "sigma: -0.5 is outside 0 to 100"),
        ("sigma = nan", "sigma: nan is outside 0 to 100"),
        ("samples = 0", "samples: 0 is not in the range x>=1"),
        ("samples = 1.5", "samples: 1.5 is not a whole number"),
        ("overwrite = 1", "overwrite: 1 is not true or false"),
        ("keep_float = [1]", "keep_float: [1] is not a list of strings"),
        ("observer = 'minmx'", "observer: 'minmx' is not one of 'minmax', 'sigma', 'percentile', 'mse'"),
        ("dtype = 'int8'", "dtype: 'int8' is not one of 'float32', 'float16', 'bfloat16'"),
        ("device = 3", "device: 3 is not a string"),
        ("[table]\na = 1", "unknown option 'table'"),
        ("observer = minmax", "not valid TOML"),
    ],
)
def test_values_of_another_kind_name_file_option_and_value(config, line, fact):
    path = config(line)
    text, code = refused(path)
    assert text.startswith(f"{path}: ")
    assert fact in text
    assert code == 2


def test_files_that_are_no_text(config, tmp_path):
    assert "not UTF-8" in refused(config(b"\xff\xfe"))[0]
    assert refused(tmp_path / "missing.toml")[1] == 2
    assert refused(tmp_path)[1] == 3


@pytest.mark.parametrize(
    ("text", "code", "fact"),
    [
        ("observers = 1", 2, "unknown option 'observers'; did you mean 'observer'?"),
        ("sigma = nan", 2, "sigma: nan is outside 0 to 100"),
        (None, 2, ": no such file"),
    ],
)
def test_a_command_ends_with_the_line_and_the_code_of_its_file(config, tmp_path, text, code, fact):
    path = tmp_path / "missing.toml" if text is None else config(text)
    lines = octavo("calibrate", "captured", "out", "--config", path, code=code).splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"Error: {path}: ")
    assert fact in lines[0]


def test_the_command_line_wins_over_the_file(config):
    values = {}
    parameters = configurable(parameters_of(CalibrateOptions))
    command = click.Command("calibrate", params=parameters, callback=lambda **options: values.update(options))
    path = config('weights = "gptq"\nsmoothing = false\nsamples = 3\noverwrite = true\nimages = "pictures"')
    words = ["captured", "out", "--samples", "5", "--smoothing", "--config", str(path)]
    assert CliRunner().invoke(command, words).exit_code == 0
    options = CalibrateOptions(**values)
    assert (options.samples, options.smoothing) == (5, True)
    assert (options.weights, options.overwrite, options.images) == (("gptq",), True, Path("pictures"))

"""Checks that the archives install only the package octavo, so that a user's folders may have any name."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from octavo import __version__

ROOT = Path(__file__).parent.parent
SCRIPT = """
import torch
from octavo import Calibrator, Listener, QuantConfig
from octavo.capture import Capture
import capture, pipelines, prompts  # the folder's own

assert capture.MINE and pipelines.MINE and prompts.MINE
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.GELU(), torch.nn.Linear(8, 4))
with Listener(model, "captured"):
    model(torch.randn(2, 4))
calls = [call.kwargs for call in Capture.open("captured").calls()]
calibrator = Calibrator(model, QuantConfig(act_method=1, quant_mode=1, disable_names=[]), calls)
calibrator.run()
calibrator.export_quant_safetensor("out")
print(len(calibrator.result.layers))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=cwd, env=os.environ | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Builds the wheel and the sdist of this checkout."""
    folder = tmp_path_factory.mktemp("archives")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-t", "wheel", "-d", folder, cwd=ROOT)
    return folder


@pytest.fixture(scope="module")
def installed(archives: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the python of an environment that holds only the wheel."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    (wheel,) = archives.glob("*.whl")
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=folder)
    return python


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """Writes a folder whose modules have the names of folders of this project."""
    for name in ("pipelines/__init__.py", "prompts/__init__.py", "capture.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("MINE = True\n")
    (tmp_path / "calibrate.py").write_text(SCRIPT)
    return tmp_path


def listed(archive: Path) -> list[str]:
    """Returns the paths in a wheel or an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.namelist()
    with tarfile.open(archive) as sdist:
        return sdist.getnames()


def modules(names: list[str]) -> set[str]:
    """Returns the Python files among the paths of an archive, from `octavo/` on."""
    return {name[name.index("octavo/") :] for name in names if name.endswith(".py") and "octavo/" in name}


def test_archives_hold_every_module_once_and_only_below_octavo(archives):
    (wheel,), (sdist,) = archives.glob("*.whl"), archives.glob("*.tar.gz")
    names = listed(wheel)
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"octavo", wheel.name.split("-py3")[0] + ".dist-info"}
    source = listed(sdist)
    assert len(source) == len(set(source))
    inside = [name.split("/", 1)[1] for name in source]
    assert not {"capture", "calibrate", "pipelines", "prompts"} & {name.split("/")[0] for name in inside}
    assert not [name for name in inside if name.endswith((".so", ".pyc"))]
    wanted = {
        str(Path(folder, name).relative_to(ROOT))
        for folder, _, files in os.walk(ROOT / "octavo", followlinks=True)
        for name in files
        if name.endswith(".py")
    }
    assert modules(names) == wanted == modules([name for name in inside if name.startswith("octavo/")])


@pytest.mark.slow
def test_a_wheel_of_the_sdist_is_the_wheel_of_the_checkout(archives, tmp_path):
    (wheel,), (sdist,) = archives.glob("*.whl"), archives.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "again", cwd=source)
    (again,) = (tmp_path / "again").glob("*.whl")
    assert sorted(listed(again)) == sorted(listed(wheel))


def test_octavo_imports_where_nothing_else_is_installed(installed, tmp_path):
    code = "import octavo, octavo.capture, octavo.calibrate; print(octavo.__file__)"
    assert str(installed.parent.parent) in run(installed, "-c", code, cwd=tmp_path)


def test_names_of_a_users_modules_do_not_matter(installed, crowded):
    libraries = sysconfig.get_path("purelib")
    assert run(installed, "calibrate.py", cwd=crowded, PYTHONPATH=libraries) == "2"
    assert (crowded / "out" / "quant_model_weight_w8a8.safetensors").is_file()


@pytest.mark.parametrize("start", [("-m", "octavo"), ("-m", "torch.distributed.run", "-m", "octavo")])
def test_commands_start_in_such_a_folder(installed, crowded, start):
    shown = run(installed, *start, "--version", cwd=crowded, PYTHONPATH=sysconfig.get_path("purelib"))
    assert shown == f"octavo, version {__version__}"

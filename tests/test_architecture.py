"""The rooms import one way, and the front door opens fast."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("octavo", "capture", "prompts", "pipelines", "calibrate")
MAY = {
    "capture": set(),
    "prompts": set(),
    "pipelines": set(),
    "calibrate": {"capture"},
    "octavo": {"capture", "prompts", "pipelines", "calibrate"},
}


def imported(file: Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0], node.level


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_one_way_and_relatively_inside(room):
    files = list((ROOT / room).rglob("*.py"))
    assert files
    for file in files:
        for name, level in imported(file):
            if level == 0 and name in ROOMS:
                assert name in MAY[room], f"{file.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize(
    "module", ["octavo", "octavo.cli", "octavo.prompts", "octavo.capture.files", "octavo.pipelines.demo.judge"]
)
def test_importing_a_light_module_leaves_torch_alone(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'transformers'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_is_longer_than_400_lines():
    long = [
        f
        for room in (*ROOMS, "tests", "bench")
        for f in (ROOT / room).rglob("*.py")
        if len(f.read_text().splitlines()) > 400
    ]
    assert not long


def test_public_names():
    import octavo

    for name in octavo.__all__:
        assert getattr(octavo, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute"):
        octavo.nothing  # noqa: B018

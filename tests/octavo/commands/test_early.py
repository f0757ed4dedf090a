"""Checks that mistakes in options and paths are refused without importing torch, and that a missing path has exit code
2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ...helpers.commands import errors, octavo

ROOT = Path(__file__).parents[3]
MISSING = {
    "capture's model": ("capture", "{none}", "{new}"),
    "capture's prompts": ("capture", "demo", "{new}", "--prompts", "{none}"),
    "capture's text encoder": ("capture", "demo", "{new}", "--text-encoder", "{none}"),
    "calibrate's capture": ("calibrate", "{none}", "{new}"),
    "calibrate's model": ("calibrate", "{here}", "{new}", "--model", "{none}"),
    "calibrate's config": ("calibrate", "{here}", "{new}", "--config", "{none}"),
    "calibrate-cnn's model": ("calibrate-cnn", "{none}", "{new}", "--input-shape", "1,3,8,8"),
    "calibrate-cnn's pictures": ("calibrate-cnn", "digits", "{new}", "--images", "{none}"),
    "inspect's": ("inspect", "{none}"),
    "generate's model": ("generate", "{none}", "a ring", "-o", "{new}.png"),
    "generate's pipeline": ("generate", "demo-int8", "a ring", "-o", "{new}.png", "--model", "{none}"),
    "compare's model": ("compare", "{none}", "{here}"),
    "compare's checkpoint": ("compare", "demo", "{none}"),
    "compare's prompts": ("compare", "demo", "demo-int8", "--prompts", "{none}"),
    "convert-pth's file": ("convert-pth", "{none}", "{new}"),
}
TYPOS = {
    "a name": ("accuracyy = 'fast'", "did you mean 'accuracy'?"),
    "a word": ("accuracy = 'fats'", "'fats' is not one of"),
    "a format": ("format = 'ascnd'", "there is no format 'ascnd'. Choose one of ascend"),
    "a size": ("max-shard-size = '5 parsecs'", "'5 parsecs' is not a size"),
    "the memory": ("memory = '16GX'", "'16GX' is not a size"),
}


def arguments(words: tuple[str, ...], folder: Path) -> list[str]:
    return [word.format(none=folder / "none", new=folder / "new", here=folder) for word in words]


@pytest.mark.parametrize("case", MISSING)
def test_a_missing_path_is_named_with_exit_code_2(tmp_path: Path, case: str) -> None:
    output = octavo(*arguments(MISSING[case], tmp_path), code=2)
    (line,) = errors(output)
    assert line.startswith(f"Error: {tmp_path / 'none'}: no such ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", TYPOS)
def test_a_typo_in_a_config_file_is_named(tmp_path: Path, case: str) -> None:
    content, words = TYPOS[case]
    (tmp_path / "config.toml").write_text(content)
    output = octavo("calibrate", tmp_path, tmp_path / "out", "--config", tmp_path / "config.toml", code=2)
    assert words in output


def test_refusals_version_and_help_import_no_torch(tmp_path: Path) -> None:
    commands = [arguments(words, tmp_path) for words in MISSING.values()]
    for number, (content, _) in enumerate(TYPOS.values()):
        (tmp_path / f"{number}.toml").write_text(content)
        commands.append(["calibrate", str(tmp_path), str(tmp_path / "o"), "--config", str(tmp_path / f"{number}.toml")])
    commands += [["--version"], ["--help"], ["calibrate", "--help-all"]]
    code = (
        "import contextlib, json, sys\nfrom octavo.cli import main\n"
        "for command in json.loads(sys.argv[1]):\n"
        "    with contextlib.suppress(SystemExit):\n        main(command)\n"
        "    assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), command\n"
    )
    done = subprocess.run([sys.executable, "-c", code, json.dumps(commands)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr

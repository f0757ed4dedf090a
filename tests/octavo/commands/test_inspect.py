"""Checks that `octavo inspect` reads every kind of directory without importing torch."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.formats.export import export
from octavo.calibrate.replay.user_data import Sample
from octavo.calibrate.settings import Settings

from ...helpers.stores import make_store
from ...zoo.convolutions import small
from ...zoo.exported_sd3 import exported
from ...zoo.layer_kinds import TimedToy, layers_of, written

ROOT = Path(__file__).parents[3]
MIXTURE = {"patch": "W8A8", "up": "W8A8_TIMESTEP", "down": "W8A8_DYNAMIC", "out": "W8A16"}
# prints, for each path, the exit code and the heavy packages imported by then
CODE = """
import json, sys
from click.testing import CliRunner
from octavo.cli import main

heavy = {"torch", "diffusers", "transformers"}
done = []
for path in sys.argv[1:]:
    code = CliRunner().invoke(main, ["inspect", path]).exit_code
    done.append([code, sorted(heavy & set(sys.modules))])
print(json.dumps(done))
"""


def checkpoints(folder: Path) -> list[Path]:
    """Writes a checkpoint of each format and scheme, and a pipeline with a quantized transformer."""
    model = TimedToy()
    together = exported(folder / "together", formats=("ascend", "diffusers", "torchao")).folder
    mixture = written(folder / "mixture", model, layers_of(model, MIXTURE))
    (mixture / "report.json").unlink()
    (mixture / "octavo.manifest").unlink()
    data = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    settings = Settings(defaults={}, reciprocal=True)
    result, folded = calibrate_folded(small(), lambda: [Sample((data,), {})], settings)
    graphs = export(result, folded, folder / "graphs", ("onnx", "ascend-onnx"))
    pipeline = folder / "pipeline"
    shutil.copytree(together, pipeline / "transformer")
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline"}))
    return [together, together / "torchao", mixture, graphs, pipeline]


def test_inspect_answers_without_torch(tmp_path: Path) -> None:
    paths = [make_store(tmp_path / "capture"), *checkpoints(tmp_path)]
    command = [sys.executable, "-c", CODE, *map(str, paths)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert json.loads(done.stdout) == [[0, []]] * len(paths)

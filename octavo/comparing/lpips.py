"""Loads two learned distances of pictures: LPIPS, and ST-LPIPS, whose package brings the weights along. Octavo does not
download weights."""

import importlib.util
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

_ALEXNET = "alexnet-owt-7be5be79.pth"
_SMALLEST = 31  # pixels: the shortest side of a picture that the poolings of either AlexNet do not reduce to nothing
_ST_WEIGHTS = Path("weights", "vST0.0", "alex_shift_tolerant.pth")  # below the directory of the package stlpips_pytorch


def lpips() -> nn.Module | None:
    """Loads LPIPS with AlexNet, 0 for equal pictures (Zhang, Isola, Efros, Shechtman and Wang, The Unreasonable
    Effectiveness of Deep Features as a Perceptual Metric, 2018), from the package lpips and the weights of AlexNet in
    torch.hub's directory. Returns None if either is missing."""
    if not (Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET).is_file():
        return None
    try:
        import lpips as package
    except (ImportError, RuntimeError):  # RuntimeError: torchvision was built for another torch
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # lpips uses an old argument of torchvision
        network: nn.Module = package.LPIPS(net="alex", verbose=False).eval()
    return network


def st_lpips() -> nn.Module | None:
    """Loads ST-LPIPS with AlexNet, 0 for equal pictures, from the weights in the package stlpips-pytorch. Returns None
    without the package."""
    found = importlib.util.find_spec("stlpips_pytorch")
    if found is None or not found.submodule_search_locations:
        return None
    file = Path(found.submodule_search_locations[0]) / _ST_WEIGHTS
    return StLpips(torch.load(file, map_location="cpu", weights_only=True)).eval()


class StLpips(nn.Module):
    """Shift-tolerant LPIPS with AlexNet, 0 for equal pictures (Ghildyal and Liu, Shift-tolerant Perceptual Similarity
    Metric, 2022), by the weights of the package stlpips-pytorch.

    The network is built here, because the package imports torchvision, which it does not need for this network. A call
    takes two batches of pictures (pictures, 3, height, width) in -1..1 and returns their distances (pictures,).
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        """Takes the parameters from `state`, the content of the package's file of weights."""
        super().__init__()
        for name, tensor in state.items():
            self.register_buffer(name.replace(".", "_"), tensor)

    def forward(self, exact: Tensor, other: Tensor) -> Tensor:
        distances = []
        for index, (a, b) in enumerate(zip(self._features(exact), self._features(other), strict=True)):
            square = (_normalized(a) - _normalized(b)).square()
            distances.append(F.conv2d(square, self.get_buffer(f"lin{index}_model_1_weight")).mean((1, 2, 3)))
        return torch.stack(distances).sum(0)

    def _features(self, x: Tensor) -> list[Tensor]:
        """Returns the outputs of the five convolutions after their ReLU, each (pictures, channels, height, width)."""
        x = (x - self.get_buffer("scaling_layer_shift")) / self.get_buffer("scaling_layer_scale")
        features = [F.relu(self._blurred(self._convolved(x, "slice1_0", 2), "slice1_1"))]
        for blur, convolution in (("slice2_4", "slice2_5"), ("slice3_8", "slice3_9")):
            x = self._blurred(F.max_pool2d(features[-1], 3, 1), blur)
            features.append(F.relu(self._convolved(x, convolution, 2 if convolution == "slice2_5" else 1)))
        for convolution in ("slice4_11", "slice5_13"):
            features.append(F.relu(self._convolved(features[-1], convolution, 1)))
        return features

    def _convolved(self, x: Tensor, name: str, padding: int) -> Tensor:
        weight, bias = self.get_buffer(f"net_{name}_weight"), self.get_buffer(f"net_{name}_bias")
        return F.conv2d(x, weight, bias, padding=padding)

    def _blurred(self, x: Tensor, name: str) -> Tensor:
        """Blurs each channel of `x` (pictures, channels, height, width) with the binomial filter, 3 x 3 pixels, that
        the network has for the layer `name`, and keeps every second row and column."""
        return F.conv2d(
            F.pad(x, (2, 2, 2, 2), "reflect"), self.get_buffer(f"net_{name}_filt"), stride=2, groups=x.shape[1]
        )


def _normalized(features: Tensor) -> Tensor:
    return features / (features.square().sum(1, keepdim=True).sqrt() + 1e-10)


def learned_distance(network: Any, exact: np.ndarray, other: np.ndarray) -> float | None:
    """Returns the mean distance by `network` between picture i of `exact` and picture i of `other`, for all i. Both are
    uint8 (pictures, height, width, 3). Returns None if a side is shorter than 31 pixels."""
    if min(exact.shape[1:3]) < _SMALLEST:
        return None
    total = 0.0
    for pair in zip(exact, other, strict=True):  # one by one: a video would need much memory
        a, b = (torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1.0 for picture in pair)
        with torch.no_grad():
            total += float(network(a, b).mean())
    return total / len(exact)

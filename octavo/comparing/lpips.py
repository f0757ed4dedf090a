"""Measures LPIPS, a learned distance of pictures, if its weights are on this machine; Octavo does not download them."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ALEXNET = "alexnet-owt-7be5be79.pth"
_SMALLEST = 31  # pixels: the shortest side of a picture that AlexNet's poolings do not reduce to nothing


class Lpips:
    """The learned perceptual distance of pictures, computed with AlexNet; 0 for equal pictures (Zhang, Isola, Efros,
    Shechtman and Wang, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018).

    `note` says why LPIPS cannot be measured; it is "" if LPIPS can be measured.
    """

    def __init__(self, network: Any, note: str = "") -> None:
        self._network, self.note = network, note

    @classmethod
    def find(cls) -> "Lpips":
        """Loads LPIPS from the package lpips and the weights of AlexNet in torch.hub's directory, if both exist;
        otherwise returns a Lpips whose `note` says what is missing."""
        weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
        if not weights.is_file():
            remedy = f"put {_ALEXNET} of torchvision into {weights.parent}"
            return cls(None, f"LPIPS was not measured: its weights are missing. To measure it, {remedy}.")
        try:
            import lpips
        except ImportError:
            return cls(None, "LPIPS was not measured: the package lpips is not installed.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # lpips uses an old argument of torchvision
            return cls(lpips.LPIPS(net="alex", verbose=False).eval())

    def distance(self, exact: np.ndarray, other: np.ndarray) -> float | None:
        """Returns the mean distance between picture i of `exact` and picture i of `other`, for all i. Both are uint8
        (pictures, height, width, 3). Returns None if LPIPS is not loaded or a side of the pictures is shorter than 31
        pixels."""
        if self._network is None or min(exact.shape[1:3]) < _SMALLEST:
            return None
        batches = [torch.from_numpy(batch).permute(0, 3, 1, 2) for batch in (exact, other)]
        a, b = (batch.float() / 127.5 - 1.0 for batch in batches)
        with torch.no_grad():
            return float(self._network(a, b).mean())

"""LPIPS, where its weights are on the machine: nothing is downloaded for it."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

_ALEXNET = "alexnet-owt-7be5be79.pth"
_SMALLEST = 31  # pixels: AlexNet's poolings leave nothing of less


class Lpips:
    """Learned perceptual distance of pictures, 0 for equal ones, with AlexNet (Zhang, Isola, Efros, Shechtman and Wang,
    The Unreasonable Effectiveness of Deep Features as a Perceptual Metric, 2018). `note` says why there is none."""

    def __init__(self, network: Any, note: str = "") -> None:
        self._network, self.note = network, note

    @classmethod
    def find(cls) -> "Lpips":
        """With the package lpips, and AlexNet in torch.hub's directory."""
        weights = Path(torch.hub.get_dir()) / "checkpoints" / _ALEXNET
        if not weights.is_file():
            return cls(None, f"LPIPS was not measured: its weights ({_ALEXNET}) are not on this machine.")
        try:
            import lpips
        except ImportError:
            return cls(None, "LPIPS was not measured: the package lpips is not installed.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # about how it asks torchvision for the weights
            return cls(lpips.LPIPS(net="alex", verbose=False).eval())

    def distance(self, exact: np.ndarray, other: np.ndarray) -> float | None:
        """The mean over pictures, uint8 (pictures, height, width, 3); None: it is not to be had,
        or they are too small for it."""
        if self._network is None or min(exact.shape[1:3]) < _SMALLEST:
            return None
        a, b = (torch.from_numpy(each).permute(0, 3, 1, 2).float() / 127.5 - 1.0 for each in (exact, other))
        with torch.no_grad():
            return float(self._network(a, b).mean())

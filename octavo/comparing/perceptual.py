"""Measures the difference of pictures as people would see it, with packages that Octavo does not need otherwise: those
of the extra `metrics`, and cvvdp for videos."""

import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from octavo.calibrate.replay.calls import evenly_spaced

from .lpips import learned_distance, lpips, st_lpips
from .reading import Reader, agreement, asked_text

FRAMES = 8  # frames of a video, spaced evenly, that a measure of single pictures looks at
_DISPLAY = "standard_4k"  # the display that ColorVideoVDP assumes: 30 inches, seen from 0.75 m
_EXTRA = "pip install 'octavo[metrics]'"
Measure = Callable[[np.ndarray, np.ndarray], float | None]


class Measured(NamedTuple):
    """The measures of one pair of pictures or videos. `values` is a dict from the key of a measure, such as "lpips", to
    its value, None if it cannot be computed. `text` has the text that the prompt asks for, the texts in both pictures,
    and how far these two agree; it is {} if the prompt asks for no text, or if no text can be read here."""

    values: dict[str, float | None]
    text: dict[str, Any]


class Perceptual:
    """The perceptual measures of pairs of pictures or videos. A measure is loaded when the first pair needs it;
    `missing` maps the name of each measure that was needed and is not installed to the command that installs it."""

    def __init__(self, device: torch.device, rate: float) -> None:
        """Prepares the measures; loads none yet. ColorVideoVDP is computed on `device` if that is a CUDA GPU, otherwise
        on the CPU. `rate` is the frames per second of videos."""
        self._device, self._rate = device if device.type == "cuda" else torch.device("cpu"), rate
        self._loaded: dict[str, Any] = {}
        self.missing: dict[str, str] = {}

    def measured(self, prompt: str, exact: np.ndarray, other: np.ndarray) -> Measured:
        """Measures how `other` differs from `exact`, the float picture or video of `prompt`; both are uint8 (frames,
        height, width, 3). A measure that cannot be computed is None."""
        chosen = evenly_spaced(len(exact), FRAMES)
        frames, others = exact[chosen], other[chosen]
        values = {key: self._by(key, frames, others) for key in ("lpips", "st_lpips", "flip")}
        values["color_video_vdp"] = self._by("color_video_vdp", exact, other) if len(exact) > 1 else None
        text = self._read(prompt, exact[len(exact) // 2], other[len(other) // 2])
        return Measured(values | {"text_agreement": text.get("agreement")}, text)

    @property
    def note(self) -> str:
        """A sentence that names the missing measures and how to install them, or ""."""
        missing = {name: how for name, how in self.missing.items() if self._counts(name)}
        by_command = {how: [name for name in missing if missing[name] == how] for how in missing.values()}
        parts = []
        for how, (*others, last) in by_command.items():
            parts.append(f"{', '.join(others)} and {last} ({how})" if others else f"{last} ({how})")
        return f"Not measured: {', '.join(parts)}." if parts else ""

    def _counts(self, name: str) -> bool:
        """Returns whether it is worth a note that the measure `name` is missing. LPIPS never is, because ST-LPIPS, the
        other learned distance, replaces it; ST-LPIPS is if LPIPS is missing too. All other measures are."""
        learned = [NAMES["lpips"], NAMES["st_lpips"]]
        return name != learned[0] and (name != learned[1] or learned[0] in self.missing)

    def _by(self, key: str, exact: np.ndarray, other: np.ndarray) -> float | None:
        measure = self._load(key)
        return None if measure is None else measure(exact, other)

    def _load(self, key: str) -> Any:
        if key not in self._loaded:
            self._loaded[key] = _LOADERS[key](self._device, self._rate)
            if self._loaded[key] is None:
                self.missing[NAMES[key]] = "pip install cvvdp" if key == "color_video_vdp" else _EXTRA
        return self._loaded[key]

    def _read(self, prompt: str, exact: np.ndarray, other: np.ndarray) -> dict[str, Any]:
        """Returns the text that `prompt` asks for, the texts in both pictures, and how far these two agree."""
        asked = asked_text(prompt)
        reader = self._load("text_agreement") if asked else None
        if reader is None:
            return {}
        texts = {"float": reader.read(exact), "quantized": reader.read(other)}
        return {"asked": asked, **texts, "agreement": agreement(*texts.values())}


def _learned(network: Any) -> Measure | None:
    return None if network is None else lambda exact, other: learned_distance(network, exact, other)


def _flip() -> Measure | None:
    """Returns a function that computes the mean FLIP error of pictures, 0 for equal pictures and 1 at most, for an eye
    that sees 67 pixels per degree (Andersson, Nilsson, Akenine-Möller, Oskarsson, Åström and Fairchild, FLIP: A
    Difference Evaluator for Alternating Images, 2020). Returns None without the package flip-evaluator."""
    if importlib.util.find_spec("flip_evaluator") is None:
        return None
    import flip_evaluator

    def measure(exact: np.ndarray, other: np.ndarray) -> float:
        pairs = [[(picture / 255.0).astype(np.float32) for picture in pair] for pair in zip(exact, other, strict=True)]
        return float(np.mean([flip_evaluator.evaluate(a, b, "LDR", applyMagma=False)[1] for a, b in pairs]))

    return measure


def _color_video_vdp(device: torch.device, rate: float) -> Measure | None:
    """Returns a function that computes on `device` the quality of a video of `rate` frames per second, in
    just-objectionable differences, 10 for equal videos (Mantiuk, Hanji, Ashraf, Asano and Chapiro, ColorVideoVDP,
    2024). Returns None if the package cvvdp is not installed, or if its torchvision was built for another torch."""
    try:
        import pycvvdp
    except (ImportError, RuntimeError):  # RuntimeError: torchvision was built for another torch
        return None
    metric = pycvvdp.cvvdp(display_name=_DISPLAY, quiet=True, device=device)
    return lambda exact, other: float(metric.predict(other, exact, dim_order="FHWC", frames_per_second=rate)[0])


# key in the rows of a comparison -> name
NAMES = {
    "lpips": "LPIPS",
    "st_lpips": "ST-LPIPS",
    "flip": "FLIP",
    "color_video_vdp": "ColorVideoVDP",
    "text_agreement": "OCR agreement",
}
_LOADERS: dict[str, Callable[[torch.device, float], Any]] = {
    "lpips": lambda device, rate: _learned(lpips()),
    "st_lpips": lambda device, rate: _learned(st_lpips()),
    "flip": lambda device, rate: _flip(),
    "color_video_vdp": _color_video_vdp,
    "text_agreement": lambda device, rate: Reader.load(),
}


def can_measure_lpips() -> bool:
    """Returns whether LPIPS or ST-LPIPS can be measured on this machine."""
    return lpips() is not None or st_lpips() is not None

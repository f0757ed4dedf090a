"""Writes numbers and findings as texts for people, on the page and on the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from ..comparing.gates import value_of
from ..comparing.perceptual import NAMES
from ..terminal import count_of, size

# key in the totals of a comparison -> name of the measure: those of pictures besides the PSNR, and all
PICTURE_MEASURES = {"ssim": "SSIM", **NAMES}
MEASURES = {
    "psnr": "PSNR",
    **PICTURE_MEASURES,
    "judged": "share of pictures that show the prompt",
    "output_sqnr": "SQNR",
}


def decibels(value: float | None) -> str:
    """Returns a PSNR or SQNR as a text, such as "36.3 dB". For None, which stands for equal outputs, returns "no
    difference"."""
    return "no difference" if value is None else f"{value:.1f} dB"


def percent(value: float) -> str:
    """Returns a fraction as a percentage: 12 % for 0.12, 1.2 % for 0.012, 0.034 % for 0.00034."""
    number = 100 * value
    return f"{number:.0f} %" if number >= 10 else f"{number:.2g} %"


def measure_text(key: str, value: float | None) -> str:
    """Returns the value of the measure `key`, a key of MEASURES, with its unit: 36.3 dB for a PSNR, 9.61 JOD for
    ColorVideoVDP, 97 % for a share of pictures. A PSNR or SQNR of None stands for equal outputs; any other measure of
    None was not measured."""
    if key in ("psnr", "output_sqnr"):
        return decibels(value)
    if value is None:
        return "not measured"
    if key in ("judged", "text_agreement"):
        return percent(value)
    if key == "color_video_vdp":
        return f"{value:.2f} JOD"
    return f"{value:.4f}" if value == 0.0 or abs(value) >= 0.001 else f"{value:.1g}"


def interval_text(key: str, bounds: Sequence[float | None] | None) -> str:
    """Returns the 95 % interval of the measure `key` as a text, such as "34.1 to 38.0 dB", or "" without one."""
    if bounds is None:
        return ""
    low, high = (measure_text(key, bound) for bound in bounds)
    unit = high.rpartition(" ")[2]
    return f"{low.removesuffix(f' {unit}')} to {high}"


def result_text(totals: Mapping[str, Any], key: str) -> str:
    """Returns a measure in the totals of a comparison with its 95 % interval, such as "36.3 dB (34.1 to 38.0 dB)"."""
    bounds = interval_text(key, totals["intervals"].get(key))
    return measure_text(key, value_of(totals, key)) + (f" ({bounds})" if bounds else "")


def gate_text(gate: Mapping[str, Any]) -> str:
    """Returns in words whether the limit that a user set for a measure is met. `gate` is one of the dicts that
    `comparing.gates.judged_gates` returns. The text has the measure, its interval and the limit; if the limit lies
    inside the interval, also about how many more pairs would settle whether the limit is met."""
    key, bounds = gate["key"], interval_text(gate["key"], gate["interval"])
    name = MEASURES[key]
    if not gate["measured"]:
        return f"{name} was not measured ({gate['option']})"
    around = f" (95 % interval {bounds})" if bounds else " (one pair, so there is no interval)"
    decider = {"worst": "the worst bound", "best": "the best bound"}.get(gate["by"], "the estimate")
    limit = f"{'at most' if gate['at_most'] else 'at least'} {measure_text(key, gate['bar'])}"
    text = f"{name} is {measure_text(key, gate['value'])}{around}, limit {limit} by {decider}"
    more = gate["more"]
    return f"{text}; about {count_of(more, 'more pair')} would settle it (estimate)" if more else text


def speed_text(ratio: float) -> str:
    """Returns `ratio`, float time divided by int8 time, in words: 3.2 × faster for 3.2, 1.7 × slower for 0.58."""
    return _ratio_text(ratio, "faster", "slower", "equally fast")


def size_text(ratio: float) -> str:
    """Returns `ratio`, the float size divided by the int8 size, in words: 1.9 × smaller for 1.9."""
    return _ratio_text(ratio, "smaller", "larger", "equally large")


def _ratio_text(ratio: float, above: str, below: str, same: str) -> str:
    """Returns a ratio in words: the factor and `above` if the ratio is above 1, the factor and `below` if it is below
    1, and only `same` if it is rounded to 1.0."""
    if round(ratio, 1) == 1.0:
        return same
    factor = max(ratio, 1 / ratio)
    return f"{factor:.{1 if factor < 10 else 0}f}\u00a0× {above if ratio > 1 else below}"


# (lowest PSNR in dB, words for pictures with at least this PSNR): rules of thumb, not measured with people
_CLOSENESS = (
    (40.0, "look like the float ones"),
    (30.0, "differ from the float ones in small details"),
    (20.0, "differ visibly from the float ones"),
    (float("-inf"), "do not resemble the float ones"),
)


def codes_of(content: Mapping[str, Any]) -> str:
    """Returns the element type of the checkpoint that `content` compares or describes, such as "int8" or "fp8"."""
    return str(content.get("report", {}).get("settings", {}).get("element", "int8"))


def verdict(content: Mapping[str, Any]) -> str:
    """Returns the result of a comparison, given what its page shows of one checkpoint (`content`), in a few sentences:
    how similar the pictures are, size and speed of the quantized denoiser, and whether a limit, such as --min-psnr, was
    missed."""
    totals, noun, codes = content["totals"], "pictures" if content["decoded"] else "latents", codes_of(content)
    psnr, judged, speed = totals["psnr"], totals["judged"], totals["speed"]
    if psnr is None:
        result = f"The {codes} {noun} are identical to the float ones"
    else:
        closeness = next(words for bar, words in _CLOSENESS if psnr >= bar)
        result = f"The {codes} {noun} {closeness} (PSNR {decibels(psnr)})"
    if judged:
        result += f"; {judged['quantized']} of {judged['of']} show what the prompt describes (float: {judged['float']})"
    ratio = size_text(totals["size"]["float"] / totals["size"]["quantized"])
    result += f". The {codes} denoiser is {ratio} and {speed_text(speed['ratio'])} on this machine."
    missed = [MEASURES[gate["key"]] for gate in content["gates"] if not gate["passed"]]
    if missed:
        return f"Missed the limit for {' and '.join(missed)}. {result}"
    if content["gates"]:
        return f"Passed all limits. {result}"
    return f"{result} No limit was set (--preset, --min-psnr)."


def results_of(content: Mapping[str, Any]) -> dict[str, str]:
    """Returns the table of one checkpoint's results: a dict from the label of a measure to its value as text. The
    terminal shows it, and the page if there are several checkpoints. `content` is what the page shows of the
    checkpoint."""
    totals, codes = content["totals"], codes_of(content)
    speed, bytes_, judged = totals["speed"], totals["size"], totals["judged"]
    rows = {"PSNR of the pictures": result_text(totals, "psnr")}
    for key, name in PICTURE_MEASURES.items():
        if totals[key] is not None:
            rows[f"{name} of the pictures"] = result_text(totals, key)
    if judged:
        rows["pictures that show the prompt, float"] = f"{judged['float']} of {judged['of']}"
        bounds = interval_text("judged", totals["intervals"].get("judged"))
        found = f"{judged['quantized']} of {judged['of']}"
        rows["pictures that show the prompt, quantized"] = f"{found} ({bounds})" if bounds else found
    rows["SQNR of the denoiser's output"] = result_text(totals, "output_sqnr")
    if totals["latent_error"]:
        rows["relative error of the final latents"] = percent(totals["latent_error"][-1]["median"])
    sizes = f"{size(bytes_['float'])} to {size(bytes_['quantized'])}"
    rows["size of the denoiser"] = f"{sizes} ({bytes_['dtype']} to {codes})"
    seconds = f"{speed['float']:.2f} float, {speed['quantized']:.2f} {codes}"
    rows["seconds per picture"] = f"{seconds} ({speed_text(speed['ratio'])})"
    return rows


def number(value: float) -> str:
    """Returns a number with three significant digits."""
    return f"{value:.3g}"


def extent(value: list[float] | float) -> str:
    """Returns `value` as a text: the smallest and the largest of several numbers, such as -1.5 … 2.25, or a single
    number."""
    if not isinstance(value, list):
        return number(value)
    low, high = min(value), max(value)
    return number(low) if low == high else f"{number(low)} … {number(high)}"


def shape(value: list[int]) -> str:
    """Returns a shape as a text, such as 160 × 640."""
    return " × ".join(map(str, value))


def setting_text(value: object) -> str:
    """Returns the value of a setting as a text: yes or no for a bool, and the items of a container with commas."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {setting_text(item)}" for name, item in value.items())
    return ", ".join(map(setting_text, value)) if isinstance(value, (list, tuple)) else str(value)


def breakable(name: str) -> Markup:
    """Returns a dotted name, such as that of a layer, as HTML in which a line may end after each dot."""
    return Markup(".<wbr>").join(name.split("."))


FILTERS = {
    "decibels": decibels, "percent": percent, "size_text": size_text, "speed_text": speed_text, "verdict": verdict,
    "number": number, "extent": extent, "shape": shape, "size": size, "setting_text": setting_text,
    "breakable": breakable, "measure_text": measure_text, "interval_text": interval_text, "result_text": result_text,
    "gate_text": gate_text,
}  # fmt: skip

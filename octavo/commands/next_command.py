"""Says which command to type after another one, as the last line of each command's output."""

from pathlib import Path
from typing import Any

from octavo.calibrate.formats import format_named
from octavo.calibrate.formats.comfy.structure import FILES, file_in
from octavo.calibrate.formats.inspect import views
from octavo.calibrate.report_file import read_report
from octavo.capture.errors import OctavoError

from ..terminal import Terminal


def out_for(capture: Path) -> Path:
    """Returns a path for the checkpoint of `capture`: `w8a8` for `captured`, `sd3-w8a8` for `sd3-captured` or `sd3`."""
    name = capture.name
    return capture.with_name(name.replace("captured", "w8a8") if "captured" in name else f"{name}-w8a8")


def after_capture(capture: Path, terminal: Terminal, *more: object) -> None:
    """Prints the command that calibrates `capture`, with `more` arguments."""
    terminal.next("calibrate", capture, out_for(capture), *more)


def after_inspect(path: Path, terminal: Terminal) -> None:
    """Prints what to do with the sound checkpoint at `path`: compare it with its float model, or, in a format that
    Octavo itself does not run, bring it to the software that does. Prints nothing where neither can be said."""
    places = [path, *(file.parent for file in sorted(path.glob("*/report.json")))] if path.is_dir() else [path.parent]
    reports = [report for place in places if (report := report_at(place)).get("model")]
    found = {name: files for place in places for name, files in views(place).items()}
    if reports and any(format_named(name).loadable for name in found):
        terminal.next("compare", reports[0]["model"], path)
    elif "comfy" in found or path.name in FILES:
        file = file_in(found["comfy"] if path.is_dir() else path)
        terminal.say(f"Next: copy {file} into ComfyUI/models/diffusion_models, and load it with Load Diffusion Model.")
    elif found:
        names = " or ".join(found)
        terminal.say(f"Next: load it with its runtime, as docs/formats.md shows under {names}.")


def after_generate(model: str, terminal: Terminal) -> None:
    """Prints what to do after a picture was drawn with `model`: compare a checkpoint with its float model, or capture a
    float model."""
    if model == "demo-int8":
        terminal.next("compare", "demo", model)
    elif source := report_at(Path(model)).get("model"):
        terminal.next("compare", source, model)
    elif model == "demo" or not any(Path(model).glob("*/report.json")):
        terminal.next("capture", model, "captured")


def report_at(directory: Path) -> dict[str, Any]:
    """Returns the content of report.json in `directory`; {} if there is none that can be read."""
    try:
        return read_report(directory) or {}
    except OctavoError:
        return {}

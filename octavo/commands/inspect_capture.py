"""Shows and checks a capture for `octavo inspect`."""

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from octavo.capture.errors import MisfitError
from octavo.capture.store.reader import Capture, TensorInfo

from ..terminal import Terminal, size

BARS = " ▁▂▃▄▅▆▇█"  # characters of a histogram, from empty to full


def inspect_capture(path: Path, terminal: Terminal) -> None:
    """Prints the contents of a capture, then reads and checks every byte.

    Raises FileError for the first damaged file, MisfitError for a capture that is not finished.
    """
    capture = Capture.open(path, allow_incomplete=True)
    contents = describe_capture(capture)
    manifest = capture.manifest
    terminal.say(f"{path}: a capture of {manifest.get('pipeline') or 'a module'}, {contents['state']}")
    if manifest.get("model"):
        terminal.say(f"  model     {manifest['model']} ({manifest.get('dtype')})")
    for lora in manifest.get("loras", []):
        terminal.say(f"  LoRA      {lora}")
    source = f" ({manifest['prompts_source']})" if "prompts_source" in manifest else ""
    terminal.say(f"  prompts   {contents['prompts']} of {capture.planned}{source}")
    settings = ", ".join(
        f"{name} {value}" for name, value in manifest.get("settings", {}).items() if value not in ([], "")
    )
    if settings:
        terminal.say(f"  settings  {settings}")
    raw, stored = contents["raw_bytes"], contents["stored_bytes"]
    terminal.say(
        f"  size      {size(raw)} of inputs, {size(stored)} on disk"
        + (f" ({raw / stored:.1f}x smaller)" if stored else "")
    )
    for name, part in contents["components"].items():
        terminal.say(f"  {name}: {part['class']}, {part['calls']} calls in {part['steps']} steps")
        terminal.say(f"    timesteps {part['histogram']}  {part['timesteps'][0]:g} to {part['timesteps'][1]:g}")
        for argument, kinds in part["arguments"].items():
            terminal.say(f"    {argument:<24} {', '.join(kinds)}")
    capture.verify()
    terminal.say("  all digests match")
    terminal.event("capture", path=str(path), sound=contents["state"] == "finished", manifest=manifest, **contents)
    if contents["state"] != "finished":
        raise MisfitError(f"{path}: {contents['state']}. Finish it with octavo capture --resume.")


def describe_capture(capture: Capture) -> dict[str, Any]:
    """Returns the contents of a capture as JSON-able values: whether it is finished, the number of prompts, the bytes
    of the recorded tensors and of the files, and for each denoiser the calls, steps, timesteps and arguments."""
    done = (capture.directory / "complete.json").exists()
    arguments: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for call in capture.descriptions():
        for name, value in {**{f"#{i}": v for i, v in enumerate(call.args)}, **call.kwargs}.items():
            arguments[call.component][name][_kind(value)] += 1
    headers = [header for unit in capture.units for header in unit.calls]
    return {
        "state": "finished" if done else f"not finished ({len(capture.units)} of {capture.planned})",
        "prompts": len(capture.units),
        "raw_bytes": sum(unit.raw_bytes for unit in capture.units),
        "stored_bytes": sum(unit.stored_bytes for unit in capture.units),
        "components": {
            name: _component(capture, name, [h for h in headers if h.component == name], arguments[name])
            for name in dict.fromkeys(h.component for h in headers)
        },
    }


def _component(capture: Capture, name: str, headers: list[Any], arguments: dict[str, Counter[str]]) -> dict[str, Any]:
    """Returns a summary of the calls of the denoiser `name` in a capture, as JSON-able values. `headers` describe these
    calls. `arguments` maps the name of each argument to a counter of its values' descriptions: how many calls have, for
    example, a value that is described as "float16 (2, 16, 64, 64)"."""
    levels = [h.timestep for h in headers if h.timestep is not None] or [0.0]
    fingerprint = capture.manifest.get("components", {}).get(name, {})
    return {
        "class": fingerprint.get("class", "?"),
        "calls": len(headers),
        "steps": len({h.step for h in headers}),
        "contexts": sorted({h.context for h in headers if h.context}),
        "timesteps": [min(levels), max(levels)],
        "histogram": histogram(levels),
        "arguments": {name: [kind for kind, _ in kinds.most_common(4)] for name, kinds in sorted(arguments.items())},
    }


def _kind(value: Any) -> str:
    """Returns a short description of an argument: dtype and shape of a tensor, such as float16 (2, 16, 64, 64), the
    items of a container, or the value itself."""
    if isinstance(value, TensorInfo):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {_kind(v)}" for k, v in list(value.items())[:4]) + "}"
    if type(value) in (list, tuple):
        return f"{type(value).__name__} of {len(value)}" + (f": {_kind(value[0])}" if value else "")
    return repr(value)[:40]


def histogram(values: list[float], bins: int = 24) -> str:
    """Returns a histogram of `values` as a text of `bins` characters, each a bar from empty to full.

    The bins divide the interval from the smallest to the largest value evenly.
    """
    low, high = min(values), max(values)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / (high - low or 1.0) * bins))] += 1
    most = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)

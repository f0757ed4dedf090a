"""Defines the layout of a capture on disk, and reads its sealed files."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FileError, damage
from ..files import storage
from ..json_kinds import Kind, checked, count, fields, maybe, object_of, text
from ..sealed import canonical, digest_of, open_regular, read_sealed
from .parts import Part
from .tree import decode

CAPTURE, UNITS, UNIT, COMPLETE = "capture.json", "units", "unit.json", "complete.json"
SCHEMA = 1  # version of the layout, written into capture.json
# the name of a unit's directory, INDEX-KEY, and of a data file in it
UNIT_NAME = re.compile(r"(\d{6,12})-([0-9a-f]{16})")
DATA_NAME = re.compile(r"data-\d{3,9}\.safetensors")
# errors that reading the body of a sealed file can raise if its digest is right but Octavo did not write it
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)
# the checks (json_kinds.py) of the manifest's entries that commands read; each entry may be missing
_MANIFEST: Kind = fields(
    {},
    dict.fromkeys(("model", "pipeline", "family", "dtype", "prompts_source"), maybe(text))
    | {
        "components": object_of(object_of(text)),
        "settings": object_of(lambda value, where: None),
        "prompts": maybe(count),
    },
)


class CallHeader(NamedTuple):
    """Describes a recorded call without its arguments.

    `component` is the name of the denoiser, `index` the position of the call, from 0, among the denoiser's calls in the
    recording, stored or not, `step` the denoising step, `timestep` the noise level, and `context` the pipeline's name
    for the call, such as "cond".
    """

    component: str
    index: int  # type: ignore[assignment]
    step: int | None
    timestep: float | None
    context: str | None


class Call(NamedTuple):
    """Holds a recorded call of the denoiser `component`.

    `index` is the position of the call, from 0, among the denoiser's calls in the recording, stored or not, `step` the
    denoising step, `timestep` the noise level, and `context` the pipeline's name for the call, such as "cond". `args`
    and `kwargs` are the arguments.
    """

    component: str
    index: int  # type: ignore[assignment]  # number of the call among this component's calls in the unit
    step: int | None
    timestep: float | None
    context: str | None  # the pipeline's name for the call, e.g. "cond"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Unit(NamedTuple):
    """The content of a unit.json: describes the calls of one prompt, without their tensors.

    `info` is what determines the calls, such as prompt and seed, and `key` its digest. `raw_bytes` is the size of all
    tensors of the calls, `stored_bytes` the size when equal tensors or rows count only once. `name` is the name of the
    unit's directory, `digest` the SHA-256 of unit.json.
    """

    index: int  # type: ignore[assignment]
    key: str
    info: dict[str, Any]
    calls: list[CallHeader]
    raw_bytes: int
    stored_bytes: int
    name: str  # name of the unit's directory
    digest: str  # digest of its unit.json


def unit_key(info: dict[str, Any]) -> str:
    """Computes the key of the stored calls of one prompt from `info`, which determines them (prompt, seed, steps).

    The key is the first 16 hexadecimal digits of the SHA-256 of `info` as canonical JSON.
    """
    return digest_of(canonical(info))[:16]


def remedy_for(directory: Path, name: str) -> str:
    """Returns the sentence of a message that says how to repair `name`, the damaged directory of one prompt's calls."""
    return f"Delete {directory / UNITS / name} and run capture --resume."


def read_capture(directory: Path) -> dict[str, Any]:
    """Reads the manifest of the capture in `directory`.

    Raises FileError if there is no manifest, if it is damaged, or if it was written for another layout (SCHEMA).
    """
    path = directory / CAPTURE
    if not path.is_symlink() and not path.exists():
        fact = "not a capture (no capture.json)" if directory.is_dir() else "no such capture"
        raise FileError(f"{directory}: {fact}. Make a capture with octavo capture.")
    body = read_sealed(path, "Capture again into another directory.").body
    schema = body.get("schema") if isinstance(body, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        versions = f"1-{SCHEMA}" if SCHEMA > 1 else "1"
        raise FileError(f"{directory}: has layout {schema}, but this version reads {versions}. Upgrade Octavo.")
    if schema != SCHEMA or not isinstance(body.get("manifest"), dict):
        raise damage(path, "not the manifest of a capture", "Capture again into another directory.")
    manifest: dict[str, Any] = checked(body["manifest"], _MANIFEST, path, "Capture again into another directory.")
    return manifest


def list_units(directory: Path) -> dict[int, str]:
    """Returns a dict from index to directory name of the stored units (calls of one prompt each), in ascending order.

    Names that begin with a dot are ignored. Raises FileError if the folder of units holds anything else that is not a
    unit, or if two units have the same index.
    """
    units = directory / UNITS
    with storage(units):
        if units.is_symlink():
            raise damage(units, "is a symbolic link inside the capture", "Replace the link by the directory itself.")
        if not units.is_dir():
            raise damage(units, "missing", "Run capture --resume.")
        names = sorted(entry.name for entry in units.iterdir() if not entry.name.startswith("."))
    units_by_index: dict[int, str] = {}
    for name in names:
        matched = UNIT_NAME.fullmatch(name)
        path = units / name
        if path.is_symlink():
            raise damage(path, "is a symbolic link inside the capture", remedy_for(directory, name))
        if matched is None or not path.is_dir():
            raise damage(path, "not a unit of a capture", f"Delete {path}.")
        index = int(matched[1])
        if index in units_by_index:
            fact = f"is a second unit with number {index}, beside {units_by_index[index]}"
            raise damage(path, fact, "Delete both units and run capture --resume.")
        units_by_index[index] = name
    return dict(sorted(units_by_index.items()))


def read_unit(directory: Path, name: str) -> tuple[Unit, dict[str, Any]]:
    """Reads a unit.json. `name` is the folder, in the capture `directory`, that holds the calls of one prompt.

    Returns the content as a Unit, which lacks the arguments of the calls, and as the whole JSON object. Raises
    FileError if unit.json is damaged, or if a data file is missing or of another size.
    """
    remedy = remedy_for(directory, name)
    path = directory / UNITS / name / UNIT
    body, digest = read_sealed(path, remedy)
    try:
        calls = [_header(record) for record in body["calls"]]
        sizes = (int(body["raw_bytes"]), int(body["stored_bytes"]))
        unit = Unit(int(body["index"]), str(body["key"]), dict(body["info"]), calls, *sizes, name, digest)
        parts = [Part(**part) for part in body["parts"]]
        if name != f"{unit.index:06d}-{unit.key}" or unit.key != unit_key(unit.info):
            raise ValueError("its directory name does not match its content")
        if any(DATA_NAME.fullmatch(part.file) is None for part in parts):
            raise ValueError("a data file outside the unit")
    except MALFORMED as exc:
        raise damage(path, f"not a unit of a capture ({exc})", remedy) from exc
    for part in parts:
        with open_regular(path.with_name(part.file), remedy) as (_, size):
            if size != part.bytes:
                raise damage(path.with_name(part.file), f"damaged (has {size} bytes, not {part.bytes})", remedy)
    return unit, body


def _header(record: dict[str, Any]) -> CallHeader:
    component, index, step, context = (record[field] for field in ("component", "index", "step", "context"))
    timestep = decode(record["timestep"], lambda _: None)
    if not isinstance(component, str) or type(index) is not int:
        raise ValueError("it has a call without a component or an index")
    return CallHeader(component, index, step, timestep, context)

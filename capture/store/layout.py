"""The layout of a capture on disk, and reading its sealed files."""

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
UNIT_NAME = re.compile(r"(\d{6,12})-([0-9a-f]{16})")
DATA_NAME = re.compile(r"data-\d{3,9}\.safetensors")
# errors raised while reading a body that matches its seal but was not written by Octavo
MALFORMED = (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError)
# the entries of a manifest that commands read; any may be missing
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
    """A call without its arguments."""

    component: str
    index: int  # type: ignore[assignment]
    step: int | None
    timestep: float | None
    context: str | None


class Call(NamedTuple):
    """One call of a denoiser, as it is recorded and read back."""

    component: str
    index: int  # type: ignore[assignment]  # number of the call among this component's calls in the unit
    step: int | None
    timestep: float | None
    context: str | None  # the pipeline's name for the call, e.g. "cond"
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Unit(NamedTuple):
    """The contents of a unit.json: a stored unit without its tensors."""

    index: int  # type: ignore[assignment]
    key: str
    info: dict[str, Any]
    calls: list[CallHeader]
    raw_bytes: int
    stored_bytes: int
    name: str  # name of the unit's directory
    digest: str  # digest of its unit.json


def unit_key(info: dict[str, Any]) -> str:
    """The key of a unit with this info: 16 hexadecimal digits of the SHA-256 of the info's JSON."""
    return digest_of(canonical(info))[:16]


def remedy_for(directory: Path, name: str) -> str:
    """The remedy that messages give for a damaged unit."""
    return f"Delete {directory / UNITS / name} and run capture --resume."


def read_capture(directory: Path) -> dict[str, Any]:
    """Reads the manifest of the capture in `directory`. Raises FileError without one, and for another schema."""
    path = directory / CAPTURE
    if not path.is_symlink() and not path.exists():
        fact = "not a capture (no capture.json)" if directory.is_dir() else "no such capture"
        raise FileError(f"{directory}: {fact}. Make one with octavo capture.")
    body = read_sealed(path, "Capture again into another directory.").body
    schema = body.get("schema") if isinstance(body, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        versions = f"1-{SCHEMA}" if SCHEMA > 1 else "1"
        raise FileError(f"{directory}: written by format {schema}; this version reads {versions}. Upgrade.")
    if schema != SCHEMA or not isinstance(body.get("manifest"), dict):
        raise damage(path, "not the manifest of a capture", "Capture again into another directory.")
    manifest: dict[str, Any] = checked(body["manifest"], _MANIFEST, path, "Capture again into another directory.")
    return manifest


def list_units(directory: Path) -> dict[int, str]:
    """The directory names of the stored units, by index, in the order of the indices."""
    units = directory / UNITS
    with storage(units):
        if units.is_symlink():
            raise damage(units, "symbolic link inside the capture", "Put the directory itself there.")
        if not units.is_dir():
            raise damage(units, "missing", "Run capture --resume.")
        names = sorted(entry.name for entry in units.iterdir() if not entry.name.startswith("."))
    found: dict[int, str] = {}
    for name in names:
        matched = UNIT_NAME.fullmatch(name)
        path = units / name
        if path.is_symlink():
            raise damage(path, "symbolic link inside the capture", remedy_for(directory, name))
        if matched is None or not path.is_dir():
            raise damage(path, "not a unit of a capture", f"Delete {path}.")
        index = int(matched[1])
        if index in found:
            raise damage(path, f"a second unit {index} beside {found[index]}", "Delete the one that is not yours.")
        found[index] = name
    return dict(sorted(found.items()))


def read_unit(directory: Path, name: str) -> tuple[Unit, dict[str, Any]]:
    """Reads a unit and the body of its unit.json. Raises FileError for a broken seal, and for data files that are
    missing or of another size."""
    remedy = remedy_for(directory, name)
    path = directory / UNITS / name / UNIT
    body, digest = read_sealed(path, remedy)
    try:
        calls = [_header(record) for record in body["calls"]]
        sizes = (int(body["raw_bytes"]), int(body["stored_bytes"]))
        unit = Unit(int(body["index"]), str(body["key"]), dict(body["info"]), calls, *sizes, name, digest)
        parts = [Part(**part) for part in body["parts"]]
        if name != f"{unit.index:06d}-{unit.key}" or unit.key != unit_key(unit.info):
            raise ValueError("its name is not its content's")
        if any(DATA_NAME.fullmatch(part.file) is None for part in parts):
            raise ValueError("a data file elsewhere")
    except MALFORMED as exc:
        raise damage(path, f"not a unit of a capture ({exc})", remedy) from exc
    for part in parts:
        with open_regular(path.with_name(part.file), remedy) as (_, size):
            if size != part.bytes:
                raise damage(path.with_name(part.file), f"damaged (checksum: {size} bytes, not {part.bytes})", remedy)
    return unit, body


def _header(record: dict[str, Any]) -> CallHeader:
    component, index, step, context = (record[field] for field in ("component", "index", "step", "context"))
    timestep = decode(record["timestep"], lambda _: None)
    if not isinstance(component, str) or type(index) is not int:
        raise ValueError("a call without a name")
    return CallHeader(component, index, step, timestep, context)

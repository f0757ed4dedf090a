"""Writes and reads report.json, the report of a calibration: a JSON object with the errors, ranges and bytes of all
layers."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from octavo.capture.json_kinds import (
    Kind,
    checked,
    count,
    fields,
    list_of,
    maybe,
    number,
    object_of,
    one_of,
    text,
)
from octavo.capture.sealed import json_object, read_bytes

REPORT_FILE = "report.json"
_LIMIT = 256 << 20  # bytes; a larger file is refused, since reports are far smaller
_NUMBERS = one_of(number, list_of(number))
_LAYER: Kind = fields(
    {"name": text, "scheme": maybe(text), "reason": maybe(text), "shape": list_of(count), "bytes_after": count},
    {"sqnr": maybe(number), "range": list_of(number, 2), "scale": _NUMBERS, "zero_point": _NUMBERS},
)
_BUDGET: Kind = fields(
    {"budget": text, "schemes": object_of(count), "float": count, "error": fields({"relative": number})}
)
_REPORT: Kind = fields(
    {
        "layers": list_of(_LAYER),
        "totals": fields(
            {"quantized": count, "kept_float": count, "bytes_before": count, "bytes_after": count, "calls": count},
            {
                "output_sqnr": maybe(number),
                "output_sqnr_interval": maybe(list_of(number, 2)),
                "calls_measured": count,
                "calls_held_out": count,
            },
        ),
    },
    {
        "model": text,
        "component": text,
        "warnings": list_of(text),
        "budget": maybe(_BUDGET),
        "enough": list_of(fields({"calls": count, "output_sqnr": number}, {"prompts": maybe(count)})),
        "settings": object_of(lambda value, where: None),
    },
)


def calls_text(section: Mapping[str, Any]) -> str:
    """Returns the number of the calls that a section of report.json was measured on, as a text such as "3 held-out
    calls". `section` has this number as `calls`; `held_out` is true, or not 0, if these calls are held out."""
    count = section["calls"]
    return f"{count} {'held-out ' if section['held_out'] else ''}{'call' if count == 1 else 'calls'}"


def report_bytes(report: Mapping[str, Any]) -> bytes:
    """Serializes a report as the content of report.json."""
    return (json.dumps(report, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def read_report(directory: Path) -> dict[str, Any]:
    """Reads the report of the checkpoint in `directory`; returns {} if it has none. Raises FileError for a damaged one.

    Also raises FileError if an entry that commands or pages show has another type than a calibration writes. Other
    entries may be any JSON.
    """
    file = directory / REPORT_FILE
    if not file.exists():
        return {}
    remedy = "Copy the file again, or delete it: the checkpoint loads without it."
    report: dict[str, Any] = checked(json_object(read_bytes(file, _LIMIT, remedy), file, remedy), _REPORT, file, remedy)
    return report

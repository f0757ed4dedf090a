"""The packages of the extra `onnx`, which are not there unless asked for."""

from importlib.util import find_spec

from octavo.capture.errors import UsageError

_PACKAGES = ("onnx", "onnxscript")


def check_extra(what: str) -> None:
    """Raises UsageError where `what` wants packages that are not installed."""
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise UsageError(f"{what}: {missing[0]} is not installed. Install octavo[onnx].")

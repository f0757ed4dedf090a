"""The packages of the extra `onnx`, which are not there unless asked for."""

from ..packages import check_packages

PACKAGES, EXTRA = ("onnx", "onnxscript"), "onnx"


def check_extra(what: str) -> None:
    """Raises UsageError where `what` wants packages that are not installed."""
    check_packages(what, PACKAGES, EXTRA)

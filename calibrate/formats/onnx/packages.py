"""The packages of the extra `onnx`, which a plain installation does not have."""

from ..packages import check_packages

PACKAGES, EXTRA = ("onnx", "onnxscript"), "onnx"


def check_extra(what: str) -> None:
    """Raises UsageError where packages that `what` needs are not installed."""
    check_packages(what, PACKAGES, EXTRA)

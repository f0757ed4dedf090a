"""Names the packages of Octavo's extra `onnx`, which a plain installation lacks, and checks for them."""

from ..packages import check_packages

PACKAGES, EXTRA = ("onnx", "onnxscript"), "onnx"


def check_extra(what: str) -> None:
    """Raises UsageError if a package of the extra `onnx` is not installed; the message says that `what` needs it."""
    check_packages(what, PACKAGES, EXTRA)

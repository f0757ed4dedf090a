"""What this package refuses, and how it says so."""

from octavo.capture.errors import CaptureError


class CalibrateError(CaptureError):
    """A model, option, sample or checkpoint that cannot be used: one line naming where, what and the remedy."""

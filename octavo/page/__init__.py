"""The page: everything that is known about a comparison or a calibration, in one file that needs no network."""

from .page import page

__all__ = ["page"]

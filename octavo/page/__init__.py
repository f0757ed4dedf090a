"""The page: everything that is known about a comparison or a calibration, in one file that needs no network."""

from .page import page

__all__ = ["PAGE_FILE", "page"]

PAGE_FILE = "report.html"  # beside a checkpoint

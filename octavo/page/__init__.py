"""Makes the HTML page of a comparison or of a calibration, in one file that loads no other files."""

from .page import page

__all__ = ["PAGE_FILE", "page"]

PAGE_FILE = "report.html"  # name of the page of a calibration, in the directory of the checkpoint

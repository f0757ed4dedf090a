"""Runs the command line for `python -m octavo`, which is how `accelerate launch` starts it."""

from .cli import main

main()

"""`python -m octavo`, as `accelerate launch` starts it."""

from .cli import main

main()

"""Octavo's tests: a folder for each package, the tiny models they share in zoo/, and their tools in helpers/."""

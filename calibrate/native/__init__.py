"""Compiled kernels in C, and the module that loads them (`kernels`). Without a compiler there are none."""

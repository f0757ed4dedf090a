"""Reads and writes the lists of calls that msModelSlim documents as calibration data, in files of `torch.save`.

Reading such a file never runs code from it.
"""

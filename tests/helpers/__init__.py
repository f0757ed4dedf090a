"""Tools of the tests: commands, refusals, faults, ranks, stores, a browser, and stand-ins for what a machine lacks.

commands         octavo as a user runs it, in this process
refusals         checks of an OctavoError: its exit code, its one line, the words in it
faults           failing and dying calls of os, in this process or a forked one
ranked           runs of several ranks
stores           captures of a few calls, without a model
browser          a headless Chromium
npu_standin      operators of torch_npu, on a CPU
opensora_oracle  STDiT3 in plain formulas
"""

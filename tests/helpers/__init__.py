"""Tools of the tests.

commands         octavo as a user runs it, in this process
calibrators      calibrators of the toy network
refusals         checks of an OctavoError: its exit code, its single line, the words in it
examples         how many examples a property is tested on
slow             cases for `make test-all`
faults           os calls that fail or kill the process, in this process or a forked one
damage           damaged files
ranked           runs of several ranks
stores           captures of a few calls, without a model
browser          a headless Chromium
npu_standin      operators of torch_npu, on a CPU
opensora_oracle  STDiT3 in plain formulas
"""

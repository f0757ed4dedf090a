"""Format `ascend`: the files that msModelSlim, Ascend's quantization tool, writes and MindIE-SD, Ascend's library for
diffusion models, loads."""

"""Recognizes the exceptions that libraries raise when memory runs out."""

import re


def out_of_memory(error: BaseException) -> str | None:
    """Returns the device whose memory ran out, such as "cuda:0", if `error` reports that memory ran out; otherwise
    None.

    Recognizes MemoryError from Python, RuntimeError from torch's CPU allocator or from an NPU, and
    torch.OutOfMemoryError from CUDA.
    """
    text = str(error)
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return "cpu"
    if type(error).__name__ == "OutOfMemoryError" or re.search(r"(CUDA|NPU) out of memory", text):
        device = re.search(r"(GPU|NPU) (\d+)", text)
        kind = "npu" if "NPU out of memory" in text else "cuda"
        return f"{kind}:{device[2]}" if device else kind
    return None

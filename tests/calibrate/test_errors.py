"""Errors that libraries raise when memory runs out are distinguished from other errors."""

import pytest
import torch

from octavo.calibrate.errors import out_of_memory


def test_a_real_allocation_that_is_too_large():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value) == "cpu"


@pytest.mark.parametrize(
    ("error", "device"),
    [
        (MemoryError(), "cpu"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 1 has a total capacity of"),
            "cuda:1",
        ),
        (RuntimeError("NPU out of memory. Tried to allocate 20.00 MiB (NPU 3; 29.50 GiB total capacity"), "npu:3"),
        (RuntimeError("NPU out of memory. Tried to allocate"), "npu"),
        (RuntimeError("shapes do not match"), None),
        (ValueError("memory"), None),
    ],
)
def test_what_is_and_what_is_not_out_of_memory(error, device):
    assert out_of_memory(error) == device

"""Checks that devices that are absent and words that name no device are refused."""

import pytest
import torch

from octavo.capture.devices import resolve_device

from ..helpers.refusals import refused


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [("npu", 7, "torch_npu is not installed"), ("cuda", 7, "cuda"), ("cuda:99", 7, "cuda"), ("tpu", 2, "not a device")],
)
def test_devices_that_do_not_exist_are_refused(name, code, words):
    if name.startswith("cuda") and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused(lambda: resolve_device(name), code, words)

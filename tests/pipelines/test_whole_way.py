"""Checks that tiny pipelines of many classes can be captured, calibrated and run in integers."""

import pytest
import torch

from octavo.calibrate.calibration import calibrate
from octavo.capture.recorder import Memory, Recorder

from ..helpers.refusals import refused
from ..zoo.image_pipelines import flux2_cached
from ..zoo.pipelines import ZOO, make, run
from ..zoo.walk import walk


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_the_whole_way(name, tmp_path):
    rows = walk(*make(name), run, tmp_path)
    assert rows
    for row in rows:
        assert row.same, "the integers that were read back compute something else"
        assert row.exact or "replay differs" in " ".join(row.remarks)
        assert row.quantized
        assert row.sqnr is None or row.sqnr > 18


def test_a_live_cache_is_refused_by_its_name_and_the_rest_of_the_call_can_be_had(tmp_path):
    torch.manual_seed(0)
    pipe, arguments = flux2_cached()
    refused(lambda: walk(pipe, arguments, run, tmp_path), 3, "'kv_cache': cannot store a value of type")
    memory = Memory()
    with Recorder(pipe.transformer.eval(), memory, drop=frozenset({"kv_cache", "kv_cache_mode"})):
        run(pipe, arguments)
    result = calibrate(pipe.transformer, lambda: memory.calls)
    assert result.report["totals"]["output_sqnr"] > 20

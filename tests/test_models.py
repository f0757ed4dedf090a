"""Tiny pipelines of many classes, each the whole way from capture to a run in integers."""

import pytest

from bench.walk import walk

from .pipelines_tiny import ZOO, make, run


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

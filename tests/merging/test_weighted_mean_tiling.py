"""The Triton kernels of weighted_mean divide their work by the shape alone."""

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install triton")
from mlip_kernels.triton.merging.weighted_mean import tiling


@pytest.mark.parametrize(
    ("shape", "splits"),
    [((256, 197, 768), 1), ((1, 197, 768), 1), ((1, 4096, 768), 16), ((64, 4096, 768), 2), ((1, 1 << 20, 64), 512)],
)
def test_tokens_are_split_only_where_there_are_too_few_programs(shape, splits):
    divided = tiling(*shape, prefix_tokens=0)
    assert divided.splits == splits
    assert divided.sums[1] <= 65535  # the largest second dimension of a grid

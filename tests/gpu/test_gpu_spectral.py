"""The spectral family on its GPU kernels: every operator against float64, on both backends."""

import pytest
import torch
from spectral_operators import check_all, functions, results, tokens

from mlip_kernels.testing import assert_identical, permuted

SINGLE, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16
GRIDS = ((1, 1), (2, 3), (5, 13), (14, 14))
LENGTHS = (1, 2, 13, 50, 77)  # the last makes sums in parts
CUDA = [("cuda", arch, dtype) for arch in (80, 90) for dtype in (SINGLE, BRAIN, HALF)]
TRITON = [("triton", 80, SINGLE), ("triton", 80, BRAIN), ("triton", 90, SINGLE), ("triton", 90, HALF)]
REAL = [("triton", None, SINGLE), ("triton", None, BRAIN), ("cuda", None, SINGLE), ("cuda", None, HALF)]


def on(devices):
    """Run on these ``(backend, arch, dtype)``: Triton compiles when a test runs, so not all of them everywhere."""
    cases = [
        pytest.param(
            (backend, arch) if arch else (backend,),
            dtype,
            id=f"{backend}-{f'sm{arch}' if arch else 'gpu'}-{str(dtype).removeprefix('torch.')}",
            marks=() if arch else pytest.mark.gpu,
        )
        for backend, arch, dtype in (*devices, *REAL)
    ]
    return pytest.mark.parametrize(("cuda", "dtype"), cases, indirect=["cuda"])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@on([*CUDA, TRITON[0], TRITON[1], TRITON[3]])
def test_grids(cuda, grid, dtype):
    prefix = grid[0] % 3
    check_all(cuda, tokens(2, prefix + grid[0] * grid[1], 33, dtype=dtype), grid, prefix)


@pytest.mark.parametrize("length", LENGTHS)
@on(CUDA + TRITON[1:3])
def test_the_token_axis(cuda, length, dtype):
    prefix = length % 3
    check_all(cuda, tokens(3, prefix + length, 17, dtype=dtype), None, prefix)


@on(CUDA[:1] + TRITON[:1])
def test_channels_that_are_read_16_bytes_at_a_time(cuda, dtype):
    check_all(cuda, tokens(2, 1 + 14 * 12, 48, dtype=dtype), (14, 12), 1)


@on(CUDA[:1] + TRITON[:1])
def test_small_ends(cuda, dtype):
    for shape in ((0, 7, 33), (3, 7, 1)):
        check_all(cuda, tokens(*shape, dtype=dtype), None, 1)
        check_all(cuda, tokens(*shape, dtype=dtype), (2, 3), 1)


@on([CUDA[0], TRITON[2]])
def test_grids_of_more_than_16_points_along_an_axis(cuda, dtype):
    check_all(cuda, tokens(1, 24 * 27, 9, dtype=dtype), (24, 27), 0)


@on([CUDA[4], TRITON[1]])
def test_grids_of_32_points_along_an_axis(cuda, dtype):
    check_all(cuda, tokens(1, 32 * 32, 9, dtype=dtype), (32, 32), 0)


@pytest.mark.parametrize("grid", [(3, 37), (34, 2)], ids=str)
@on([CUDA[0], TRITON[0], TRITON[1]])
def test_grids_of_more_than_32_points_along_an_axis(cuda, grid, dtype):
    check_all(cuda, tokens(1, 1 + grid[0] * grid[1], 17, dtype=dtype), grid, 1)


@on(CUDA[:1] + TRITON[:1])
def test_more_batch_elements_than_parts_of_the_batch(cuda, dtype):
    check_all(cuda, tokens(35, 6, 17, dtype=dtype), (2, 3), 0)


@on(CUDA[:1] + TRITON[:1])
def test_layouts(cuda, dtype):
    x = tokens(2, 13, 33, dtype=dtype)
    check_all(cuda, permuted(x), (3, 4), 1)
    check_all(cuda, torch.cat([x, x], 1)[:, 13:], (3, 4), 1)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_no_order_of_the_warps_changes_a_bit(backend, needs_emulated):
    needs_emulated(backend)
    from emulated_cuda import EmulatedCuda

    x = tokens(3, 13, 33)
    for function, others in functions(12, 33, (3, 4), 1).values():
        usual = EmulatedCuda(backend, 80, multiprocessors=1)
        both = []
        for device in (usual, usual.under("random", seed=1)):
            with device:
                both.append([t.cpu() for t in results(function, [x, *others], device.put)])
        for one, other in zip(*both, strict=True):
            assert_identical(one, other)

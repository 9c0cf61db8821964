"""Kernels that Triton compiled give right results in every dtype, for both architectures, under every schedule."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tolerances import assert_as_accurate, assert_close, assert_identical

pytest.importorskip("triton", reason="needs Triton")
import triton_kernels as kernels

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
ARCHITECTURES = [80, 90]
SCHEDULES = [{"schedule": "round_robin"}, {"schedule": "reversed"}, {"schedule": "random", "seed": 1}]
SCHEDULES += [{"schedule": "random", "seed": 2}]

pytestmark = pytest.mark.parametrize("arch", ARCHITECTURES)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def execute(function, arguments: list, grid, arch: int, *, constants: dict, schedules=SCHEDULES[:1], **options):
    """Launch under each schedule in turn; with the same inputs the results must not depend on it."""
    compiled, left = kernels.compile_for(function, arguments, arch, **options, **constants)
    for schedule in schedules:
        launch = kernels.run(compiled, left, grid, arch, **schedule)
    return launch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_softmax(dtype: torch.dtype, arch: int):
    x = random(8, 197, dtype=dtype)
    y = torch.full_like(x, float("nan"))
    execute(kernels.softmax, [x, y, 197, 197], 8, arch, constants={"block": 256}, schedules=SCHEDULES)
    truth = x.double().softmax(-1)
    assert_as_accurate(y, x.softmax(-1), truth, name="softmax")


TILES = [(64, 64, 32, 3), (64, 64, 32, 1), (128, 64, 64, 2), (64, 128, 16, 3)]


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul(dtype: torch.dtype, transposed: bool, tile: tuple[int, ...], arch: int):
    """Whole numbers, so that neither TF32 nor the order of the sum rounds anything."""
    m, n, k = 72, 70, 70
    bm, bn, bk, stages = tile
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (m, k), generator=generator).to(dtype)
    b = torch.randint(-8, 9, (k, n), generator=generator).to(dtype)
    if transposed:
        b = b.t().contiguous().t()
    c = torch.full((m, n), float("nan"))
    arguments = [a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride()]
    grid = (-(-m // bm), -(-n // bn))
    constants = {"bm": bm, "bn": bn, "bk": bk}
    launch = execute(kernels.matmul, arguments, grid, arch, constants=constants, stages=stages)
    assert_identical(c, (a.double() @ b.double()).float(), name="matmul")
    wanted = "wgmma.mma_async" if arch == 90 else "mma.sync"
    assert any(name.startswith(wanted) for name in launch.opcodes)
    assert launch.statistics.matrix_macs >= m * n * k


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_of_fractions_under_every_schedule(dtype: torch.dtype, arch: int):
    a, b, c = random(64, 96, dtype=dtype), random(96, 64, dtype=dtype), torch.full((64, 64), float("nan"))
    arguments = [a, b, c, 64, 64, 96, *a.stride(), *b.stride(), *c.stride()]
    constants = {"bm": 64, "bn": 64, "bk": 32}
    execute(kernels.matmul, arguments, (1, 1), arch, constants=constants, schedules=SCHEDULES)
    rounded = torch.bfloat16 if dtype is torch.float32 else torch.float32  # TF32 has few more bits than bfloat16
    assert_close(c.to(rounded), a.double() @ b.double(), name="matmul")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_and_atomics(dtype: torch.dtype, arch: int):
    x = random(16, 197, dtype=dtype)
    index, count, total = torch.empty(16, dtype=torch.int32), torch.zeros(197, dtype=torch.int32), torch.zeros(1)
    execute(kernels.argmax_count, [x, index, count, total, 197, 197], 16, arch, constants={"block": 256})
    assert torch.equal(index.long(), x.float().argmax(-1))
    assert torch.equal(count.long(), torch.bincount(index.long(), minlength=197))
    assert_close(total, x.double().amax(-1).sum()[None], name="sum of maxima")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_atomic_addition_of_rows(dtype: torch.dtype, arch: int):
    source = torch.randint(-4, 5, (16, 96), generator=torch.Generator().manual_seed(1)).to(dtype)
    index = torch.arange(16, dtype=torch.int32) % 3
    target = torch.zeros(3, 96, dtype=dtype)
    execute(kernels.scatter_rows, [source, target, index, 96], 16, arch, constants={"block": 128})
    assert_identical(
        target, torch.zeros(3, 96, dtype=torch.float64).index_add_(0, index.long(), source.double()).to(dtype)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scan_and_sort(dtype: torch.dtype, arch: int):
    x = torch.randint(-4, 5, (128,), generator=torch.Generator().manual_seed(2)).to(dtype)
    sums, ordered = torch.empty_like(x), torch.empty_like(x)
    execute(kernels.scan_sort, [x, sums, ordered], 1, arch, constants={"block": 128}, schedules=SCHEDULES)
    assert_identical(ordered, x.sort().values, name="sort")
    assert_identical(sums, x.double().cumsum(0).to(dtype), name="cumsum")


def test_bfloat16_addition_is_right_where_tritons_interpreter_is_not(arch: int):
    """TRITON_INTERPRET adds the bit patterns of bfloat16 numbers: never test bfloat16 with it."""
    a, b = random(128, dtype=torch.bfloat16), random(128, dtype=torch.bfloat16) * 3
    y = torch.empty_like(a)
    execute(kernels.add_halves, [a, b, y], 1, arch, constants={"block": 128})
    assert_identical(y, a + b)
    if arch != ARCHITECTURES[0]:
        return
    script = (
        "import torch, triton_kernels as k\n"
        "a = torch.full((128,), 1.5, dtype=torch.bfloat16); y = torch.empty_like(a)\n"
        "k.add_halves[(1,)](a, a, y, block=128)\n"
        "print(bool((y == 3).all()))\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False", "the interpreter has learnt bfloat16: say so in README.md"

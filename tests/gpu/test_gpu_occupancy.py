"""gates.occupancy counts as NVIDIA's own header does, and its budgets are the largest that keep what is counted."""

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
from gates import occupancy
from gates.occupancy import KIB, MULTIPROCESSORS, blocks_per_multiprocessor

# The header knows how resources are handed out and how many blocks fit at most; the sizes come from the device, so here
# from the table under test, which the second test compares with published figures.
PROGRAM = r"""
#include <cuda_runtime_api.h>
#include <cuda_occupancy.h>
#include <cstdio>
#include <cstring>

int main() {
  int arch, warps, all, per_block, reserved, threads, registers, shared;
  while (scanf("%d %d %d %d %d", &arch, &warps, &all, &per_block, &reserved) == 5 &&
         scanf("%d %d %d", &threads, &registers, &shared) == 3) {
    cudaOccDeviceProp device = {};
    device.computeMajor = arch / 10;
    device.computeMinor = arch % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = 32 * warps;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 48 << 10;
    device.sharedMemPerBlockOptin = per_block;
    device.sharedMemPerMultiprocessor = all;
    device.reservedSharedMemPerBlock = reserved;
    device.numSms = 100;
    cudaOccFuncAttributes kernel;
    memset(&kernel, 0, sizeof kernel);
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.maxDynamicSharedSizeBytes = shared;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    memset(&state, 0, sizeof state);
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared);
    printf("%d\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
  }
}
"""


def kernels() -> list[tuple[int, int, int, int]]:
    """Architecture, threads, registers and shared memory of kernels that meet every limit."""
    choose = random.Random(0)
    found = []
    for arch, limits in MULTIPROCESSORS.items():
        for threads in (1, 32, 33, 96, 128, 256, 512, 1000, 1024):
            for registers in (1, 8, 16, 32, 33, 40, 63, 64, 65, 96, 128, 168, 255):
                most = limits.shared_per_block
                shares = (0, 1, 4096, 48 * KIB, most - 1, most, most + 1, choose.randrange(most))
                found += [(arch, threads, registers, shared) for shared in shares]
    return found


@pytest.fixture(scope="module")
def by_nvidia(tmp_path_factory) -> dict[tuple[int, int, int, int], int]:
    include = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (include / "cuda_occupancy.h").exists():
        pytest.skip(f"needs a CUDA toolkit for cuda_occupancy.h; there is none in {include} (CUDA_HOME names another)")
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("needs a C++ compiler: apt install g++")
    program = tmp_path_factory.mktemp("occupancy") / "occupancy"
    command = [compiler, "-x", "c++", "-w", f"-I{include}", "-", "-o", str(program)]
    subprocess.run(command, input=PROGRAM, text=True, check=True)
    lines = []
    for arch, *kernel in kernels():
        limits = MULTIPROCESSORS[arch]
        device = (arch, limits.warps, limits.shared, limits.shared_per_block, limits.reserved)
        lines.append(" ".join(map(str, (*device, *kernel))))
    output = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    return dict(zip(kernels(), map(int, output.split()), strict=True))


@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_as_many_blocks_fit_as_nvidia_says(by_nvidia, arch):
    wrong = {
        kernel: (blocks_per_multiprocessor(*kernel), blocks)
        for kernel, blocks in by_nvidia.items()
        if kernel[0] == arch and blocks_per_multiprocessor(*kernel) != blocks
    }
    assert not wrong, f"(arch, threads, registers, shared): (ours, NVIDIA's): {wrong}"


PUBLISHED = {  # threads, blocks, KiB of shared memory, most KiB for one block, KiB that the driver takes for each
    75: (1024, 16, 64, 64, 0),
    80: (2048, 32, 164, 163, 1),
    86: (1536, 16, 100, 99, 1),
    89: (1536, 24, 100, 99, 1),
    90: (2048, 32, 228, 227, 1),
    100: (2048, 32, 228, 227, 1),
    120: (1536, 24, 100, 99, 1),
}


@pytest.mark.parametrize("arch", MULTIPROCESSORS)
def test_the_limits_are_those_of_the_tuning_guides(arch):
    limits = MULTIPROCESSORS[arch]
    shared = [size / KIB for size in (limits.shared, limits.shared_per_block, limits.reserved)]
    assert (32 * limits.warps, limits.blocks, *shared) == PUBLISHED[arch]


@pytest.mark.parametrize(("arch", "threads", "registers", "shared"), kernels()[::37])
def test_budgets_are_the_most_that_keeps_as_many_blocks(arch, threads, registers, shared):
    blocks = blocks_per_multiprocessor(arch, threads, registers, shared)
    if blocks == 0:
        return
    most_registers = occupancy.register_budget(arch, threads, blocks)
    most_shared = occupancy.shared_budget(arch, blocks)
    assert registers <= most_registers
    assert shared <= most_shared
    assert blocks_per_multiprocessor(arch, threads, most_registers, most_shared) >= blocks
    assert blocks_per_multiprocessor(arch, threads, most_registers + 1, shared) < blocks or most_registers == 255
    assert blocks_per_multiprocessor(arch, threads, registers, most_shared + 1) < blocks


def test_occupancy_is_the_share_of_warps():
    assert occupancy.occupancy(90, 128, 16) == 1.0
    assert occupancy.occupancy(80, 256, 4) == 0.5
    assert occupancy.occupancy(80, 33, 32) == 1.0  # a started warp is a whole one

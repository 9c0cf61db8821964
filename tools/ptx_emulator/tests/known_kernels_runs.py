"""Known kernels with small inputs: how to run a text of each, and what comes out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from compiled_sources import ptx
from ptx_emulator import Emulator


@dataclass(frozen=True)
class Known:
    """``run(text, emulator)`` executes a text of the kernel and gives its results."""

    name: str
    text: str
    run: Callable[[str, Emulator], list[torch.Tensor]]
    truth: list[torch.Tensor]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def whole(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-6, 7, shape, generator=torch.Generator().manual_seed(seed)).float()


def nan(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"))


def cuda(name: str, arch: int) -> Known:
    text = ptx("known_kernels/kernels.cu", arch)
    return {"softmax": _softmax, "matmul": _matmul, "row_maxima": _row_maxima, "matmul_bf16": _matmul_bf16}[name](text)


def _softmax(text: str) -> Known:
    x = random(2, 197).bfloat16()

    def run(text: str, emulator: Emulator) -> list[torch.Tensor]:
        y = torch.full_like(x, float("nan"))
        emulator.launch(text, "softmax", 2, 128, [x, y, 197])
        return [y]

    return Known("softmax", text, run, [x.double().softmax(-1)])


def _matmul(text: str) -> Known:
    a, b = whole(20, 40, seed=1), whole(40, 18, seed=2)

    def run(text: str, emulator: Emulator) -> list[torch.Tensor]:
        c = nan(20, 18)
        emulator.launch(text, "matmul", (2, 2), (16, 16), [a, b, c, 20, 18, 40])
        return [c]

    return Known("matmul", text, run, [a @ b])


def _row_maxima(text: str) -> Known:
    x = random(3, 200, seed=3)

    def run(text: str, emulator: Emulator) -> list[torch.Tensor]:
        indices, counts = torch.full((3,), -1, dtype=torch.int32), torch.zeros(200, dtype=torch.int32)
        total = torch.zeros(1)
        emulator.launch(text, "row_maxima", 3, 128, [x, indices, counts, total, 200], shared=1024)
        return [indices, counts, total]

    indices = x.argmax(1)
    counts = torch.bincount(indices, minlength=200)
    return Known("row_maxima", text, run, [indices, counts, x.double().amax(1).sum()[None]])


def _matmul_bf16(text: str) -> Known:
    a, b = whole(32, 64, seed=4).bfloat16(), whole(64, 16, seed=5).bfloat16()

    def run(text: str, emulator: Emulator) -> list[torch.Tensor]:
        c = nan(32, 16)
        emulator.launch(text, "matmul_bf16", (2, 1), 64, [a, b, c, 16, 64])
        return [c]

    return Known("matmul_bf16", text, run, [a.float() @ b.float()])


@cache
def triton(name: str, arch: int) -> Known:
    import triton_kernels as kernels

    fresh, truth, constants, grid = {
        "softmax": _triton_softmax,
        "matmul": _triton_matmul,
        "argmax_count": _triton_argmax,
        "scan_sort": _triton_scan_sort,
    }[name]()
    arguments, _ = fresh()
    compiled, _ = kernels.compile_for(getattr(kernels, name), arguments, arch, **constants)

    def run(text: str, emulator: Emulator) -> list[torch.Tensor]:
        arguments, results = fresh()
        _, left = kernels.compile_for(getattr(kernels, name), arguments, arch, **constants)
        kernels.run_on(emulator, compiled, left, grid, ptx=text)
        return results

    return Known(name, compiled.ptx, run, truth)


def _triton_softmax():
    x = random(2, 197, seed=6)

    def fresh():
        y = nan(2, 197)
        return [x, y, 197, 197], [y]

    return fresh, [x.double().softmax(-1)], {"block": 256}, 2


def _triton_matmul():
    a, b = whole(64, 96, seed=7).bfloat16(), whole(96, 64, seed=8).bfloat16()

    def fresh():
        c = nan(64, 64)
        return [a, b, c, 64, 64, 96, 96, 1, 64, 1, 64, 1], [c]

    return fresh, [a.float() @ b.float()], {"bm": 64, "bn": 64, "bk": 32}, (1, 1)


def _triton_argmax():
    x = random(3, 197, seed=9)

    def fresh():
        index, count = torch.full((3,), -1, dtype=torch.int32), torch.zeros(197, dtype=torch.int32)
        total = torch.zeros(1)
        return [x, index, count, total, 197, 197], [index, count, total]

    index = x.argmax(1)
    truth = [index, torch.bincount(index, minlength=197), x.double().amax(1).sum()[None]]
    return fresh, truth, {"block": 256}, 3


def _triton_scan_sort():
    x = whole(128, seed=10) + random(128, seed=11) / 16

    def fresh():
        sums, ordered = nan(128), nan(128)
        return [x, sums, ordered], [sums, ordered]

    return fresh, [x.double().cumsum(0), x.sort().values], {"block": 128}, 1

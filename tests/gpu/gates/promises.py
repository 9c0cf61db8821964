"""How an operator says what its kernels promise. One entry per operator, in ``gates/cases/<family>.py``.

Formulas take a `Problem` and use the sizes that the entry itself names: ``lambda p: p.B * p.N * p.D * p.element``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Problem:
    """The sizes of one problem as attributes, its element type, and tensors to run it on."""

    def __init__(self, sizes: Mapping[str, int], dtype: str, arch: int = 0) -> None:
        vars(self).update(sizes)
        self.dtype = dtype
        self.arch = arch
        self.element = DTYPES[dtype].itemsize  # bytes per element
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int) -> Tensor:
        """Normally distributed numbers in the problem's dtype."""
        return torch.randn(shape, generator=self._generator).to(DTYPES[self.dtype])

    def positive(self, *shape: int) -> Tensor:
        """float32 between 0.5 and 1.5, such as weights of which none is 0."""
        return 0.5 + torch.rand(shape, generator=self._generator)

    def __getattr__(self, name: str) -> Any:  # only for names that are not there
        raise AttributeError(f"the problem has no size {name!r}; it has {sorted(vars(self))}")


Formula = Callable[[Problem], int]
Condition = Callable[[Problem], bool]


def never(problem: Problem) -> bool:
    return False


def always(problem: Problem) -> bool:
    return True


def reserves_tensor_memory(problem: Problem) -> bool:
    """Tensor memory is reserved by atomic instructions, on integers, and of our architectures only sm_100 has it."""
    return problem.arch == 100


@dataclass(frozen=True)
class Kernel:
    """What one kernel promises, under one name in Triton and in CUDA C++."""

    name: str
    bytes: Formula
    """Bytes it cannot avoid: each of its inputs read once, each of its results written once."""
    macs: Formula = lambda p: 0
    """Multiply-adds that the result needs; what padding and recomputation add does not count."""
    tensor_cores: Condition = never
    """Whether the multiply-adds run on tensor cores. One that says no must not use them: that would be TF32."""
    wide_loads: Condition = never
    """Whether rows are read 16 bytes at a time."""
    wide_stores: Condition = never
    atomics: Condition = never
    """Whether it uses atomic instructions, whose order, and with floats whose result, changes from run to run."""
    runs: Condition = always
    """Whether the problem needs this kernel at all."""
    backends: tuple[str, ...] = ("triton", "cuda")


@dataclass(frozen=True)
class Unit:
    """What the work of an operator is counted in."""

    name: str
    count: Formula
    """How many of them a problem has."""
    grows: tuple[str, ...] = ("B",)
    """The sizes that make more of them and change none."""


IMAGE = Unit("image", lambda p: p.B)


@dataclass(frozen=True, eq=False)
class Operator:
    """A primitive of ``torch.ops.mlip_kernels``, the problems that stand for all others, and its kernels."""

    name: str
    call: Callable[[Problem], Any]
    """Runs the operator once on tensors of the problem."""
    bytes: Formula
    """Compulsory traffic of the whole operator, as the table in the kernels' header states it."""
    kernels: tuple[Kernel, ...]
    problems: Mapping[str, Mapping[str, int]]
    """Name -> sizes. Small enough to be emulated; together they launch every instance of every kernel. The first is
    the one that the report shows."""
    full_size: Mapping[str, int]
    """Sizes from training, for the lower bound on time and for the model."""
    dtypes: tuple[str, ...] = field(default=tuple(DTYPES))
    unit: Unit = IMAGE

    def kernel(self, name: str, backend: str) -> Kernel:
        """The promise of kernel ``name`` on ``backend``; KeyError if there is none."""
        return {kernel.name: kernel for kernel in self.kernels if backend in kernel.backends}[name]

    def grown(self, problem: str, dtype: str, arch: int) -> Problem:
        """As many units as training has, each as large as in one of the problems."""
        more = {name: self.full_size[name] for name in self.unit.grows}
        return Problem({**self.problems[problem], **more}, dtype, arch)

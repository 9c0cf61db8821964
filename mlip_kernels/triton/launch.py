"""Launching Triton kernels with little time on the host.

``kernel[grid](...)`` binds and specialises its arguments anew at every launch, which takes longer than a small kernel
runs. `launch` does so for the first of equal launches, and keeps the compiled kernel. The integer functions are those
of ``triton``, which takes 20 times as long for them outside of kernels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import triton
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])

MOST_LAUNCHES = 1024
"""Different launches of a kernel that are kept. Shapes that vary without end begin anew."""
POINTER_ALIGNMENT = 16  # bytes: what Triton compiles a version of a kernel for
KEPT = "_launches"
"""Attribute of a kernel: compiled kernel and constants, in the order of its parameters, for equal launches."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """``kernel[grid](*arguments, **constants)`` on the current stream.

    A launch equals an earlier one if its tensors have the same dtypes, its other arguments and constants the same
    values, and all tensors are aligned. Those that are not take Triton's own road.

    Args:
        kernel: function under ``@triton.jit``.
        grid: programs along one to three axes.
        arguments: the leading parameters: tensors, None for those left out, integers and floats.
        constants: the ``tl.constexpr`` parameters, and options such as ``num_warps``.
    """
    if not isinstance(kernel, triton.JITFunction):  # but a function of Triton's interpreter
        kernel[grid](*arguments, **constants)
        return
    addresses = 0
    key = [triton.runtime.driver.active.get_current_device()]
    for argument in arguments:
        if isinstance(argument, Tensor):
            addresses |= argument.data_ptr()
            key.append(argument.dtype)
        else:
            key.append(argument)
    if addresses % POINTER_ALIGNMENT:
        kernel[grid](*arguments, **constants)
        return
    key.extend(constants.items())
    launches = vars(kernel).setdefault(KEPT, {})
    kept = launches.get(name := tuple(key))
    if kept is not None:
        compiled, rest = kept
        compiled[(*grid, 1, 1)](*arguments, *rest)
        return
    compiled = kernel[grid](*arguments, **constants)
    if len(launches) >= MOST_LAUNCHES:
        launches.clear()
    launches[name] = compiled, tuple(constants[parameter.name] for parameter in kernel.params[len(arguments) :])


def planned(function: F) -> F:
    """Keep what ``function`` returns for the last shapes: how a launch is cut up depends on nothing else."""
    return functools.lru_cache(maxsize=1024)(function)  # type: ignore[return-value]


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


def next_power_of_2(number: int) -> int:
    """The smallest power of 2 that is at least ``number``; 1 for numbers below."""
    return 1 << max(number - 1, 0).bit_length()

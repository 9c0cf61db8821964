"""The table of operators on the device: against float64 there, and twice for equal bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from operators import OPERATORS, Case, assert_right

from gpu_check.record import Recorder
from mlip_kernels.testing import assert_identical

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def table(device: torch.device, *dtypes: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Every row and sample, on the device, by name."""
    for operator in OPERATORS:
        for dtype in dtypes:
            for sample, arguments in operator.samples(dtype).items():
                name = f"{operator.name}, {sample}, {str(dtype).removeprefix('torch.')}"
                yield name, Case(operator, sample, arguments).map(lambda t: t.to(device))


def run(recorder: Recorder, device: torch.device, only: str | None = None) -> None:
    """Record for every case whether it is right, and whether a second call gives the same bits."""
    for name, case in table(device, *DTYPES):
        if only is not None and only not in name:
            continue
        with recorder.case(name) as facts:
            inputs = [x.clone() for x in case.inputs]
            found = case.comparable()
            assert_right(case, found)
            again: list[Any] = case.comparable()
            for one, other in zip(found, again, strict=True):
                assert_identical(one, other)
            for now, before in zip(case.inputs, inputs, strict=True):
                assert_identical(now, before)
            facts["right"] = True

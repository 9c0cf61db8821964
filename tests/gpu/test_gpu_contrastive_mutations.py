"""Faults planted in Triton's contrastive kernels are caught, each by the check that should catch it.

A mutation changes one place of a kernel's source. The changed copy is compiled and run as the real one is.
"""

import sys
from pathlib import Path

import pytest
from test_gpu_contrastive import (
    BRAIN,
    ODD,
    assert_same_maxima,
    backward,
    backward_arguments,
    double,
    forward,
    problem,
    reference,
)

import mlip_kernels
from mlip_kernels import _library
from mlip_kernels.testing import assert_as_accurate

SOURCES = Path(mlip_kernels.__file__).parent / "triton" / "contrastive"
MANY_ROWS = (2, 70, 3, 17, 16)
WRONG, NOTHING = "wrong result", "nothing"
MUTATIONS = {  # file, before, after, how it is caught
    "unchanged": ("token_maxima", "", "", NOTHING),
    "masked tokens of a text win": (
        "token_maxima",
        "tl.where(row[:, None] & real[None, :], similarity",
        "tl.where(row[:, None], similarity",
        WRONG,
    ),
    "the last of equals wins": ("token_maxima", "(new > old)", "(new >= old)", WRONG),
    "the next row of tiles forgets the one before": ("token_maxima", "_beats(found, before) |", "True |", WRONG),
    "no bound on the tokens that are written": (
        "token_maxima",
        "stored = (n < N)",
        "stored = (n < N + ROWS)",
        "out_of_bounds",
    ),
    "unchanged gradient": ("token_maxima_backward", "", "", NOTHING),
    "the winner's neighbour": ("token_maxima_backward", "(first_column + tl.", "(first_column + 1 + tl.", WRONG),
    "images and texts change places": ("token_maxima_backward", "b * mean_strides[0]", "b * mean_strides[1]", WRONG),
    "no bound on the channels of the gradient": (
        "token_maxima_backward",
        "mask=(n < N)[:, None] & (d < D)[None, :]",
        "mask=(n < N)[:, None] & (d < D + 1)[None, :]",
        "out_of_bounds",
    ),
}


def install(name, folder, monkeypatch):
    """Make the launchers those of the mutated source; what is changed must be there, and only once."""
    file, before, after, _ = MUTATIONS[name]
    source = (SOURCES / f"{file}.py").read_text(encoding="utf-8")
    if before:
        assert source.count(before) == 1, f"{name}: not once in {file}.py"
    module = f"{file}_{folder.name}"
    changed, text = folder / f"{module}.py", source.replace(before, after) if before else source
    if not changed.exists() or changed.read_text(encoding="utf-8") != text:  # what was compiled from it stays, too
        changed.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(_library._triton_kernels, f"contrastive_{file}", f"{module}:{file}")


def outcome(gradient):
    """How a run ends: the kinds of its faults, or a wrong result, or nothing to be said."""
    from emulated_cuda import EmulatedCuda
    from ptx_emulator import EmulatorError

    cuda = EmulatedCuda("triton", 80)
    for shape in (ODD, MANY_ROWS):
        arguments = problem(*shape, dtype=BRAIN)
        try:
            if gradient:
                maps = reference.token_maxima(*arguments, True, False)[2:4]
                given, _ = backward_arguments(arguments, *maps)
                baseline, truth = (reference.token_maxima_backward(*one) for one in (given, double(given)))
                assert_as_accurate(backward(cuda, given), baseline, truth)
            else:
                assert_same_maxima(forward(cuda, arguments), arguments)
        except EmulatorError as failure:
            return failure.kinds
        except AssertionError:
            return {WRONG}
    return {NOTHING}


@pytest.mark.parametrize("name", MUTATIONS)
def test_planted_faults_are_caught(name, needs_emulated, request, monkeypatch):
    needs_emulated("triton")
    install(name, request.config.cache.mkdir(f"contrastive_mutation_{list(MUTATIONS).index(name)}"), monkeypatch)
    assert MUTATIONS[name][3] in outcome("backward" in MUTATIONS[name][0])

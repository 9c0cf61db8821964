"""Faults planted in the CUDA C++ kernels that choose which tokens merge are caught, each as what it is.

A mutation changes one place of the source, of which only what computes on float32 is compiled.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from test_gpu_merging import assert_plan_of_reference, masks, metrics

import mlip_kernels

SOURCES = Path(mlip_kernels.__file__).parents[1] / "csrc" / "cuda" / "merging"
HALF_PRECISION = ("launch(__half{})", "launch(__nv_bfloat16{})")
WRONG, RACE, NOTHING = "wrong result", "global_race", "nothing"


@dataclass(frozen=True)
class Mutation:
    """``after`` in the place of ``before`` is seen as ``caught``: a kind of fault, or a wrong result."""

    name: str
    before: str
    after: str
    caught: str


MUTATIONS = (
    Mutation("unchanged", "", "", NOTHING),
    Mutation("piece replaced too early", "__syncthreads();  // the piece has been read", "", "shared_race"),
    Mutation("candidates not waited for", "__syncthreads();  // candidates are there", "", "shared_race"),
    Mutation("tile replaced too early", "__syncthreads();  // the tile may be replaced", "", "shared_race"),
    Mutation("targets not waited for", "__syncthreads();  // the places of targets are there", "", RACE),
    Mutation("mask dropped", "squares && p.real(b, n) ? scale", "squares ? scale", WRONG),
    Mutation("products believed", "least -= margin;", "", WRONG),
    Mutation("tie to the highest target", "cosine > similarity", "cosine >= similarity", WRONG),
    Mutation("tie to the highest source", "source <= last", "source > last", WRONG),
    Mutation("merged rows dropped", "fate != MERGED && own >= outputs", "own >= outputs", WRONG),
)  # fmt: skip


def mutated(mutation):
    """The source with its headers and the mutation; it must be there, and only once."""
    from emulated_cuda.cuda_library import inlined

    source = inlined(SOURCES / "match.cu")
    for launch in HALF_PRECISION:
        source = source.replace(launch, "launch(float{})")
    if mutation.before:
        assert source.count(mutation.before) == 1, f"{mutation.name}: not once in the source"
        source = source.replace(mutation.before, mutation.after)
    return source


def replaced(text, request, name):
    """The source and another one in its place; a file that is right already is left alone."""
    file = request.config.cache.mkdir(f"merging_match_mutation_{name}") / "match.cu"
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return {SOURCES / "match.cu": file}


def check(cuda):
    mask = masks(2, 151, 0.6)
    for kind, tokens, width in (("similar", 50, 100), ("few values", 150, 9), ("few values", 150, 2)):
        metric = metrics(kind, 2, tokens, width)
        for given in (None, mask[:, :tokens]):
            assert_plan_of_reference(cuda, metric, {"r": tokens // 3, "mask": given})


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name.replace(" ", "_"))
def test_planted_faults_are_caught(mutation, needs_emulated, request):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda
    from ptx_emulator import EmulatorError

    sources = replaced(mutated(mutation), request, MUTATIONS.index(mutation))
    try:
        check(EmulatedCuda("cuda", 80, sources=sources))
        outcome = {NOTHING}
    except EmulatorError as failure:
        outcome = failure.kinds
    except AssertionError:
        outcome = {WRONG}
    assert mutation.caught in outcome


def test_without_tensor_cores_and_copies_in_the_background(needs_emulated, request):
    """What is compiled for sm_75, whose PTX the emulator does not take, compiled for sm_80, in less shared memory."""
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda
    from emulated_cuda.cuda_library import inlined

    old = inlined(SOURCES / "match.cu").replace("__CUDA_ARCH__ >= 800", "false")
    old = old.replace(HALF_PRECISION[0], "launch(float{})")
    sources = replaced(old, request, "without_tensor_cores")
    cuda = EmulatedCuda("cuda", 80, sources=sources, sized_as=75)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (9, 72):
            assert_plan_of_reference(cuda, metrics("similar", 2, 150, width, dtype=dtype), {"r": 40})
    assert not any("mma" in opcode or "cp.async.cg" in opcode for opcode in cuda.launches[0].opcodes)


def test_a_mutation_of_text_that_is_gone_is_an_error():
    with pytest.raises(AssertionError, match="not once in"):
        mutated(replace(MUTATIONS[2], before="no such line"))

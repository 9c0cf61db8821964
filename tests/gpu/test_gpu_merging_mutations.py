"""Faults planted in the CUDA C++ kernels of token merging are caught, each by the check that should catch it.

A mutation changes one place of the source, of which only what computes on float32 is compiled.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from test_gpu_merging import assert_plan_of_reference, assert_rows_of_reference, masks, metrics, random

import mlip_kernels
from mlip_kernels import merge_plan

SOURCES = Path(mlip_kernels.__file__).parents[1] / "csrc" / "cuda" / "merging"
HEADERS = {"match": ("merging/similarities.cuh", "merging/maps.cuh", "mma.cuh"), "merge": ()}
FLOAT32_ALONE = (
    ("match_as<__half>", "match_as<float>"),
    ("match_as<__nv_bfloat16>", "match_as<float>"),
    ("function<__half, 8>", "function<float, 4>"),
    ("function<__half, 1>", "function<float, 1>"),
    ("function<__nv_bfloat16, 8>", "function<float, 4>"),
    ("function<__nv_bfloat16, 1>", "function<float, 1>"),
)
WRONG, RACE, NOTHING = "wrong result", "global_race", "nothing"


@dataclass(frozen=True)
class Mutation:
    """``after`` in the place of ``before``, in a kernel, is seen as ``caught``: a kind of fault, or a wrong result."""

    name: str
    kernel: str
    before: str
    after: str
    caught: str


MUTATIONS = (
    Mutation("unchanged", "match", "", "", NOTHING),
    Mutation("unchanged", "merge", "", "", NOTHING),
    Mutation("piece replaced too early", "match", "__syncthreads();  // the piece has been read", "", "shared_race"),
    Mutation("candidates not waited for", "match", "__syncthreads();  // candidates are there", "", "shared_race"),
    Mutation("tile replaced too early", "match", "__syncthreads();  // the tile may be replaced", "", "shared_race"),
    Mutation("targets not waited for", "match", "__syncthreads();  // the places of targets are there", "", RACE),
    Mutation("mask dropped", "match", "squares && p.real(b, n) ? scale", "squares ? scale", WRONG),
    Mutation("products believed", "match", "least -= margin;", "", WRONG),
    Mutation("tie to the highest target", "match", "cosine > similarity", "cosine >= similarity", WRONG),
    Mutation("tie to the highest source", "match", "source <= last", "source > last", WRONG),
    Mutation("merged rows dropped", "match", "fate != MERGED && own >= outputs", "own >= outputs", WRONG),
    Mutation(
        "list not waited for",
        "merge",
        "__syncthreads();  // the numbers may be replaced, and the list may be read",
        "",
        "shared_race",
    ),
    Mutation("dropped rows taken in", "merge", "if (own && sample.lost(n)) {", "if (false) {", WRONG),
    Mutation("rows of another block", "merge", "int(sample.assignment[n]) - first", "int(sample.assignment[n])", RACE),
    Mutation("padding counted", "merge", "p.mask && !p.mask[output] ? 0.0f", "false ? 0.0f", WRONG),
    Mutation("dropped rows filled", "merge", "if (!there[i]) {", "if (false) {", WRONG),
    Mutation("one row too many", "merge", "if (i >= count) break;", "", "out_of_bounds"),
)  # fmt: skip


def whole(kernel):
    """The source of a kernel with its headers."""
    source = (SOURCES / f"{kernel}.cu").read_text(encoding="utf-8")
    for name in HEADERS[kernel]:
        header = (SOURCES.parent / name).read_text(encoding="utf-8").replace("#pragma once\n", "")
        source = source.replace(f'#include "cuda/{name}"\n', header)
    return source


def mutated(mutation):
    """The source with the mutation; it must be there, and only once."""
    source = whole(mutation.kernel)
    for before, after in FLOAT32_ALONE:
        source = source.replace(before, after)
    if mutation.before:
        assert source.count(mutation.before) == 1, f"{mutation.name}: not once in the source"
        source = source.replace(mutation.before, mutation.after)
    return source


def replaced(kernel, text, request, name):
    """The file of a kernel and another one in its place; one that is right already is left alone."""
    original = SOURCES / f"{kernel}.cu"
    file = request.config.cache.mkdir(f"merging_mutation_{name}") / original.name
    if not file.exists() or file.read_text(encoding="utf-8") != text:
        file.write_text(text, encoding="utf-8")
    return {original: file}


def check(cuda, kernel):
    mask = masks(2, 151, 0.6)
    if kernel == "match":
        for kind, tokens, width in (("similar", 50, 100), ("few values", 150, 9), ("few values", 150, 2)):
            metric = metrics(kind, 2, tokens, width)
            for given in (None, mask[:, :tokens]):
                assert_plan_of_reference(cuda, metric, {"r": tokens // 3, "mask": given})
        return
    plan = merge_plan(random(2, 151, 1), 60, mask=mask)
    x, y = random(2, 151, 9), random(2, 91, 9, seed=1)
    assert_rows_of_reference(cuda, x, y, plan, random(2, 151, seed=2).abs())


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: f"{m.kernel}-{m.name.replace(' ', '_')}")
def test_planted_faults_are_caught(mutation, needs_emulated, request):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda
    from ptx_emulator import EmulatorError

    sources = replaced(mutation.kernel, mutated(mutation), request, MUTATIONS.index(mutation))
    try:
        check(EmulatedCuda("cuda", 80, sources=sources), mutation.kernel)
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

    old = whole("match").replace("__CUDA_ARCH__ >= 800", "false").replace("match_as<__half>", "match_as<float>")
    sources = replaced("match", old, request, "without_tensor_cores")
    cuda = EmulatedCuda("cuda", 80, sources=sources, sized_as=75)
    for dtype in (torch.float32, torch.bfloat16):
        for width in (9, 72):
            assert_plan_of_reference(cuda, metrics("similar", 2, 150, width, dtype=dtype), {"r": 40})
    assert not any("mma" in opcode or "cp.async.cg" in opcode for opcode in cuda.launches[0].opcodes)


def test_a_mutation_of_text_that_is_gone_is_an_error():
    with pytest.raises(AssertionError, match="not once in"):
        mutated(replace(MUTATIONS[2], before="no such line"))

"""Faults planted in the CUDA C++ kernels that merge rows are caught, each by the check that should catch it.

A mutation changes one place of the source. The changed copy is compiled and run as the real one is.
"""

from pathlib import Path

import pytest
from test_gpu_merging_rows import assert_same_bits, crowded, matching, random, sizes

import mlip_kernels

SOURCE = Path(mlip_kernels.__file__).parents[1] / "csrc" / "cuda" / "merging" / "merge.cu"
PROBLEMS = (
    (matching(2, 21, 9), 40),
    (matching(2, 40, 18, masked=True), 40),
    (matching(1, 20, 0), 40),
    (crowded(1, 2100, 1045), 4),
)
WRONG, NOTHING = "wrong result", "nothing"
MUTATIONS = {  # before, after, how it is caught
    "unchanged": ("", "", NOTHING),
    "no barrier behind the counts": (
        "shared.found[warp] = __popc(own);\n      __syncthreads();",
        "shared.found[warp] = __popc(own);",
        "shared_race",
    ),
    "counts replaced too early": ("__syncthreads();  // `found` may be replaced", "", "shared_race"),
    "no barrier behind the kept rows": ("__syncthreads();  // where nothing is removed", "//", "shared_race"),
    "no barrier behind the sizes": ("__syncthreads();  // all rows are weighed", "", "shared_race"),
    "the list overflows": (" && position < LISTED", "", "out_of_bounds"),
    "a list that is too short is trusted": ("listed = before <= LISTED;", "listed = true;", "shared_race"),
    "dropped rows are merged": ("if (row >= 0 && dropped(n)) {", "if (false) {", WRONG),
    "dropped rows are spread": ("p.dropped && p.dropped[first + lane]", "false", WRONG),
    "masked rows count": ("MERGE && p.mask && !p.mask[o]", "false", WRONG),
    "rows of size 0 vanish": ("total > 0.0f ? size / divisor : 1.0f", "size / divisor", WRONG),
    "products are not rounded": ("__fadd_rn(sums[k][v], product)", "fmaf(weight, values[k][v], sums[k][v])", WRONG),
    "terms in the order of votes from behind": (
        "owned &= owned - 1) {\n        const int source = __ffs(owned) - 1;",
        "owned &= ~(1u << (31 - __clz(owned)))) {\n        const int source = 31 - __clz(owned);",
        WRONG,
    ),
    "no bound on the channels of a sum": (
        "if (at < p.channels) store<V>(to + at, sums[k]);",
        "store<V>(to + at, sums[k]);",
        "out_of_bounds",
    ),
    "no bound on the rows of spread": (
        "i < SPREAD_ROWS && first + i < total",
        "i < SPREAD_ROWS",
        "out_of_bounds",
    ),
    "the weight of the next row": ("__shfl_sync(~0u, own_weight, i)", "__shfl_sync(~0u, own_weight, i + 1)", WRONG),
}


def outcome(cuda):
    """How a run ends: the kinds of its faults, or a wrong result, or nothing to be said."""
    from ptx_emulator import EmulatorError

    for plan, channels in PROBLEMS:
        batch, tokens = plan.assignment.shape
        x, y = random(batch, tokens, channels), random(batch, plan.kept.shape[1], channels, seed=1)
        try:
            assert_same_bits(cuda, x, y, sizes(batch, tokens), plan)
        except EmulatorError as failure:
            return failure.kinds
        except AssertionError:
            return {WRONG}
    return {NOTHING}


@pytest.mark.parametrize("name", MUTATIONS, ids=lambda name: name.replace(" ", "_"))
def test_planted_faults_are_caught(name, needs_emulated, request):
    needs_emulated("cuda")
    from emulated_cuda import EmulatedCuda

    before, after, caught = MUTATIONS[name]
    source = SOURCE.read_text(encoding="utf-8")
    assert not before or source.count(before) == 1, f"{name}: not once in {SOURCE.name}"
    folder = request.config.cache.mkdir(f"merging_rows_mutation_{list(MUTATIONS).index(name)}")
    file, mutated = folder / SOURCE.name, source.replace(before, after) if before else source
    if not file.exists() or file.read_text(encoding="utf-8") != mutated:  # what was compiled from it stays, too
        file.write_text(mutated, encoding="utf-8")
    assert caught in outcome(EmulatedCuda("cuda", 80, sources={SOURCE: file}))

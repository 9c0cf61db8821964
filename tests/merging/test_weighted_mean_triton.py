"""The Triton kernels of weighted_mean compile for GPUs that are not here, and divide their work by the shape alone."""

import pytest

triton = pytest.importorskip("triton", reason="needs Triton: pip install triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from mlip_kernels.triton.merging import weighted_mean as kernels  # noqa: E402

ELEMENTS = ("fp32", "fp16", "bf16")
BLOCKS = {"BLOCK_N": kernels.BLOCK_N, "BLOCK_D": kernels.BLOCK_D}


def compile_for(kernel, architecture, pointers, constants):
    """PTX and metadata of ``kernel``, with pointers aligned as torch allocates them."""
    names = kernel.arg_names
    signature = {name: pointers.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": kernels.NUM_WARPS})


def variants(element):
    x, f = f"*{element}", "*fp32"
    sums = {"x": x, "weight": f, "mean": x, "total": f}
    yield kernels.weighted_mean_sums_forward_kernel, sums, {"HAS_WEIGHT": True, "SPLIT": False, **BLOCKS}
    yield kernels.weighted_mean_sums_forward_kernel, {**sums, "mean": f}, {"HAS_WEIGHT": False, "SPLIT": True, **BLOCKS}
    finish = {"partial": f, "partial_total": f, "mean": x, "total": f}
    yield kernels.weighted_mean_finish_forward_kernel, finish, {"BLOCK_D": kernels.BLOCK_D}
    backward = {"grad": x, "weight": f, "total": f, "grad_x": x}
    yield kernels.weighted_mean_backward_kernel, backward, {"HAS_WEIGHT": True, **BLOCKS}
    yield kernels.weighted_mean_products_backward_kernel, {"grad": x, "x": x, "weight": f, "grad_weight": f}, BLOCKS
    yield kernels.weighted_mean_centre_backward_kernel, {"weight": f, "total": f, "grad_weight": f}, {"BLOCK_N": 256}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("element", ELEMENTS)
def test_kernels_compile_ahead_of_time(element, architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, pointers, constants in variants(element):
        compiled = compile_for(kernel, architecture, pointers, constants)
        assert compiled.asm["cubin"]
        assert "atom." not in compiled.asm["ptx"]
        assert compiled.metadata.shared <= 48 * 1024


@pytest.mark.parametrize(
    ("shape", "splits"),
    [((256, 197, 768), 1), ((1, 197, 768), 1), ((1, 4096, 768), 16), ((64, 4096, 768), 2), ((1, 1 << 20, 64), 512)],
)
def test_tokens_are_split_only_where_there_are_too_few_programs(shape, splits):
    plan = kernels.plan(*shape, prefix_tokens=0)
    assert plan.splits == splits
    assert plan.sums[1] <= 65535  # the largest second dimension of a grid

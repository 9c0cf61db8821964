"""The gates notice what they are there for: each is shown a sample kernel without the fault and one with it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gates import cubin, inventory, judge, measure, names
from gates.measure import Run, compiled_rows, traffic_rows
from gates.promises import Kernel, Operator, Problem, Unit, always
from gates.records import Compiled

SAMPLES = Path(__file__).with_name("gates_samples")
CODE = Compiled(
    backend="cuda", operator="o", kernel="k", arch=80, problem="p", dtype="fp32", instance="", threads=256,
    registers=60, shared=4096, stack=0, spills=0, tensor_cores=0, atomics=0, widest_load=16, widest_store=4,
)  # fmt: skip


def need(backend: str) -> None:
    if reason := measure.missing(backend, execute=True):
        pytest.skip(reason)


class Sample:
    """A Triton kernel launched once; the arguments of a launch are tensors on the emulated GPU."""

    def __init__(self, kernel, grid, *arguments, compulsory=0, macs=0, tensor_cores=None, execute=True, **options):
        need("triton")
        from emulated_cuda import EmulatedCuda

        promises = {"tensor_cores": tensor_cores} if tensor_cores else {}
        self.promise = Kernel(kernel.__name__, bytes=lambda p: compulsory, macs=lambda p: macs, **promises)
        one = Unit("launch", lambda p: 1)
        operator = Operator(
            "sample", lambda p: None, lambda p: compulsory, (self.promise,), {"sample": {}}, {}, unit=one
        )
        self.problem = Problem({}, "fp32", 80)
        with EmulatedCuda("triton", 80, execute=execute) as cuda:
            written = [f"argument {number}" for number in range(len(arguments))]
            cuda.run(lambda *placed: kernel[grid](*placed, **options), *arguments, names=written, written=written)
        self.runs = [Run(operator, "sample", self.problem, cuda.launches)]

    @property
    def compiled(self) -> Compiled:
        (row,) = compiled_rows(self.runs, "triton", 80).values()
        return row

    @property
    def traffic(self):
        return next(iter(traffic_rows(self.runs, "triton", 80).values()))

    def complaints(self, **promises) -> list[str]:
        """Of the machine code, about a kernel that promises this."""
        return judge.instructions(self.compiled, replace(self.promise, **promises), self.problem)


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="needs Triton: pip install triton")
    from gates_samples import kernels

    return kernels


def only(complaints: list[str], *parts: str) -> None:
    """Exactly one complaint, with these parts."""
    assert len(complaints) == 1
    for part in parts:
        assert part in complaints[0]


@pytest.mark.parametrize(("name", "budget"), [("registers", "register_budget"), ("shared", "shared_budget")])
def test_growth_is_noticed_where_fewer_blocks_fit(name, budget):
    recorded = CODE.fields()
    most = recorded[budget]
    assert recorded["blocks"] == 4
    assert not judge.resources(replace(CODE, **{name: most}), recorded)
    grown = replace(CODE, **{name: most + 1})
    only(judge.resources(grown, recorded), name, f"from {recorded[name]} to {most + 1}", f"up to {most}", "now 3 do")


def test_budgets_are_those_of_one_size_of_block():
    only(
        judge.resources(replace(CODE, threads=128, registers=16), CODE.fields()), "128 threads per block instead of 256"
    )


def test_new_and_forgotten_kernels_are_noticed():
    only(judge.against_table({CODE.key: CODE}, {}), "k (cuda, sm_80, p fp32): is not in the table")
    only(judge.against_table({}, {CODE.key: CODE.fields()}), "no case launches it now")
    assert not judge.against_table({CODE.key: CODE}, {CODE.key: CODE.fields()})


def test_a_kernel_that_cannot_be_launched_is_noticed():
    assert not judge.size(CODE)
    only(judge.size(replace(CODE, shared=200_000)), "not even one block")
    only(judge.size(replace(CODE, threads=1024, registers=128)), "not even one block")


def test_spills_of_triton_are_noticed(kernels):
    x = torch.ones(64, 128)
    sound = Sample(kernels.greedy_kernel, (1,), x, x.clone(), rows=64, columns=128, num_warps=8, execute=False)
    spilling = Sample(kernels.greedy_kernel, (1,), x, x.clone(), rows=64, columns=128, num_warps=1, execute=False)
    assert not judge.spills(sound.compiled)
    only(judge.spills(spilling.compiled), "spills")


def test_spills_of_cuda_are_noticed(cuda_samples):
    assert cuda_samples["roomy"].spills == cuda_samples["roomy"].stack == 0
    assert cuda_samples["cramped"].registers <= 32 < cuda_samples["roomy"].registers
    assert cuda_samples["cramped"].spills > 0


def test_tf32_is_noticed(kernels):
    x = torch.ones(16, 16)
    exact, rounded = (
        Sample(kernels.product_kernel, (1,), x, x, x.clone(), block=16, precision=precision, execute=False)
        for precision in ("ieee", "tf32")
    )
    assert not exact.complaints()
    only(exact.complaints(tensor_cores=always), "says that it uses tensor cores, but has no such instruction")
    only(rounded.complaints(), "TF32")
    assert not rounded.complaints(tensor_cores=always)


def test_atomics_are_noticed(kernels):
    x = torch.ones(128)
    sample = Sample(kernels.atomic_kernel, (1,), x, x.clone(), block=128, execute=False)
    only(sample.complaints(), "atomic")
    assert not sample.complaints(atomics=always)


def test_narrow_accesses_are_noticed(kernels):
    storage, wide = torch.ones(1028), {"wide_loads": always, "wide_stores": always}
    aligned, shifted = (
        Sample(kernels.plain_copy_kernel, (2,), x, torch.empty(1024), 1024, block=512, compulsory=2 * 4 * 1024)
        for x in (storage[:1024], storage[1:1025])
    )
    assert not aligned.complaints(**wide)
    only(shifted.complaints(**wide), "loads 16 bytes at a time, but the widest load has 4")
    complaints = judge.movement(shifted.traffic, aligned.traffic.fields())
    assert any("share of bytes moved 16 at a time fell from 1.0 to 0.5" in complaint for complaint in complaints)


def test_scattered_accesses_are_noticed(kernels):
    x = torch.ones(4096)
    together, scattered = (
        Sample(kernels.copy_kernel, (8,), x, x.clone(), 4096, stride=stride, block=512, compulsory=2 * 4 * 4096).traffic
        for stride in (1, 64)
    )
    assert not judge.movement(together, together.fields())
    complaints = judge.movement(scattered, together.fields())
    assert any("moved / compulsory bytes grew from 1.000 to 8.000" in complaint for complaint in complaints)
    assert scattered.distinct == together.distinct == together.compulsory  # other lanes take what one leaves


def test_memory_that_is_touched_without_need_is_noticed(kernels):
    x = torch.ones(4096)
    sound, wasteful = (
        Sample(kernels.copy_kernel, (8,), x, x.clone(), 4096, stride=1, block=512, compulsory=compulsory).traffic
        for compulsory in (2 * 4 * 4096, 4 * 4096)
    )
    assert not judge.necessities(sound)
    only(judge.necessities(wasteful), "touches 32768 bytes, 2.00 times the 16384 that are compulsory")
    only(judge.movement(sound, sound.fields() | {"distinct": 16384}), "distinct bytes grew from 16384 to 32768")
    few = replace(sound, compulsory=4, distinct=64, buffers=2)
    assert not judge.necessities(few)
    only(judge.necessities(replace(few, buffers=1)), "64 bytes")


def test_a_formula_that_calls_too_much_compulsory_is_noticed(kernels):
    x = torch.ones(4096)
    row = Sample(kernels.copy_kernel, (8,), x, x.clone(), 4096, stride=1, block=512, compulsory=3 * 4 * 4096).traffic
    only(judge.necessities(row), "calls 49152 compulsory")


def test_wasted_multiply_adds_are_noticed(kernels):
    x = torch.ones(16, 16)
    options = {"compulsory": 3 * 4 * 256, "macs": 16**3, "tensor_cores": always, "precision": "tf32", "num_warps": 1}
    tight, padded = (
        Sample(kernels.product_kernel, (1,), x, x, x.clone(), block=size, **options).traffic for size in (16, 32)
    )
    assert not judge.movement(tight, tight.fields())
    complaints = judge.movement(padded, tight.fields())
    assert any("multiply-adds on tensor cores grew from 4096 to 32768, of which 4096" in c for c in complaints)
    only(judge.necessities(replace(tight, macs=5000)), "executes 4096 multiply-adds", "5000 are needed")


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("instructions", "instructions of warps"),
        ("waves", "passes over shared memory"),
        ("barriers", "barriers of blocks"),
    ],
)
def test_work_that_grows_is_noticed(kernels, name, what):
    x = torch.ones(16, 16)
    options = {"compulsory": 3 * x.nbytes, "precision": "ieee", "num_warps": 4}
    row = Sample(kernels.product_kernel, (1,), x, x, x.clone(), block=32, **options).traffic
    assert getattr(row, name) > 0
    assert not judge.movement(replace(row, **{name: getattr(row, name) // 2}), row.fields())
    only(judge.movement(replace(row, **{name: 2 * getattr(row, name)}), row.fields()), f"{what} grew from")


def test_units_of_work_and_what_ran_are_counted(kernels):
    x = torch.ones(4096)
    row = Sample(kernels.copy_kernel, (8,), x, x.clone(), 4096, stride=1, block=512, num_warps=4).traffic
    assert (row.units, row.warps, row.barriers, row.warpgroup_products, row.tf32_products) == (1, 4, 0, 0, 0)
    assert row.instructions % 8 == 0  # the same in each block
    assert row.resident >= 16 // row.warps
    assert 0 < row.ptx < row.instructions
    assert row.machine > 0


@pytest.fixture(scope="module")
def compile_samples(tmp_path_factory):
    """Compiles the CUDA samples for sm_80 as the build does."""
    need("cuda")
    from emulated_cuda.cuda_library import compilers

    def compile_samples(kind: str) -> bytes:
        target = tmp_path_factory.mktemp("samples") / kind
        nvcc = compilers.nvcc(compilers.cuda_home())
        compilers.run([*nvcc, "-arch=sm_80", f"-{kind}", str(SAMPLES / "kernels.cu"), "-o", str(target)])
        return target.read_bytes()

    return compile_samples


@pytest.fixture(scope="module")
def cuda_samples(compile_samples) -> dict[str, cubin.MachineCode]:
    return {name: code for (_, name), code in cubin.read(compile_samples("cubin")).items()}


def test_bank_conflicts_are_noticed(compile_samples, cuda_samples, monkeypatch):
    from emulated_cuda import launch as launches
    from ptx_emulator import Emulator

    monkeypatch.setattr(measure, "shipped", lambda arch: cuda_samples)

    ptx, rows = compile_samples("ptx").decode(), {}
    for name in ("padded", "in_one_bank"):
        x = torch.arange(64.0 * 64).view(64, 64)
        y = torch.zeros(64, 64)
        done = Emulator(80).launch(ptx, name, (2, 2), (32, 32), [x, y, 64, 64])
        assert torch.equal(y, x.T)
        grid, block, code = (2, 2, 1), (32, 32, 1), launches.Compiled(name, 80, ptx)
        launch = launches.LaunchRecord(code, "cuda", grid, block, 0, done.statistics, done.opcodes)
        kernel = Kernel(name, bytes=lambda p: 2 * 4 * 64 * 64)
        operator = Operator("transpose", lambda p: None, kernel.bytes, (kernel,), {"sample": {}}, {})
        run = Run(operator, "sample", Problem({"B": 1}, "fp32", 80), [launch])
        rows[name] = next(iter(traffic_rows([run], "cuda", 80).values()))
    assert not judge.movement(rows["padded"], rows["padded"].fields())
    per_load, *_, in_all = judge.movement(rows["in_one_bank"], rows["padded"].fields())
    assert per_load.endswith("passes over shared memory per load grew from 1.0 to 32.0: bank conflicts")
    assert in_all.endswith("passes over shared memory grew from 256 to 4224")


@pytest.mark.parametrize("arch", measure.ARCHITECTURES["triton"])
def test_kernels_read_together_are_those_read_alone(kernels, arch, tmp_path, monkeypatch):
    """The disassembler is given bare instructions, without the file that says whose they are."""
    need("triton")
    from emulated_cuda import EmulatedCuda

    x = torch.ones(32, 32)
    with EmulatedCuda("triton", arch, execute=False) as cuda:
        cuda.run(lambda x, y: kernels.product_kernel[(1,)](x, x, y, block=32, precision="tf32"), x, x.clone())
        cuda.run(lambda x, y: kernels.atomic_kernel[(1,)](x, y, block=128), x, x.clone())
    cubins = [launch.cubin for launch in cuda.launches]
    found = []
    for folder in ("alone", "together"):
        (tmp_path / folder).mkdir()
        monkeypatch.setattr(cubin, "_cache", lambda folder=folder: tmp_path / folder)
        if folder == "together":
            cubin.read_kernels(cubins, arch)
        found.append([cubin.read.__wrapped__(binary) for binary in cubins])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("HMMA.16816.F32.BF16", True),
        ("HGMMA.64x128x16.F32", True),
        ("UTCHMMA", True),
        ("IMMA.16832.S8.S8", True),
        ("HFMA2.MMA", False),
        ("FFMA", False),
    ],
)
def test_tensor_core_instructions_are_told_from_others(opcode, expected):
    assert cubin.is_tensor_core(opcode) == expected


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("ld.global.v4.b32", 16),
        ("ld.global.nc.v4.f32", 16),
        ("ld.global.L1::evict_last.v2.b64", 16),
        ("st.global.b16", 2),
        ("ld.global.nc.L1::no_allocate.u8", 1),
        ("ld.volatile.global.u64", 8),
        ("cp.async.cg.shared.global", 16),
        ("ld.shared.v4.b32", 0),
        ("ld.param.b64", 0),
    ],
)
def test_widths_are_read_off_instructions(opcode, expected):
    assert measure.bytes_per_lane(opcode) == expected


PYTHON = """
import triton

@triton.jit
def a_kernel(x): pass

@triton.autotune([], [])
@triton.jit
def b_kernel(x): pass

@triton.jit
def part(x): pass

def not_a_kernel(): pass
"""
CUDA = """
// __global__ void commented(int);
template <int V>
__global__ void __launch_bounds__(size(2), 1) c_kernel(int);
static __global__
void d_kernel(const float* x) { }
__device__ void part();
"""


def test_kernels_are_found_in_sources(tmp_path):
    (tmp_path / "kernels.py").write_text(PYTHON)
    (tmp_path / "kernels.cu").write_text(CUDA)
    assert inventory.triton_kernels(tmp_path) == {"a_kernel", "b_kernel"}
    assert inventory.cuda_kernels(tmp_path) == {"c_kernel", "d_kernel"}


@pytest.mark.parametrize(
    ("mangled", "readable"),
    [
        (
            "_ZN4mlip36_GLOBAL__N__d7019869_4_some_d4d9617910sum_kernelI13__nv_bfloat16Li8EEEvNS_4SumsE",
            "sum_kernel<bf16, 8>",
        ),
        ("_Z10sum_kernelI6__halfLi1EEvPT_", "sum_kernel<fp16, 1>"),
        ("_Z10sum_kernelIfEvPT_", "sum_kernel<fp32>"),
        ("_Z10sum_kernelPf", "sum_kernel"),
        ("sum_kernel", "sum_kernel"),
    ],
)
def test_names_are_readable(mangled, readable):
    assert names.readable(mangled) == readable

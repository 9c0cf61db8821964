"""The emulated GPU behaves like one where it matters: memory, launches that are refused, drivers, devices."""

import ctypes
from contextlib import nullcontext

import pytest
import torch

from mlip_kernels import _library, weighted_mean

OPERATOR = "mlip_kernels_cuda::merging_weighted_mean"
STORES = r"""
#include <cuda_runtime.h>

// y_i = i for n elements, by way of shared memory.
__global__ void stores(float* y, int n) {
  extern __shared__ float staged[];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  staged[threadIdx.x] = i;
  if (i < n) y[i] = staged[threadIdx.x];
}

extern "C" __attribute__((visibility("default"))) int launch(float* y, int n, int blocks, int threads, int shared,
                                                             int allow) {
  if (allow > 0) cudaFuncSetAttribute(stores, cudaFuncAttributeMaxDynamicSharedMemorySize, allow);
  stores<<<blocks, threads, shared>>>(y, n);
  return cudaGetLastError();
}
"""


@pytest.fixture
def emulated(needs_emulated):
    """The class `EmulatedCuda`, where both backends can be emulated."""
    for backend in ("triton", "cuda"):
        needs_emulated(backend)
    from emulated_cuda import EmulatedCuda

    return EmulatedCuda


@pytest.fixture
def launch(emulated, request, monkeypatch):
    """``launch(y, n, ...)`` stores into y with a kernel of CUDA C++, and raises what the runtime reports."""
    from emulated_cuda import cuda_library

    file = request.config.cache.mkdir("stores") / "stores.cu"
    if not file.exists() or file.read_text(encoding="utf-8") != STORES:
        file.write_text(STORES, encoding="utf-8")
    library = cuda_library.CudaLibrary("stores", [file]).loaded
    monkeypatch.setattr(cuda_library, "allowed_shared", {})

    def launch(y, n=None, blocks=2, threads=64, shared=256, allow=0):
        code = library.launch(ctypes.c_void_p(y.data_ptr()), n or len(y), blocks, threads, shared, allow)
        if code:
            raise RuntimeError(f"the runtime reports {code}")
        return y

    return launch


def faults(cuda, launcher, *arguments, **options):
    from ptx_emulator import EmulatorError

    with pytest.raises(EmulatorError) as raised:
        cuda.run(launcher, *arguments, **options)
    return {(fault.kind, fault.buffer) for fault in raised.value.faults}


def test_a_launcher_writes_what_it_may(emulated, launch):
    cuda, y = emulated("cuda", 80), torch.zeros(100)
    result = cuda.run(launch, y, names=["y"], written=["y"])
    assert y.tolist() == result.tolist() == list(range(100))
    (record,) = cuda.launches
    assert (record.grid, record.block, record.shared) == ((2, 1, 1), (64, 1, 1), 256)
    assert "stores" in record.kernel
    assert ".target sm_80" in record.ptx
    assert record.statistics.global_store_bytes == 400


def test_an_access_beside_a_tensor_is_a_fault_that_names_it(emulated, launch):
    cuda, base = emulated("cuda", 80), torch.zeros(300)
    y = base[100:200]  # what lies beside it in its storage is not its own either
    assert faults(cuda, lambda y: launch(y, 101), y, names=["y"], written=["y"]) == {("out_of_bounds", "y")}
    assert faults(cuda, lambda y: launch(y[1:], 100), y, names=["y"], written=["y"]) == {("out_of_bounds", "y")}
    assert not base.any()


def test_an_argument_that_is_not_to_be_written_is_read_only(emulated, launch):
    assert faults(emulated("cuda", 80), launch, torch.zeros(100), names=["y"]) == {("read_only", "y")}


def test_an_allocation_of_the_launcher_is_guarded_and_named(emulated, launch):
    def launcher(x):
        return launch(x.new_empty(2, 50).view(100), 101)

    ((kind, name),) = faults(emulated("cuda", 80), launcher, torch.zeros(1))
    assert kind == "out_of_bounds"
    assert name.endswith("float32 [2, 50]")


def test_memory_that_was_freed_is_gone(needs_emulated):
    needs_emulated("cuda")
    from emulated_cuda.memory import DeviceMemory

    memory = DeviceMemory()
    kept, freed = memory.put(torch.zeros(3), "kept"), memory.put(torch.zeros(3), "freed")
    assert [buffer.name for buffer in memory.buffers()] == ["kept", "freed"]
    del freed
    assert [buffer.name for buffer in memory.buffers()] == ["kept"]
    assert memory.holds(kept)


def test_what_an_operator_may_write_to_is_what_its_schema_says(emulated, launch, monkeypatch):
    from ptx_emulator import EmulatorError

    def launcher(x, y, n, swap):
        launch(*((x, n) if swap else (y, n)))

    monkeypatch.setattr(emulated, "_find", lambda self, name: (launcher, ""))
    operators = torch.library._scoped_library("mlip_kernels", "FRAGMENT")
    kernels = torch.library._scoped_library("mlip_kernels_cuda", "FRAGMENT")  # others are not emulated
    monkeypatch.setattr(_library, "has_kernels", lambda name: name == "stores")
    with operators as library, kernels as cuda_library:
        for defining in (library, cuda_library):
            defining.define("stores(Tensor x, Tensor(a!) y, int n=100, bool swap=False) -> ()")
        x, y = torch.zeros(100), torch.zeros(100)
        with emulated("cuda", 80):
            torch.ops.mlip_kernels.stores(x, y)
            with pytest.raises(EmulatorError, match="read_only") as raised:
                torch.ops.mlip_kernels.stores(x, y, swap=True)
    assert y.tolist() == list(range(100))
    assert raised.value.faults[0].buffer == "x"
    assert not x.any()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: torch.empty_like(x),
        lambda x: x.new_empty(3, 4),
        lambda x: torch.empty(3, 4, dtype=x.dtype),
        lambda x: torch.empty_strided((3, 4), (1, 3), dtype=x.dtype),
        lambda x: x.new_empty_strided((3, 4), (8, 2)),
    ],
)
def test_what_nobody_has_written_is_nan_or_far_from_any_index(emulated, make):
    cuda = emulated("cuda", 80)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert cuda.run(make, torch.zeros(3, 4, dtype=dtype)).isnan().all()
    for dtype in (torch.int32, torch.int64):
        assert (cuda.run(make, torch.zeros(3, 4, dtype=dtype)) < -(1 << 30)).all()
    assert not cuda.run(lambda x: torch.zeros_like(x) + torch.ones(4), torch.zeros(4)).isnan().any()


@pytest.mark.parametrize(
    "view",
    [
        torch.arange(60.0).reshape(3, 20)[:, 4:9],
        torch.arange(60.0).reshape(3, 4, 5).permute(2, 0, 1),
        torch.arange(3.0)[:, None].expand(3, 4),
        torch.arange(10.0)[3:],
        torch.zeros(0, 3),
        torch.tensor(2.0),
    ],
    ids=lambda view: str(list(view.shape)),
)
def test_tensors_keep_values_strides_and_alignment_in_device_memory(emulated, view):
    def seen(x):
        return x, x.stride(), x.storage_offset(), x.data_ptr() % 64

    copy, *layout = emulated("cuda", 80).run(seen, view)
    assert torch.equal(copy, view)
    assert layout == [view.stride(), view.storage_offset(), view.data_ptr() % 64]


@pytest.mark.parametrize(
    ("configuration", "message"),
    [
        ({"blocks": 0}, r"grid \(0, 1, 1\)"),
        ({"threads": 1025, "shared": 8192}, r"block \(1025, 1, 1\)"),
        ({"shared": (48 << 10) + 4}, "cudaFuncSetAttribute allowed 0"),
        ({"shared": 100 << 10, "allow": 99 << 10}, "cudaFuncSetAttribute allowed 101376"),
    ],
)
def test_a_launch_that_no_gpu_would_start_is_refused(emulated, launch, configuration, message):
    from emulated_cuda import LaunchError

    cuda = emulated("cuda", 80)
    with pytest.raises(LaunchError, match=message):
        cuda.run(lambda y: launch(y, **configuration), torch.zeros(100), names=["y"], written=["y"])
    assert not cuda.launches


def test_more_shared_memory_is_there_for_those_who_ask(emulated, launch):
    cuda, y = emulated("cuda", 80), torch.zeros(100)
    cuda.run(lambda y: launch(y, shared=48 << 10), y, names=["y"], written=["y"])
    for arch, most in ((80, 163 << 10), (90, 227 << 10)):
        cuda = emulated("cuda", arch)
        cuda.run(lambda y, most=most: launch(y, shared=most, allow=most), y, names=["y"], written=["y"])
        with pytest.raises(RuntimeError, match=f"{most + 4} bytes"):
            cuda.run(lambda y, most=most: launch(y, shared=most + 4, allow=most + 4), y, names=["y"], written=["y"])


def test_a_failed_launch_that_the_launcher_does_not_notice_is_an_error(emulated, launch):
    def careless(y):
        try:
            launch(y, blocks=0)
        except RuntimeError:
            return y

    with pytest.raises(AssertionError, match="check_launch"):
        emulated("cuda", 80).run(careless, torch.zeros(100))


def test_grids_and_blocks_have_limits():
    from emulated_cuda.launch import LaunchError, check_configuration

    check_configuration("k", (0x7FFFFFFF, 0xFFFF, 0xFFFF), (16, 1, 64))
    for grid, block in (((1 << 31, 1, 1), (1, 1, 1)), ((1, 1 << 16, 1), (1, 1, 1)), ((1, 1, 1), (1, 1, 65))):
        with pytest.raises(LaunchError):
            check_configuration("k", grid, block)
    with pytest.raises(LaunchError, match="2048 threads"):
        check_configuration("k", (1, 1, 1), (512, 4, 1))


def test_the_emulated_operators_stand_beside_the_real_ones(emulated):
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    real = has(OPERATOR, "CUDA")
    x = torch.ones(1, 2, 3)
    with emulated("cuda", 80):
        weighted_mean(x)
    assert has(OPERATOR, "CPU")
    assert has(OPERATOR, "CUDA") == real
    with pytest.raises(RuntimeError, match="no CUDA-capable device"):
        torch.ops.mlip_kernels_cuda.merging_weighted_mean(x, None, 0)


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_installed_in_triton_is_put_back(emulated, fails):
    import triton

    class Real:
        """Stands for the driver of a real GPU."""

    config, compilation = triton.runtime.driver, triton.knobs.compilation
    listener = compilation.listener
    before = dict(vars(config))
    config.set_active(Real())
    try:
        with_real = dict(vars(config))
        with pytest.raises(ZeroDivisionError) if fails else nullcontext(), emulated("triton", 80) as cuda:
            assert not isinstance(config.active, Real)
            with emulated("triton", 90), cuda:
                pass
            assert config.active.arch == 80
            if fails:
                raise ZeroDivisionError
        assert vars(config) == with_real
        assert compilation.listener is listener
    finally:
        vars(config).clear()
        vars(config).update(before)


def test_what_was_compiled_for_one_architecture_does_not_reach_another(emulated):
    x = torch.ones(2, 3, 4)
    for arch in (80, 90, 80):
        with emulated("triton", arch) as cuda:
            weighted_mean(x)
        assert [record.arch for record in cuda.launches] == [arch]
        assert f".target sm_{arch}" in cuda.launches[0].ptx
        assert cuda.launches[0].metadata["target"].arch == arch


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_kernels_can_be_compiled_for_what_is_not_emulated(emulated, backend):
    for arch in (100, 120):
        with emulated(backend, arch, execute=False) as cuda:
            mean = weighted_mean(torch.ones(2, 3, 4))
        (record,) = cuda.launches
        assert f".target sm_{arch}" in record.ptx
        assert record.statistics is None
        assert mean.isnan().all()
        assert list(cuda.compiled) == [record.kernel]
        assert bool(record.cubin) == (backend == "triton")


def test_the_innermost_gpu_computes(emulated):
    x = torch.ones(2, 3, 4)
    with emulated("triton", 80) as outer:
        with emulated("cuda", 90) as inner:
            weighted_mean(x)
        weighted_mean(x)
    assert [record.backend for record in (*inner.launches, *outer.launches)] == ["cuda", "triton"]
    assert torch.equal(weighted_mean(x), x[:, 0])
    assert len(inner.launches) == len(outer.launches) == 1


def test_the_schedule_reaches_the_emulator(emulated):
    with pytest.raises(ValueError, match="schedule"):
        emulated("cuda", 80).under("alphabetical")
    with pytest.raises(ValueError, match="backend"):
        emulated("cpu", 80)

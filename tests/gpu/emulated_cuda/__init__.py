"""The package's GPU operators on a GPU that is emulated: the launchers, grids and compiled kernels are the real ones.

    with EmulatedCuda("triton", 90) as cuda:
        y = mlip_kernels.weighted_mean(x)  # on CPU tensors

Inside, the Triton launchers compile and launch through Triton's own JIT (`triton_driver`), the CUDA C++ launchers run
as compiled against a small runtime of ours (`cuda_library`, `cudart.cpp`), and either way the PTX is executed by
`ptx_emulator` on tensors that lie in guarded memory (`memory`).
"""

from emulated_cuda.device import EmulatedCuda
from emulated_cuda.launch import Compiled, LaunchError, LaunchRecord

__all__ = ["Compiled", "EmulatedCuda", "LaunchError", "LaunchRecord"]

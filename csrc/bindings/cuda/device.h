// How the bindings of the CUDA part find the device and its stream. Nothing else in csrc/ knows of either, so the tests
// put a header of their own in the place of this one and run the rest without a GPU.
//
// The stream comes from whatever libtorch_cuda is already loaded, and the CUDA runtime is linked statically: neither is
// needed to load this part, so one binary serves CPU-only, CUDA 12 and CUDA 13 builds of torch (driver permitting).
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings/tensors.h"

// MLIP_CUDA_KERNELS(m) { m.impl(...); } registers kernels in mlip_kernels_cuda, under the key of their device.
#define MLIP_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(mlip_kernels_cuda, CUDA, m)

namespace mlip::bindings {

// While it lives, the device of `tensor` is current: for torch, and for the CUDA runtime linked into this part.
class OnDevice {
 public:
  explicit OnDevice(const Tensor& tensor) : index_(tensor.get_device_index()), guard_(index_) {
    const cudaError_t error = cudaSetDevice(index_);
    MLIP_CHECK(error == cudaSuccess, "mlip_kernels: cudaSetDevice: ", cudaGetErrorString(error));
  }

  // The stream that torch uses here.
  cudaStream_t stream() const {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_NOLOAD | RTLD_LAZY);
      return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    MLIP_CHECK(get != nullptr, "mlip_kernels: this PyTorch has no CUDA");
    void* stream = nullptr;
    MLIP_CHECK(get(index_, &stream) == 0, "mlip_kernels: torch did not name its current CUDA stream");
    return static_cast<cudaStream_t>(stream);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace mlip::bindings

// Stands before csrc/bindings/cuda/device.h where there is no GPU: tensors lie in the CPU's memory, there is one device
// and one stream, and kernels are registered under the key of CPU tensors.
#pragma once
#include <cuda_runtime_api.h>

#include "bindings/tensors.h"

#define MLIP_CUDA_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(mlip_kernels_cuda, CPU, m)

namespace mlip::bindings {

class OnDevice {
 public:
  explicit OnDevice(const Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

}  // namespace mlip::bindings

#include_next "bindings/cuda/device.h"

// What the bindings of the CUDA part share: how they find the device and its stream, register kernels, describe tensors
// to kernels, and ask what became of a launch.
//
// The stream comes from whatever libtorch_cuda is already loaded, and the CUDA runtime is linked statically: neither is
// needed to load this part, so one binary serves CPU-only, CUDA 12 and CUDA 13 builds of torch (driver permitting).
#pragma once
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include "bindings/tensors.h"
#include "cuda/elements.h"

#ifndef MLIP_CUDA_KERNELS  // tests without a GPU define it and OnDevice beforehand

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

#endif

namespace mlip::bindings {

// The CUDA runtime reports a failed launch only to those who ask.
inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  MLIP_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

inline cuda::Type cuda_type(ScalarType type) {
  switch (type) {
    case ScalarType::Float:
      return cuda::Type::float32;
    case ScalarType::Half:
      return cuda::Type::float16;
    case ScalarType::BFloat16:
      return cuda::Type::bfloat16;
    default:
      fail("mlip_kernels: no CUDA kernel for dtype ", type);
  }
}

// Whether every row of `tensor` (last dimension, unit stride) can be read 16 bytes at a time.
inline bool rows_are_vectors(const Tensor& tensor) {
  const int64_t vector = cuda::vector_of(cuda_type(tensor.scalar_type())), last = tensor.dim() - 1;
  bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0 && tensor.size(last) % vector == 0;
  for (int64_t i = 0; i < last; ++i) aligned = aligned && (tensor.size(i) == 1 || tensor.stride(i) % vector == 0);
  return aligned;
}

}  // namespace mlip::bindings

// What became of a launch: the CUDA runtime reports it only to those who ask.
#pragma once
#include <cuda_runtime_api.h>

#include "bindings/tensors.h"

namespace mlip::bindings {

inline void check_launch(const char* name) {
  const cudaError_t error = cudaGetLastError();
  MLIP_CHECK(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
}

}  // namespace mlip::bindings

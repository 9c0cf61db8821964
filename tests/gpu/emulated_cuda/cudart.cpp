// The CUDA runtime as far as the launchers of this package need it, without a GPU: kernels are known by name, and a
// launch is handed to Python, which executes it.
//
// nvcc turns `kernel<<<grid, block, shared, stream>>>(arguments)` into a stub on the host that pushes the
// configuration, pops it again and calls __cudaLaunchKernel (CUDA 13) or cudaLaunchKernel (CUDA 12). What those do not
// need is not here: a launcher that calls another function of the runtime does not link, and the linker names the
// function.
#include <cuda_runtime_api.h>

#include <map>
#include <string>
#include <vector>

namespace {

// Python's side: they return a cudaError_t.
using Launch = int (*)(const char* kernel, const unsigned grid[3], const unsigned block[3], size_t shared,
                       void** arguments);
using Allow = int (*)(const char* kernel, int dynamic_shared);  // sets the most that later launches may ask for
using Describe = int (*)(int attribute, int* value);            // of the device

Launch launch_in_python = nullptr;
Allow allow_in_python = nullptr;
Describe describe_in_python = nullptr;

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

// Names by the address of the stub. Filled while the library is loaded, before anything here is initialised.
std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> names;
  return names;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;

cudaError_t launch(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared) {
  const auto found = kernels().find(stub);
  if (found == kernels().end()) return report(cudaErrorInvalidDeviceFunction);
  if (launch_in_python == nullptr) return report(cudaErrorNoDevice);
  const unsigned grid_of[] = {grid.x, grid.y, grid.z}, block_of[] = {block.x, block.y, block.z};
  return report(cudaError_t(launch_in_python(found->second.c_str(), grid_of, block_of, shared, arguments)));
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void emulated_cuda_connect(Launch launch, Allow allow, Describe describe) {
  launch_in_python = launch;
  allow_in_python = allow;
  describe_in_python = describe;
}

// What the code calls that nvcc writes.

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}  // the PTX declares them as well

void __cudaRegisterFunction(void**, const char* stub, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[stub] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return report(cudaErrorMissingConfiguration);
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid;
  *block = last.block;
  *shared = last.shared;
  *static_cast<void**>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  *kernel = static_cast<cudaKernel_t>(const_cast<void*>(stub));
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t) {
  return launch(kernel, grid, block, arguments, shared);
}

// What the launchers call themselves.

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t) {
  return launch(stub, grid, block, arguments, shared);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  const auto found = kernels().find(stub);
  if (found == kernels().end()) return report(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;  // the others are about speed
  if (allow_in_python == nullptr) return report(cudaErrorNoDevice);
  return report(cudaError_t(allow_in_python(found->second.c_str(), value)));
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return report(describe_in_python ? cudaError_t(describe_in_python(attribute, value)) : cudaErrorNoDevice);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

cudaError_t cudaPeekAtLastError() { return last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorMissingConfiguration:
      return "__global__ function call is not configured";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "unknown error";
  }
}

}  // extern "C"

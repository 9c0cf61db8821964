// How the batch is spread over blocks, and what these keep in shared memory: host code, no torch headers.
//
// A block has 32 channels and goes through every `splits`-th batch element. What does not depend on the element, such
// as the matrices and the weight of a filter, is read once per block. So there are as many blocks as the GPU holds at
// once, and no more: with fewer, some of it would idle; with more, the later ones would only read all that again, and
// the last of them would have the GPU for themselves. Then each has batch / splits elements, give or take one: 29 where
// 256 elements of 768 channels meet the 2 x 108 blocks of an A100, for which a weight as large as the tokens, read and
// written in half precision, is 1 / 30 of what a block moves.
//
// Weight rows cached in shared memory may cost one of three resident blocks. With two resident blocks, one still computes
// while the other waits for memory; rows that are not cached are read again for every batch element. So cache as many
// weight rows as still allow two resident blocks per multiprocessor.
#pragma once
#include <cuda_runtime_api.h>

#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

constexpr int64_t LARGEST_GRID = 0xffff;
constexpr int BLOCKS_KEEPING = 2;  // on a multiprocessor, unless tiles alone leave room for one only

// What the current GPU has.
struct Device {
  int multiprocessors = 0;
  int shared = 0, reserved = 0;  // bytes: of a multiprocessor, and what each block costs besides its own
};

inline Device current_device() {
  Device device;
  int index = 0;
  cudaGetDevice(&index);
  cudaDeviceGetAttribute(&device.multiprocessors, cudaDevAttrMultiProcessorCount, index);
  cudaDeviceGetAttribute(&device.shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index);
  cudaDeviceGetAttribute(&device.reserved, cudaDevAttrReservedSharedMemoryPerBlock, index);
  return device;
}

// At most `wanted` parts of the batch, and no more than it takes for the longest of them.
inline int64_t parts_of(const Map& map, int64_t wanted) {
  const int64_t most = wanted < LARGEST_GRID ? wanted : LARGEST_GRID;
  const int64_t longest = ceil_div(map.batch, most < 1 ? 1 : most);
  return ceil_div(map.batch, longest);
}

// Cuts the batch so that all blocks are on the GPU at once.
inline void spread(Map& map) {
  const Device device = current_device();
  const int64_t fitting = device.shared / (stages_shared(map) + device.reserved);
  const bool in_workspace = fitting == 0;  // what is left of shared memory then does not limit the blocks
  const int64_t resident = in_workspace || fitting > BLOCKS ? BLOCKS : fitting;
  map.splits = parts_of(map, device.multiprocessors * resident / column_blocks(map));
}

// Keeps as many of `rows`, which have so many points each, as fit.
inline void keep(Map& map, int64_t rows, int points) {
  const Device device = current_device();
  const int64_t without = stages_shared(map) + device.reserved;
  const int blocks = BLOCKS_KEEPING * without <= device.shared ? BLOCKS_KEEPING : 1;
  const int64_t room = device.shared / blocks - without;
  const int64_t fitting = room < 0 ? 0 : room / (points * POINT_BYTES);
  map.kept = int(fitting < rows ? fitting : rows) * points;
}

}  // namespace mlip::cuda::spectral

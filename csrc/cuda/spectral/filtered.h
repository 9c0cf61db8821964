// Launcher of the CUDA kernel of spectral filters; the story is told in filtered.cu. No torch headers.
#pragma once
#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

// Stages, tiles and grid of the map, from its tensors and sizes; `along_h` is null on the token axis.
void filtered_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width);
int64_t filtered_workspace(const Map& map);  // bytes
void filtered_forward(const Map& map, cudaStream_t stream);

}  // namespace mlip::cuda::spectral

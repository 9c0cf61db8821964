// Launcher of the CUDA kernel of separable maps; the story is told in separable.cu. No torch headers.
#pragma once
#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

// Stages, tiles and grid of the map, from its tensors and sizes; `along_h` is null on the token axis.
void separable_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width);
int64_t separable_workspace(const Map& map);  // bytes
void separable_forward(const Map& map, cudaStream_t stream);

}  // namespace mlip::cuda::spectral

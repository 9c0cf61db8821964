// Launcher of the CUDA kernels of the gradient of a spectral filter's weight; the story is told in
// filtered_backward_weight.cu. No torch headers.
#pragma once
#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

// Stages, tiles and grid of the map, from its tensors and sizes; `along_h` is null on the token axis. Cuts the batch
// into parts by the shape alone, so results do not change from one GPU to another: `partial` has one sum for each.
void filtered_backward_weight_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width);
int64_t filtered_backward_weight_workspace(const Map& map);  // bytes
void filtered_backward_weight(const Map& map, float* grad_weight, cudaStream_t stream);

}  // namespace mlip::cuda::spectral

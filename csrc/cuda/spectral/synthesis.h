// Launcher of the CUDA kernel of Fourier synthesis; the story is told in synthesis.cu. No torch headers.
#pragma once
#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

// Stages, tiles and grid of the map, from its tensors and sizes; `along_h` is null on the token axis.
void synthesis_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int frequencies);
int64_t synthesis_workspace(const Map& map);  // bytes
void synthesis_forward(const Map& map, cudaStream_t stream);

}  // namespace mlip::cuda::spectral

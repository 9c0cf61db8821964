// Launchers of the CUDA kernels of token energies; the story is told in token_energy.cu. No torch headers.
#pragma once
#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

// Stages, tiles and grid of the map, from its tensors and sizes; `along_h` is null on the token axis.
void token_energy_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width);
int64_t token_energy_workspace(const Map& map);  // bytes
void token_energy_forward(const Map& map, float* energy, cudaStream_t stream);

void token_energy_backward_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width);
int64_t token_energy_backward_workspace(const Map& map);
void token_energy_backward(const Map& map, cudaStream_t stream);

}  // namespace mlip::cuda::spectral

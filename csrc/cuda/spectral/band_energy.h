// Launchers of the CUDA kernels of band energies; the story is told in band_energy.cu. No torch headers.
#pragma once
#include "cuda/spectral/stages.h"

namespace mlip::cuda::spectral {

// Stages, tiles and grid of the map, from its tensors and sizes; `along_h` is null on the token axis.
void band_energy_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width);
int64_t band_energy_workspace(const Map& map);  // bytes
void band_energy_forward(const Map& map, cudaStream_t stream);

void band_energy_backward_plan(Map& map, const Matrix& along_h, const Matrix& along_w, int height, int width);
int64_t band_energy_backward_workspace(const Map& map);
void band_energy_backward(const Map& map, cudaStream_t stream);

}  // namespace mlip::cuda::spectral

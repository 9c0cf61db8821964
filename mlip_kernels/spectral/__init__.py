"""Spectral operators: tokens ``[B, N, D]`` by frequency, over the token axis or the patch grid.

What holds for all of them:

Long axes
    An axis of up to 1,024 points (tokens, height, width, or channels for ``dim=2``) is transformed by a dense matrix,
    in kernels of this package. Where an axis is longer, ``torch.fft`` transforms all of them, in O(n log n), in float32
    for half precision, on every device and without a kernel of ours; energies and `amplitude_phase` then save their
    spectrum for backward, the others nothing that grows with the batch but what is named there. Graphs of
    ``torch.export`` whose number of tokens is free multiply by a matrix of any length.

Range
    Nothing is scaled before it is summed, so tokens near the end of the range of float32 (and bfloat16) can overflow on
    the way, to an infinity and from there to NaN. Let n be the number of points that are transformed, ``H · W`` on a
    grid. Results and gradients are finite

    * in transforms, filters with weights up to 1 and `spectral_resize`, for tokens and gradients up to ``2e37 / n`` in
      magnitude; in `amplitude_phase` for such tokens with gradients up to 1;
    * in `band_energy` and `token_energy`, which square, for tokens up to ``1e18 / sqrt(n · D)`` with gradients up to 1;
    * for axes of more than 1,024 points, in both up to ``1e9``: an FFT of a length with a large prime factor multiplies
      intermediate results of the magnitude of ``n³ · |x|``.

    Tokens that are infinite or NaN make their channel (`token_energy`: their sample) infinite or NaN.

Constants
    Matrices are built on first use and remembered, at most 128 MiB of them.
"""

from mlip_kernels.spectral.amplitude_phase import amplitude_phase
from mlip_kernels.spectral.dct import dct, idct
from mlip_kernels.spectral.energy import band_energy, token_energy
from mlip_kernels.spectral.filter import spectral_filter
from mlip_kernels.spectral.resize import spectral_resize
from mlip_kernels.spectral.rfft import irfft, rfft

__all__ = [
    "amplitude_phase",
    "band_energy",
    "dct",
    "idct",
    "irfft",
    "rfft",
    "spectral_filter",
    "spectral_resize",
    "token_energy",
]

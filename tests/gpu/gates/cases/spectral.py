"""What the kernels of the spectral family promise."""

import torch
from torch import Tensor

from gates.promises import Kernel, Operator, Problem, Unit, reserves_tensor_memory
from mlip_kernels.spectral.constants import constant, dct_matrix, fft_matrix, rfft_matrix

FLOAT = 4  # bytes of a float32, which matrices, weights and partial sums are in any dtype
OPERATORS_OF = torch.ops.mlip_kernels

GRIDS = {
    "aligned": {"B": 2, "H": 14, "W": 14, "D": 64, "prefix": 1, "fourier": 0},
    "odd": {"B": 2, "H": 5, "W": 7, "D": 33, "prefix": 0, "fourier": 0},
}
BATCH = {"batch": GRIDS["aligned"] | {"B": 48}}  # blocks go through many elements
TOKENS = {"tokens": {"B": 2, "H": 1, "W": 64, "D": 64, "prefix": 1, "fourier": 0}}
FOURIER = {"Fourier": {"B": 2, "H": 12, "W": 13, "D": 64, "prefix": 1, "fourier": 1}}
COSINE = GRIDS | TOKENS
BOTH = COSINE | FOURIER
ALWAYS_FOURIER = {name: sizes | {"fourier": 1} for name, sizes in COSINE.items()}
FULL_SIZE = {"B": 256, "H": 14, "W": 14, "D": 768, "prefix": 1, "fourier": 0}
FOURIER_FULL_SIZE = FULL_SIZE | {"fourier": 1}
BANDS = 4
CHANNELS = Unit("32 channels of an image", lambda p: p.B * -(-p.D // 32), grows=("B", "D"))


def orthonormal(build: object, n: int) -> Tensor:
    more = (2, "ortho") if build is dct_matrix else ("ortho",)
    return constant(build, n, *more, device=torch.device("cpu"), dtype=torch.float32)


def matrices(p: Problem) -> tuple:
    """Along H (None on the token axis), along W, and the sizes, as every primitive takes them."""
    matrix_h = orthonormal(fft_matrix if p.fourier else dct_matrix, p.H) if p.H > 1 else None
    return matrix_h, orthonormal(rfft_matrix if p.fourier else dct_matrix, p.W), p.H, p.W, p.prefix


def points(p: Problem) -> int:
    return p.B * p.H * p.W


def frequencies(p: Problem) -> int:
    return p.W // 2 + 1 if p.fourier else p.W


def coefficients(p: Problem) -> int:
    return p.H * frequencies(p)


def numbers(p: Problem) -> int:
    """Real numbers of a spectrum, for each channel."""
    return coefficients(p) * (2 if p.fourier else 1)


def tokens(p: Problem) -> Tensor:
    return p.normal(p.B, p.prefix + p.H * p.W, p.D)


def weight(p: Problem) -> Tensor:
    return torch.randn(p.H, frequencies(p), p.D, *([2] if p.fourier else []))


def bands(p: Problem) -> Tensor:
    return torch.arange(coefficients(p), dtype=torch.int32) % BANDS


def kept(p: Problem) -> Tensor:
    return (torch.arange(coefficients(p)) % 2).float().reshape(p.H, frequencies(p), *([1] if p.fourier else []))


def one_way(p: Problem) -> int:
    """Multiply-adds of a transform."""
    matrix_w = points(p) * p.D * (2 * frequencies(p) if p.fourier else p.W)
    matrix_h = p.B * p.D * (4 if p.fourier else 1) * p.H * p.H * frequencies(p) if p.H > 1 else 0
    return matrix_w + matrix_h


def there_and_back(p: Problem) -> int:
    return 2 * one_way(p)


def matrix_bytes(p: Problem) -> int:
    return FLOAT * (p.W * frequencies(p) + p.H * p.H * (p.H > 1)) * (2 if p.fourier else 1)


def token_bytes(p: Problem, prefix: bool = False) -> int:
    return p.element * (points(p) + prefix * p.B * p.prefix) * p.D


def spectrum_bytes(p: Problem) -> int:
    return p.element * p.B * numbers(p) * p.D


def weight_bytes(p: Problem) -> int:
    return FLOAT * numbers(p) * p.D


def separable_bytes(p: Problem) -> int:
    return 2 * token_bytes(p, True) + matrix_bytes(p)


def analysis_bytes(p: Problem) -> int:
    return token_bytes(p) + spectrum_bytes(p) + matrix_bytes(p)


def synthesis_bytes(p: Problem) -> int:
    return token_bytes(p, True) + spectrum_bytes(p) + matrix_bytes(p)


def filtered_bytes(p: Problem) -> int:
    return separable_bytes(p) + weight_bytes(p)


def backward_weight_bytes(p: Problem) -> int:
    return 2 * token_bytes(p) + matrix_bytes(p) + weight_bytes(p)


def partial_bytes(p: Problem) -> int:
    """Partial sums of the gradient of the weight, as many as there are parts of the batch."""
    elements = -(-p.B // max(1, min(16, 216 // -(-p.D // 32))))  # of the longest part
    return -(-p.B // elements) * weight_bytes(p)


def band_bytes(p: Problem) -> int:
    return token_bytes(p) + matrix_bytes(p) + p.element * p.B * BANDS * p.D + FLOAT * coefficients(p)


def band_backward_bytes(p: Problem) -> int:
    return band_bytes(p) + token_bytes(p, True)


def energy_bytes(p: Problem) -> int:
    return FLOAT * (points(p) + p.B * p.prefix)


def partial_energy_bytes(p: Problem) -> int:
    """One partial sum for each token and 32 channels."""
    return FLOAT * points(p) * -(-p.D // 32)


def token_energy_bytes(p: Problem) -> int:
    return token_bytes(p) + matrix_bytes(p) + FLOAT * coefficients(p)


def token_energy_backward_bytes(p: Problem) -> int:
    return token_energy_bytes(p) + token_bytes(p, True) + FLOAT * points(p)


def tensor_cores(p: Problem) -> bool:
    return p.arch >= 80


def vectors(p: Problem) -> bool:
    return p.D % 8 == 0


def stages(name: str, **promises: object) -> Kernel:
    """A kernel that transforms tokens."""
    return Kernel(name, tensor_cores=tensor_cores, atomics=reserves_tensor_memory, wide_loads=vectors, **promises)


OPERATORS = (
    Operator(
        "spectral_separable",
        call=lambda p: OPERATORS_OF.spectral_separable(tokens(p), *matrices(p)),
        bytes=separable_bytes,
        kernels=(stages("spectral_separable_kernel", bytes=separable_bytes, macs=one_way, wide_stores=vectors),),
        problems=COSINE,
        full_size=FULL_SIZE,
        unit=CHANNELS,
    ),
    Operator(
        "spectral_separable, long token axis",
        call=lambda p: OPERATORS_OF.spectral_separable(tokens(p), *matrices(p)),
        bytes=separable_bytes,
        kernels=(
            stages(
                "spectral_axis_kernel", bytes=separable_bytes, macs=one_way, wide_stores=vectors, backends=("triton",)
            ),
        ),
        problems={"long": TOKENS["tokens"] | {"W": 196, "prefix": 0}},
        full_size=FULL_SIZE | {"H": 1, "W": 197},
        unit=CHANNELS,
    ),
    Operator(
        "spectral_analysis",
        call=lambda p: OPERATORS_OF.spectral_analysis(tokens(p), *matrices(p)),
        bytes=analysis_bytes,
        kernels=(stages("spectral_analysis_kernel", bytes=analysis_bytes, macs=one_way, wide_stores=vectors),),
        problems=ALWAYS_FOURIER,
        full_size=FOURIER_FULL_SIZE,
        unit=CHANNELS,
    ),
    Operator(
        "spectral_synthesis",
        call=lambda p: OPERATORS_OF.spectral_synthesis(
            *(p.normal(p.B, p.H, frequencies(p), p.D) for _ in range(2)),
            matrices(p)[0],
            matrices(p)[1].t(),
            p.prefix,
        ),
        bytes=synthesis_bytes,
        kernels=(stages("spectral_synthesis_kernel", bytes=synthesis_bytes, macs=one_way, wide_stores=vectors),),
        problems=ALWAYS_FOURIER,
        full_size=FOURIER_FULL_SIZE,
        unit=CHANNELS,
    ),
    Operator(
        "spectral_filtered",
        call=lambda p: OPERATORS_OF.spectral_filtered(tokens(p), weight(p), *matrices(p)),
        bytes=filtered_bytes,
        kernels=(stages("spectral_filtered_kernel", bytes=filtered_bytes, macs=there_and_back, wide_stores=vectors),),
        problems=BATCH | BOTH,
        full_size=FULL_SIZE,
        unit=CHANNELS,
    ),
    Operator(
        "spectral_filtered_backward_weight",
        call=lambda p: OPERATORS_OF.spectral_filtered_backward_weight(
            tokens(p), tokens(p), *matrices(p), bool(p.fourier)
        ),
        bytes=backward_weight_bytes,
        kernels=(
            stages(
                "spectral_filtered_backward_weight_kernel",
                bytes=lambda p: 2 * token_bytes(p) + matrix_bytes(p) + partial_bytes(p),
                macs=there_and_back,
            ),
            Kernel(
                "spectral_filtered_backward_weight_finish_kernel",
                bytes=lambda p: partial_bytes(p) + weight_bytes(p),
            ),
        ),
        problems=BATCH | BOTH,
        full_size=FULL_SIZE,
        unit=CHANNELS,
    ),
    Operator(
        "spectral_band_energy",
        call=lambda p: OPERATORS_OF.spectral_band_energy(tokens(p), bands(p), BANDS, *matrices(p), bool(p.fourier)),
        bytes=band_bytes,
        kernels=(stages("spectral_band_energy_kernel", bytes=band_bytes, macs=one_way),),
        problems=BOTH,
        full_size=FULL_SIZE,
        unit=CHANNELS,
    ),
    Operator(
        "spectral_band_energy_backward",
        call=lambda p: OPERATORS_OF.spectral_band_energy_backward(
            p.normal(p.B, BANDS, p.D), tokens(p), bands(p), *matrices(p), bool(p.fourier)
        ),
        bytes=band_backward_bytes,
        kernels=(
            stages(
                "spectral_band_energy_backward_kernel",
                bytes=band_backward_bytes,
                macs=there_and_back,
                wide_stores=vectors,
            ),
        ),
        problems=BOTH,
        full_size=FULL_SIZE,
        unit=CHANNELS,
    ),
    Operator(
        "spectral_token_energy",
        call=lambda p: OPERATORS_OF.spectral_token_energy(tokens(p), kept(p), *matrices(p)),
        bytes=lambda p: token_energy_bytes(p) + energy_bytes(p),
        kernels=(
            stages(
                "spectral_token_energy_kernel",
                bytes=lambda p: token_energy_bytes(p) + partial_energy_bytes(p),
                macs=there_and_back,
            ),
            Kernel(
                "spectral_token_energy_finish_kernel",
                bytes=lambda p: partial_energy_bytes(p) + energy_bytes(p),
            ),
        ),
        problems=BOTH,
        full_size=FULL_SIZE,
        unit=CHANNELS,
    ),
    Operator(
        "spectral_token_energy_backward",
        call=lambda p: OPERATORS_OF.spectral_token_energy_backward(
            p.positive(p.B, p.prefix + p.H * p.W), tokens(p), kept(p), *matrices(p)
        ),
        bytes=token_energy_backward_bytes,
        kernels=(
            stages(
                "spectral_token_energy_backward_kernel",
                bytes=token_energy_backward_bytes,
                macs=lambda p: 2 * there_and_back(p),
                wide_stores=vectors,
            ),
        ),
        problems=BOTH,
        full_size=FULL_SIZE,
        unit=CHANNELS,
    ),
)

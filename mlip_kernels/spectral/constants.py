"""Constants of the spectral family: the transforms as matrices, frequencies as masks, and what is kept of them.

A transform is one small dense matrix per axis, built in float64, rounded once and remembered. Angles are reduced, as
integers, to an eighth of a turn on either side of 0 before the cosine is taken: every entry is right to about one
rounding, and the sine rows of DC and Nyquist are exactly zero.

Axes are ``(n,)`` for the token axis and ``(height, width)`` for the grid. With the basis ``rfft`` the last axis has
``n // 2 + 1`` coefficients and the others are in FFT order. The normalised frequency of an axis is ``k / n`` for the
DCT and ``2 |k| / n`` for the FFT; on a grid ``ρ = sqrt((f_h² + f_w²) / 2)``.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes, is_in_torch_dispatch_mode

from mlip_kernels._library import open_library
from mlip_kernels._tracing import number, untraced

LIBRARY = open_library("mlip_kernels", "FRAGMENT")

Grid = tuple[int, int]
Matrices = tuple[Tensor | None, Tensor]
"""``matrix_h``, None on the token axis, and ``matrix_w``."""

REMEMBERED_BYTES = 128 * 2**20
"""How much memory the constants may take, on all devices together; the least recently used ones go first.

The matrices of one length take at most 16 MiB (`fft_matrix` in float64, 1,024 points); those of a vision transformer
take a few hundred kilobytes.
"""


class CacheInfo(NamedTuple):
    """What is remembered, and how often it was asked for."""

    misses: int
    entries: int
    bytes: int


class Remembered:
    """Constants by their parameters, at most ``limit`` bytes of them. Any number of threads may ask at once.

    A hit takes no lock: it reads the dictionary and writes the time into its entry, each in one step.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[tuple, list] = {}  # key -> [tensor, time of last use]
        self._clock = itertools.count()
        self._lock = threading.Lock()
        self._bytes = self._misses = 0

    def __call__(
        self, build: Callable[..., Tensor], parameters: tuple, device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        key = (build, parameters, device, dtype)
        entry = self._entries.get(key)
        if entry is None:
            return self._keep(key, _built(*key))
        entry[1] = next(self._clock)
        return entry[0]

    def _keep(self, key: tuple, value: Tensor) -> Tensor:
        """Remember ``value`` unless another thread was faster or it alone is too large, and forget what is too much."""
        with self._lock:
            self._misses += 1
            if key in self._entries:
                return self._entries[key][0]
            size = _bytes(value)
            if size > self.limit:
                return value
            self._bytes += size
            self._entries[key] = [value, next(self._clock)]
            while self._bytes > self.limit:
                oldest = min(self._entries, key=lambda kept: self._entries[kept][1])
                self._bytes -= _bytes(self._entries.pop(oldest)[0])
            return value

    def cache_clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._entries.clear()
            self._bytes = self._misses = 0

    def cache_info(self) -> CacheInfo:
        """What is remembered now."""
        with self._lock:
            return CacheInfo(self._misses, len(self._entries), self._bytes)


def _built(build: Callable[..., Tensor], parameters: tuple, device: torch.device, dtype: torch.dtype) -> Tensor:
    # An inference tensor could never be saved for a later backward. The CPU builds it: not every device has float64.
    # A trace would otherwise record how it is built, with sizes that are tensors there, instead of holding it.
    with torch.inference_mode(False), untraced():
        return build(*parameters, device=torch.device("cpu")).to(device, dtype)


def _bytes(value: Tensor) -> int:
    return value.untyped_storage().nbytes()


_remembered = Remembered(REMEMBERED_BYTES)


def constant(build: Callable[..., Tensor], *parameters: object, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``build(*parameters, device=...)``, a float64 tensor, as ``dtype`` on ``device``.

    The result is remembered. A graph of ``torch.compile`` fetches what is remembered through the operator that
    `fetched_by_graphs` defines; one of ``torch.export`` holds it. While something else replaces tensors (fake tensors,
    ``torch.func``), it is built there, as what is built there must not outlive it. A mode that looks on (one that
    counts flops, or decides what a checkpoint keeps) sees what is remembered, not how it was built.
    """
    if torch.compiler.is_dynamo_compiling():
        operator = getattr(torch.ops.mlip_kernels, f"spectral_{build.__name__}")
        return operator(*parameters, device=device, dtype=dtype)
    if not torch._C._are_functorch_transforms_active():
        if not is_in_torch_dispatch_mode():
            return _remembered(build, parameters, device, dtype)
        if _only_looked_on() or (torch.compiler.is_exporting() and _are_numbers(parameters)):
            with _disable_current_modes():
                return _remembered(build, parameters, device, dtype)
    return build(*parameters, device=device).to(dtype)


def _only_looked_on() -> bool:
    """Whether the modes at work leave tensors as they are: none fakes, records or functionalises them."""
    keys = torch._C._TorchDispatchModeKey
    return all(torch._C._get_dispatch_mode(key) is None for key in (keys.FAKE, keys.PROXY, keys.FUNCTIONAL))


def _are_numbers(parameters: tuple) -> bool:
    """Whether no parameter is symbolic."""
    flat = [p for group in parameters for p in (group if isinstance(group, tuple) else (group,))]
    return not any(isinstance(p, (torch.SymInt, torch.SymFloat)) for p in flat)


def fetched_by_graphs(parameters: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Decorator that also defines the operator ``mlip_kernels::spectral_<name>``, the constant from memory.

    It returns a copy, because a compiler may write into what an operator returned once nobody else reads it.

    Args:
        parameters: those of the decorated function before ``device``, as in ``native_functions.yaml``.
    """

    def define(build: Callable[..., Tensor]) -> Callable[..., Tensor]:
        name = f"spectral_{build.__name__}"
        LIBRARY.define(f"{name}({parameters}, *, Device device, ScalarType dtype) -> Tensor")

        def fetch(*given: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
            hashable = tuple(tuple(p) if isinstance(p, list) else p for p in given)
            return _remembered(build, hashable, device, dtype).clone()

        def fake(*given: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
            return build(*given, device=device).to(dtype)

        LIBRARY.impl(name, fetch, "CompositeExplicitAutograd")
        # What torch.library.register_fake does, without its costly search for the line that calls it.
        qualified = f"{LIBRARY.ns}::{name}"
        fakes = torch._library.simple_registry.singleton.find(qualified).fake_impl
        LIBRARY._registration_handles.append(fakes.register(fake, qualified, lib=LIBRARY))
        return build

    return define


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Half precision is widened to float32, float64 stays."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


_INVERSE_TYPE = {1: 1, 2: 3, 3: 2, 4: 4}
_INVERSE_NORM = {"backward": "forward", "forward": "backward", "ortho": "ortho"}


def waves(rows: Tensor, columns: Tensor, period: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of ``rows · columns`` (integers) times a full turn divided by ``period``."""
    quarters = 4 * (torch.outer(rows, columns) % period)
    nearest = (2 * quarters + period) // (2 * period)
    angle = (quarters - nearest * period).double() / period * (math.pi / 2)
    cosine, sine, odd = angle.cos(), angle.sin(), nearest % 2 == 1
    cosine, sine = torch.where(odd, -sine, cosine), torch.where(odd, cosine, sine)
    half_turn = nearest % 4 >= 2
    return torch.where(half_turn, -cosine, cosine), torch.where(half_turn, -sine, sine)


def ones_except(mask: Tensor, value: float) -> Tensor:
    """1 in float64, and ``value`` where the mask is True."""
    return torch.ones(mask.shape, dtype=torch.float64, device=mask.device).masked_fill(mask, value)


def scale_of(norm: str, period: int, *, inverse: bool = False) -> float:
    """The factor of a norm, for a transform of ``period`` points (a cosine transform mirrors its points)."""
    if norm == "ortho":
        return 1 / torch.sym_sqrt(period)
    return 1 / period if (norm == "forward") != inverse else 1.0


def inverse_of(type: int, norm: str) -> tuple[int, str]:
    """Type and norm of the inverse DCT: 2 and 3 are each other's inverse, 1 and 4 their own, up to the norm."""
    return _INVERSE_TYPE[type], _INVERSE_NORM[norm]


@fetched_by_graphs("SymInt n, SymInt type, str norm")
def dct_matrix(n: int, type: int, norm: str, *, device: torch.device) -> Tensor:
    """``[n, n]`` matrix of ``scipy.fft.dct`` of this type and norm (``ortho`` means ``orthogonalize=True``)."""
    k = torch.arange(n, device=device)
    both_ends = (k == 0) | (k == n - 1)
    if type == 1:
        period = 2 * (n - 1)
        matrix = 2 * waves(k, k, period)[0]
        inputs, outputs = both_ends, both_ends
    elif type == 2:
        period = 2 * n
        matrix = 2 * waves(k, 2 * k + 1, 2 * period)[0]
        inputs, outputs = k < 0, k == 0
    elif type == 3:
        period = 2 * n
        matrix = 2 * waves(2 * k + 1, k, 2 * period)[0]
        inputs, outputs = k == 0, k < 0
    else:
        period = 2 * n
        matrix = 2 * waves(2 * k + 1, 2 * k + 1, 4 * period)[0]
        inputs, outputs = k < 0, k < 0
    if norm == "ortho":
        root = math.sqrt(0.5)
        matrix = ones_except(outputs, root)[:, None] * matrix * ones_except(inputs, root)
    else:
        matrix = matrix * ones_except(inputs, 0.5)
    return matrix * scale_of(norm, period)


@fetched_by_graphs("SymInt n, SymInt type, str norm")
def idct_matrix(n: int, type: int, norm: str, *, device: torch.device) -> Tensor:
    """The inverse of `dct_matrix`."""
    return dct_matrix(n, *inverse_of(type, norm), device=device)


@fetched_by_graphs("SymInt n, str norm")
def rfft_matrix(n: int, norm: str, *, device: torch.device) -> Tensor:
    """``[2 (n // 2 + 1), n]``: real tokens to the real parts, then the imaginary parts, of half the spectrum."""
    cosine, sine = waves(torch.arange(n // 2 + 1, device=device), torch.arange(n, device=device), n)
    return torch.cat((cosine, -sine)) * scale_of(norm, n)


@fetched_by_graphs("SymInt n, str norm")
def irfft_matrix(n: int, norm: str, *, device: torch.device) -> Tensor:
    """``[n, 2 (n // 2 + 1)]``: half a spectrum, real then imaginary parts, to real tokens.

    The other half is the mirror image, so its coefficients count twice. DC and Nyquist are their own image: they
    count once, and an imaginary part there has no effect, as their sine is 0.
    """
    k = torch.arange(n // 2 + 1, device=device)
    cosine, sine = waves(torch.arange(n, device=device), k, n)
    own_image = (k == 0) | (2 * k == n)
    return torch.cat((torch.where(own_image, cosine, 2 * cosine), -2 * sine), 1) * scale_of(norm, n, inverse=True)


@fetched_by_graphs("SymInt n, str norm")
def fft_matrix(n: int, norm: str, *, device: torch.device) -> Tensor:
    """``[2, n, n]``: real and imaginary part of the matrix of the complex FFT."""
    k = torch.arange(n, device=device)
    cosine, sine = waves(k, k, n)
    return torch.stack((cosine, -sine)) * scale_of(norm, n)


@fetched_by_graphs("SymInt n, str norm")
def ifft_matrix(n: int, norm: str, *, device: torch.device) -> Tensor:
    """``[2, n, n]``: real and imaginary part of the matrix of the inverse of the complex FFT."""
    k = torch.arange(n, device=device)
    cosine, sine = waves(k, k, n)
    return torch.stack((cosine, sine)) * scale_of(norm, n, inverse=True)


@fetched_by_graphs("SymInt n, SymInt new_n, bool rescale")
def resize_matrix(n: int, new_n: int, rescale: bool, *, device: torch.device) -> Tensor:
    """``[new_n, n]``: orthonormal DCT, its first ``new_n`` coefficients (or zeros behind), inverse on ``new_n``."""
    common = torch.sym_min(n, new_n)
    analysis = dct_matrix(n, 2, "ortho", device=device)[:common]
    synthesis = dct_matrix(new_n, 3, "ortho", device=device)[:, :common]
    return synthesis @ analysis * (torch.sym_sqrt(new_n / n) if rescale else 1.0)


def axes_of(x: Tensor, grid: Grid | None, prefix_tokens: int) -> Grid:
    """Height and width: the token axis is a grid of one row."""
    if grid:
        return grid
    tokens = x.shape[1]
    return 1, (tokens if type(tokens) is int else number(tokens)) - prefix_tokens


def cosine_matrices(
    x: Tensor, build: Callable[..., Tensor], height: int, width: int, type: int, grid: Grid | None, norm: str
) -> Matrices:
    """The DCT along both axes of the grid, or along the token axis."""
    return matrix(x, build, height, type, norm) if grid else None, matrix(x, build, width, type, norm)


def fourier_matrices(x: Tensor, height: int, width: int, grid: Grid | None, norm: str) -> Matrices:
    """The real FFT along rows and the complex FFT along columns."""
    return matrix(x, fft_matrix, height, norm) if grid else None, matrix(x, rfft_matrix, width, norm)


def basis_matrices(x: Tensor, height: int, width: int, grid: Grid | None, basis: str) -> Matrices:
    """The orthonormal transforms: DCT of type 2, or FFT."""
    if basis == "dct":
        return cosine_matrices(x, dct_matrix, height, width, 2, grid, "ortho")
    return fourier_matrices(x, height, width, grid, "ortho")


def matrix(x: Tensor, build: Callable[..., Tensor], *parameters: object) -> Tensor:
    """``build(*parameters)`` on the device of x, in the dtype that x is computed in."""
    return constant(build, *parameters, device=x.device, dtype=compute_dtype(x))


def spectrum_shape(axes: Sequence[int], basis: str) -> tuple[int, ...]:
    """The coefficients along each axis."""
    return (*axes[:-1], axes[-1] // 2 + 1) if basis == "rfft" else tuple(axes)


def spectrum_layout(grid: Grid | None, basis: str, channels: str = "") -> str:
    """The shape of a spectrum in letters."""
    axes = ("N" if grid is None else "H, W") + (" // 2 + 1" if basis == "rfft" else "")
    return f"[{axes}{channels}]"


def argument_layout(grid: Grid | None, basis: str, channels: str = "") -> str:
    """`spectrum_layout` for an error, which says that the shape is that of a call without a grid."""
    return spectrum_layout(grid, basis, channels) + (" without a grid" if grid is None else "")


def _numerators(axes: Sequence[int], basis: str, device: torch.device) -> list[Tensor]:
    """Per axis ``n · f`` as integers, shaped to broadcast over the spectrum."""
    result = []
    for axis, (n, count) in enumerate(zip(axes, spectrum_shape(axes, basis), strict=True)):
        k = torch.arange(count, device=device)
        if basis == "rfft":
            k = 2 * torch.minimum(k, n - k)
        result.append(k.reshape([-1 if other == axis else 1 for other in range(len(axes))]))
    return result


def _squared_radius(axes: Sequence[int], basis: str, device: torch.device) -> tuple[Tensor, int, int]:
    """Integers ``p``, ``q`` and ``n`` with ``ρ² = p / (q n²)``: comparisons need not round."""
    numerators = _numerators(axes, basis, device)
    if len(axes) == 1:
        return numerators[0] ** 2, 1, axes[0]
    (rows, columns), (height, width) = numerators, axes
    return (rows * width) ** 2 + (columns * height) ** 2, 2, height * width


def frequency_radius(axes: Sequence[int], basis: str, *, device: torch.device) -> Tensor:
    """``ρ`` of every coefficient in float64, correctly rounded wherever it is a rational number."""
    p, q, n = _squared_radius(axes, basis, device)
    return (p.double() / q).sqrt() / n


@fetched_by_graphs("SymInt[] axes, str basis, float cutoff")
def high_pass(axes: Sequence[int], basis: str, cutoff: float, *, device: torch.device) -> Tensor:
    """1 for every coefficient with ``ρ >= cutoff``, 0 for the others."""
    return (frequency_radius(axes, basis, device=device) >= cutoff).double()


@fetched_by_graphs("SymInt[] axes, str basis, SymInt bands")
def equal_bands(axes: Sequence[int], basis: str, bands: int, *, device: torch.device) -> Tensor:
    """The band of every coefficient: ``floor(ρ · bands)``, and ``bands - 1`` for ``ρ = 1``; exact, in integers."""
    p, q, n = _squared_radius(axes, basis, device)
    lower_edges = torch.arange(1, bands, device=device) ** 2 * (q * n**2)
    return torch.searchsorted(lower_edges, p * bands**2, right=True)

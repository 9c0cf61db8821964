"""Every public function of the spectral family, called on a GPU and compared with float64."""

import torch

import mlip_kernels
from mlip_kernels import use_reference
from mlip_kernels.testing import assert_as_accurate, gradients


def tokens(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def spectrum_shape(length, grid, basis):
    height, width = grid or (1, length)
    return (height, width // 2 + 1 if basis == "rfft" else width)[0 if grid else 1 :]


def filters(length, channels, grid, basis):
    pair = (2,) if basis == "rfft" else ()
    return tokens(*spectrum_shape(length, grid, basis), channels, *pair, seed=3)


def functions(length, channels, grid, prefix):
    """Every public function with a kernel, on tokens ``[B, prefix + length, channels]`` and what else it takes."""
    where = {"grid": grid, "prefix_tokens": prefix}
    found = {
        "dct": (lambda x: mlip_kernels.dct(x, **where), []),
        "idct": (lambda x: mlip_kernels.idct(x, type=4, norm="forward", **where), []),
        "rfft": (lambda x: mlip_kernels.rfft(x, **where), []),
    }

    def there_and_back(x):
        real, imaginary = mlip_kernels.rfft(x, **where)
        return mlip_kernels.irfft(real, imaginary.flip(1), **({"grid": grid} if grid else {"n": length}))

    found["irfft"] = (there_and_back, [])
    for basis in ("dct", "rfft"):
        found[f"filter {basis}"] = (
            lambda x, w, basis=basis: mlip_kernels.spectral_filter(x, w, basis=basis, **where),
            [filters(length, channels, grid, basis)],
        )
        found[f"bands {basis}"] = (lambda x, basis=basis: mlip_kernels.band_energy(x, 3, basis=basis, **where), [])
        found[f"tokens {basis}"] = (lambda x, basis=basis: mlip_kernels.token_energy(x, 0.4, basis=basis, **where), [])
    if grid:
        new = (grid[0] + 2, max(1, grid[1] - 3))
        found["resize"] = (lambda x: mlip_kernels.spectral_resize(x, grid, new, prefix_tokens=prefix), [])
    return found


def results(function, inputs, put=torch.Tensor.detach):
    """The function's results and the gradients of its inputs."""
    inputs = [put(t) for t in inputs]
    outputs = function(*inputs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    return [*outputs, *gradients(function, inputs)]


def check_all(cuda, x, grid, prefix):
    length = x.shape[1] - prefix
    for name, (function, others) in functions(length, x.shape[2], grid, prefix).items():
        before = len(cuda.operators)
        with cuda:
            found = [result.cpu() for result in results(function, [x, *others], cuda.put)]
        assert len(cuda.operators) > before or not x.numel()
        with use_reference():
            baseline = results(function, [x, *others])
            truth = results(function, [t.double() for t in (x, *others)])
        for number, three in enumerate(zip(found, baseline, truth, strict=True)):
            assert_as_accurate(*three, name=f"{name}, result {number}, {list(x.shape)}, grid {grid}, {x.dtype}")

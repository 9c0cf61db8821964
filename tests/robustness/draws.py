"""Random tensors that are hard on kernels: awkward shapes, odd layouts, values at the edges of arithmetic."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LENGTHS = (1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 15, 16, 17, 24, 31, 33, 49)
CHANNELS = (1, 2, 3, 4, 7, 8, 9, 16, 17, 31, 33, 64, 65)
DTYPES = (torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)
VALUES = (
    "normal",
    "normal",
    "normal",
    "integers",
    "zeros",
    "equal tokens",
    "tiny",
    "denormal",
    "large",
    "mixed scales",
)
LAYOUTS = ("contiguous", "contiguous", "reversed", "every second", "part", "offset", "repeated")


class Draw:
    """Everything that one case chooses, from one seed."""

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.values = self.choice(VALUES)
        """What kind of numbers the tensors of this case hold."""

    def choice(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def batch(self) -> int:
        return self.choice((0, 1, 1, 2, 2, 3))

    def numbers(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Dense values of this case's kind, in a range where no result that is wanted overflows in float32."""
        x = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        if self.values == "integers":
            x = x.round()
        elif self.values == "zeros":
            x = torch.zeros_like(x)
        elif self.values == "equal tokens" and x.dim() > 1:
            x = x[:, :1].expand_as(x)
        elif self.values == "tiny":
            x = x * 2.0**-10
        elif self.values == "denormal":
            x = x * torch.finfo(dtype).tiny / 4
        elif self.values == "large":
            x = x * (1e3 if dtype == torch.float16 else 1e8)
        elif self.values == "mixed scales":
            x = x * 10.0 ** torch.randint(-3, 3, (*x.shape[:-1], 1), generator=self.generator)
        return x.to(dtype)

    def tensor(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return self.laid_out(self.numbers(shape, dtype))

    def laid_out(self, x: Tensor) -> Tensor:
        """The same values, or one sample's values for all, in memory that is not plain."""
        layout = self.choice(LAYOUTS)
        if layout == "reversed":
            order = tuple(range(x.dim() - 1, -1, -1))
            return x.permute(order).contiguous().permute(order)
        if layout == "every second":
            return x.repeat_interleave(2, -1)[..., ::2]
        if layout == "part":
            return torch.cat((x, x[..., :1]), -1)[..., :-1] if x.shape[-1] else x
        if layout == "offset":
            memory = x.new_zeros(x.numel() + 3)
            memory[3:] = x.reshape(-1)
            return memory[3:].view(x.shape)
        if layout == "repeated" and x.shape[0] > 1:
            return x[:1].expand_as(x)
        return x.contiguous()

    def mask(self, *shape: int) -> Tensor:
        """Which tokens are real, in the types that masks come in; now and then a row without any."""
        mask = torch.rand(*shape, generator=self.generator) < self.choice((0.3, 0.8, 1.0))
        if shape[0] and self.chance(0.2):
            mask[self.random.randrange(shape[0])] = False
        kind = self.choice(("bool", "bool", "bool", "int64", "odd bytes"))
        if kind == "int64":
            return mask.long()
        return self.laid_out((mask.to(torch.uint8) * 6).view(torch.bool) if kind == "odd bytes" else mask)

    def grid(self, largest: int = 9) -> tuple[int, int] | None:
        """A patch grid, or the token axis."""
        if self.chance(0.5):
            return None
        return self.random.randint(1, largest), self.random.randint(1, largest)

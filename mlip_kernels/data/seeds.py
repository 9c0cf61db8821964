"""Random numbers that depend on what they are for, never on global state or on the order of calls."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def digest(*parts: object) -> int:
    """A 63-bit integer from ``parts``, the same in every process and on every machine."""
    data = "\x00".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def generator(*parts: object) -> torch.Generator:
    """A CPU generator seeded by ``parts``."""
    return torch.Generator().manual_seed(digest(*parts))


def shuffled(indices: Tensor, *parts: object) -> Tensor:
    """``indices`` in the random order that ``parts`` name."""
    return indices[torch.randperm(len(indices), generator=generator(*parts))]

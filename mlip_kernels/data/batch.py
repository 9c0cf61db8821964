"""One batch: normalised images, token ids and the captions they stand for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlip_kernels.data.packages import require

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
VOCABULARY = 49_408
"""Entries of CLIP's tokenizer."""
LONGEST_CAPTION = 131_072
"""Characters; Python's csv module takes as many."""
LONGEST_TOKEN = 32
"""Characters, at most, of a token in CLIP's vocabulary."""


class Batch(NamedTuple):
    """``images`` float32 ``[B, 3, S, S]``, CLIP's mean and deviation taken out; ``text`` int64 ``[B, context_length]``,
    0 after the end of text; ``captions``, the B strings."""

    images: Tensor
    text: Tensor
    captions: list[str]


@cache
def _tokenizer() -> Any:
    return require("open_clip.tokenizer").SimpleTokenizer()


def tokenize(captions: Sequence[str], context_length: int) -> Tensor:
    """CLIP's byte-pair encoding as open_clip ships it: int64 ``[len(captions), context_length]``.

    Each row is start of text, the caption, end of text, then zeros. A longer caption is cut, its end of text kept.
    A word is cut first to what fills the row: the encoding takes time with the square of its length.
    """
    word = re.compile(rf"(\S{{{LONGEST_TOKEN * context_length}}})\S+")
    return _tokenizer()([word.sub(r"\1", caption) for caption in captions], context_length)


def normalize(images: Tensor) -> Tensor:
    """uint8 ``[B, 3, S, S]`` to float32 with CLIP's mean and standard deviation."""
    mean = torch.tensor(CLIP_MEAN).mul(255).view(3, 1, 1)
    deviation = torch.tensor(CLIP_STD).mul(255).view(3, 1, 1)
    return images.to(torch.float32).sub_(mean).div_(deviation)

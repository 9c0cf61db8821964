"""From the bytes of a file to a square picture: decoding, the central view, and a random one.

All pictures are uint8 ``[3, height, width]``; resizing is bicubic with antialiasing.
"""

from __future__ import annotations

import io
import math
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels.data.packages import require

SMALLEST_AREA = 0.8
WIDEST_ASPECT = 1.1


def decode(data: bytes, size: int) -> Tensor | None:
    """The RGB picture in ``data``, or None where it cannot be decoded.

    A JPEG much larger than ``size`` is decoded at a fraction of its size, at least twice ``size`` on its shorter side.
    """
    image_module = require("PIL.Image")
    numpy = require("numpy")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = image_module.open(io.BytesIO(data))
            image.draft("RGB", (2 * size, 2 * size))
            pixels = numpy.array(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception:  # decoders raise nearly anything on damaged input: OSError, SyntaxError, struct.error, ...
        return None
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """``image`` at another size."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def central_view(image: Tensor, size: int) -> Tensor:
    """The largest square in the middle of ``image``, resized to ``size``."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[:, top : top + side, left : left + side], size, size)


def random_view(image: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """A random box of ``image`` resized to ``size``: the mild augmentation of training.

    The box has 80 to 100 % of the area of the largest square, sides within 10 % of each other, and lies anywhere.
    It is never mirrored, since captions speak of left and right.
    """
    height, width = image.shape[1:]
    area, aspect, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    side = min(height, width) * math.sqrt(SMALLEST_AREA + (1 - SMALLEST_AREA) * area)
    stretch = math.sqrt(WIDEST_ASPECT ** (2 * aspect - 1))
    box_height = max(1, min(height, round(side / stretch)))
    box_width = max(1, min(width, round(side * stretch)))
    top, left = int(down * (height - box_height + 1)), int(right * (width - box_width + 1))
    return resize(image[:, top : top + box_height, left : left + box_width], size, size)

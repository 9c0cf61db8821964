"""From the bytes of a file to a square picture: decoding, the central view, and a random one.

All pictures are uint8 ``[3, height, width]``; resizing is bicubic with antialiasing.
"""

from __future__ import annotations

import io
import math
import warnings
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mlip_kernels.data.packages import require

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is read, told by content and not by name. Pillow's other decoders stay shut: that for EPS starts Ghostscript."""
MAX_PIXELS = 2**26
"""Decoding takes at most 14 bytes a pixel, so less than 1 GiB; a few kilobytes of PNG can claim any size."""
MAX_JPEG_PIXELS = 2**27
"""Of a JPEG that is reduced while it is decoded. A progressive one takes 6 bytes for each of them all the same."""
MAX_BYTES = 2**28
"""The largest file, or member of a shard, that is read as a picture."""

SMALLEST_AREA = 0.8
WIDEST_ASPECT = 1.1

TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")
PLAIN = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
"""EXIF's orientation to the transposition that puts the picture upright."""


class UndecodableError(ValueError):
    """A picture that cannot be decoded or is not to be; the message says why."""


def decode(data: bytes, size: int) -> Tensor | None:
    """`load`, with None for a picture that cannot be decoded."""
    try:
        return load(data, size)
    except UndecodableError:
        return None


def load(data: bytes, size: int) -> Tensor:
    """The RGB picture in ``data``, upright as its EXIF says, what is transparent on white.

    Of several frames the first is taken. 16-bit values keep their high byte. Colour profiles are not applied. A JPEG
    much larger than ``size`` is decoded at a fraction of its size, at least twice ``size`` on its shorter side.

    Raises:
        UndecodableError: ``data`` is damaged, in none of `FORMATS`, of a mode without a fixed range (32 bits, float)
            or without a conversion (Lab), or has more than `MAX_PIXELS`.
    """
    pillow = _pillow()
    if len(data) > MAX_BYTES:
        raise UndecodableError(f"more than {MAX_BYTES:,} bytes")
    try:
        image = pillow.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        image.draft("RGB", (2 * size, 2 * size))
        if math.prod(image.size) > MAX_PIXELS or width * height > MAX_JPEG_PIXELS:
            raise UndecodableError(f"{width} x {height} pixels are more than the {MAX_PIXELS:,} that are read")
        image.load()
    except (MemoryError, UndecodableError):
        raise
    except pillow.UnidentifiedImageError as failure:
        raise UndecodableError(f"damaged, or not one of {', '.join(FORMATS)}") from failure
    except Exception as failure:  # decoders raise nearly anything on damaged input: OSError, SyntaxError, struct.error
        raise UndecodableError(f"damaged: {failure}") from failure
    return torch.from_numpy(require("numpy").array(upright_on_white(image))).permute(2, 0, 1)


def upright_on_white(image: Any) -> Any:
    """A Pillow picture of any mode as RGB, upright as its EXIF says, what is transparent on white.

    Raises:
        UndecodableError: its mode has no fixed range or no conversion.
    """
    orientation = _orientation(image)
    image = _on_white(image)
    if orientation in UPRIGHT:
        image = image.transpose(_pillow().Transpose[UPRIGHT[orientation]])
    return image


@cache
def _pillow() -> Any:
    """Pillow; it would warn of oddities in single pictures, which are decoded or counted all the same.

    The filter stays: switching it on and off around each picture is not safe between threads.
    """
    module = require("PIL.Image")
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return module


def _on_white(image: Any) -> Any:
    """A loaded picture of any mode as RGB, on white."""
    pillow, numpy = _pillow(), require("numpy")
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # the latter in older versions
        values = numpy.asarray(image)
        gray = (values >> 8).astype("uint8")  # Pillow's own conversion clips at 255
        gray[values == image.info.get("transparency", -1)] = 255
        return pillow.fromarray(gray).convert("RGB")
    if image.mode not in PLAIN + TRANSPARENT:
        raise UndecodableError(f"pixels of mode {image.mode} have no defined conversion to RGB")
    alpha_in_palette = image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"
    if image.mode not in TRANSPARENT and "transparency" not in image.info and not alpha_in_palette:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = pillow.new("RGB", image.size, "white")
    white.paste(image, mask=image)
    return white


def _orientation(image: Any) -> int:
    """EXIF's orientation, 1 where there is none or the EXIF is damaged: the pixels are sound all the same."""
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # as in `load`
        return 1
    return orientation if isinstance(orientation, int) else 1


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """``image`` at another size."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


def central_view(image: Tensor, size: int) -> Tensor:
    """``image`` with its shorter side resized to ``size``, and the square in the middle of that.

    To the bit what open_clip's transform for evaluation makes of the picture, so that a model meets the same pixels
    here and there. A strip too long to be resized first (`MAX_PIXELS`) is cut first.
    """
    functional = require("torchvision.transforms.functional")
    shorter, longer = sorted(image.shape[1:])
    if size * size * longer > MAX_PIXELS * shorter:
        image = functional.center_crop(image, [shorter, shorter])
    picture = functional.to_pil_image(image)
    picture = functional.resize(picture, size, functional.InterpolationMode.BICUBIC)
    return functional.pil_to_tensor(functional.center_crop(picture, [size, size]))


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

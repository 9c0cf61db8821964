"""Draw the pictures of the documentation: python docs/figures/draw.py

They are computed with the definitions of the operators, in plain Python, and written as SVG by hand, so that they are
small and come out the same everywhere.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

PREFIX, SOURCE, TARGET, TEXT = "#c9a227", "#2f6f9f", "#4f8f5b", "#7a5c99"
GREY, GREY_BLUE, DARK, OCHRE = "#cfcfcf", "#7a8ba6", "#333333", "#9a7b12"
BANDS = ("#dbe7f3", "#a9c7e4", "#6a9fcf", "#2f6f9f")
Grid = list[list[float]]


class Picture:
    """Shapes on a white page."""

    def __init__(self, width: int, height: int) -> None:
        self.size = width, height
        self.parts: list[str] = []

    def box(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "white", r: float = 0
    ) -> None:
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"' + (f' rx="{r:g}"' if r else "")
        self.parts.append(f'<rect {shape} fill="{fill}" stroke="{stroke}"/>')

    def text(self, x: float, y: float, words: str, *, size: int = 12, anchor: str = "middle", fill: str = DARK) -> None:
        for number, line in enumerate(words.split("\n")):
            place = (
                f'x="{x:g}" y="{y + number * size * 1.25:g}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"'
            )
            self.parts.append(f"<text {place}>{escape(line)}</text>")

    def arrow(self, x: float, y: float, x2: float, y2: float, *, colour: str = DARK, width: float = 1.5) -> None:
        end = f'stroke="{colour}" stroke-width="{width:g}" marker-end="url(#head)"'
        self.parts.append(f'<line x1="{x:g}" y1="{y:g}" x2="{x2:g}" y2="{y2:g}" {end}/>')

    def heat(self, x: float, y: float, cell: float, values: Grid, colour: Callable[[float], str]) -> None:
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                self.box(x + column * cell, y + row * cell, cell, cell, colour(value))

    def svg(self) -> str:
        width, height = self.size
        head = '<marker id="head" markerWidth="7" markerHeight="6" refX="6" refY="3" orient="auto" '
        head += f'markerUnits="userSpaceOnUse"><path d="M0,0 L7,3 L0,6 z" fill="{DARK}"/></marker>'
        opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        opening += f'height="{height}" font-family="Helvetica, Arial, sans-serif">'
        page = f'<rect width="{width}" height="{height}" fill="white"/>'
        return "\n".join((opening, f"<defs>{head}</defs>", page, *self.parts, "</svg>\n"))


def blue(share: float) -> str:
    """From white (0) to dark blue (1)."""
    low, high, share = (245, 248, 251), (23, 62, 99), max(0.0, min(1.0, share))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def dct_matrix(n: int) -> Grid:
    """Orthonormal DCT of type 2."""
    scale = [math.sqrt((1 if k == 0 else 2) / n) for k in range(n)]
    return [[scale[k] * math.cos(math.pi * k * (2 * i + 1) / (2 * n)) for i in range(n)] for k in range(n)]


def product(a: Grid, b: Grid) -> Grid:
    return [[sum(x * y for x, y in zip(row, column, strict=True)) for column in zip(*b, strict=True)] for row in a]


def transposed(a: Grid) -> Grid:
    return [list(column) for column in zip(*a, strict=True)]


def spectral() -> Picture:
    """One channel of 8 x 8 tokens, its coefficients, their bands, and what token_energy makes of them."""
    n, cell, top = 8, 20, 56
    disc = [[(i - 2.5) ** 2 + (j - 4.5) ** 2 < 4 for j in range(n)] for i in range(n)]
    tokens = [[0.05 * (i + j) + 0.3 * disc[i][j] * (-1) ** (i + j) + 0.15 for j in range(n)] for i in range(n)]
    forward = dct_matrix(n)
    spectrum = product(product(forward, tokens), transposed(forward))
    rho = [[math.hypot(i / n, j / n) / math.sqrt(2) for j in range(n)] for i in range(n)]
    high = [[spectrum[i][j] * (rho[i][j] >= 0.25) for j in range(n)] for i in range(n)]
    back = product(product(transposed(forward), high), forward)
    energy = [[value * value for value in row] for row in back]
    highest = max(map(max, energy))

    picture = Picture(900, 270)
    panels: Sequence[tuple[str, str, Grid, Callable[[float], str]]] = (
        ("tokens on the patch grid", "x: one of D channels", tokens, blue),
        ("coefficients", "dct(x, grid=(8, 8))", [[abs(v) ** 0.5 / 2 for v in row] for row in spectrum], blue),
        ("frequencies", "band_energy(x, 4)", rho, lambda f: BANDS[min(3, int(f * 4))]),
        ("high-frequency energy", "token_energy(x, 0.25)", [[v / highest for v in row] for row in energy], blue),
    )
    for number, (title, call, values, colour) in enumerate(panels):
        left = 30 + number * 222
        picture.text(left + n * cell / 2, 24, title, size=14)
        picture.heat(left, top, cell, values, colour)
        picture.text(left + n * cell / 2, top + n * cell + 24, call)
        if number:
            picture.arrow(left - 52, top + n * cell / 2, left - 12, top + n * cell / 2)
    picture.text(30 + 222 + 80, top - 8, "k_w →   low to high", size=10)
    picture.text(30 + 444 + 80, top - 8, "ρ rises from the top left", size=10)
    picture.text(30 + 666 + 80, top - 8, "low ρ removed, back, squared", size=10)
    return picture


def merging() -> Picture:
    """Nine tokens, r = 2: roles, proposals, output order and sizes."""
    picture, step, cell = Picture(760, 270), 66, 44
    left, top, bottom = 150, 46, 190
    best = {2: (1, 0.95), 4: (5, 0.52), 6: (5, 0.90), 8: (7, 0.40)}
    roles = {0: ("class", PREFIX)} | {i: (f"{i}", SOURCE if i in best else TARGET) for i in range(1, 9)}
    place = {i: left + i * step for i in range(9)}
    picture.text(20, top + 27, "tokens [B, 9, D]", anchor="start")
    for token, (name, colour) in roles.items():
        picture.box(place[token], top, cell, cell, colour, r=4)
        picture.text(place[token] + cell / 2, top + 27, name, fill="white")
    for source, (target, cosine) in best.items():
        merges = cosine >= 0.9
        x, x2 = place[source] + cell / 2, place[target] + cell / 2
        middle = (x + x2) / 2
        path = f"M{x:g},{top + cell} Q{middle:g},{top + cell + 44} {x2:g},{top + cell + 3}"
        stroke = f'stroke="{DARK}" stroke-width="2"' if merges else 'stroke="#999999" stroke-dasharray="4 3"'
        picture.parts.append(f'<path d="{path}" fill="none" {stroke} marker-end="url(#head)"/>')
        picture.text(middle, top + cell + 38, f"{cosine:.2f}", size=11)
    picture.text(20, top + cell + 30, "best target of every\nsource, by cosine", size=11, anchor="start")
    picture.text(left + 4.5 * step, top + cell + 68, "the r = 2 best pairs merge (solid)", size=12)
    output = (("class", PREFIX, 1), ("4", SOURCE, 1), ("8", SOURCE, 1), ("1, 2", TARGET, 2), ("3", TARGET, 1))
    output = (*output, ("5, 6", TARGET, 2), ("7", TARGET, 1))
    picture.text(20, bottom + 27, "merged [B, 7, D]", anchor="start")
    picture.text(20, bottom + cell + 20, "size [B, 7]", anchor="start")
    for number, (name, colour, size) in enumerate(output):
        x = left + (number + 1) * step
        picture.box(x, bottom, cell, cell, colour, r=4)
        picture.text(x + cell / 2, bottom + 27, name, fill="white")
        picture.text(x + cell / 2, bottom + cell + 20, f"{size}")
    picture.text(left, 24, "prefix", fill=PREFIX, anchor="start")
    picture.text(left + 70, 24, "sources: even positions", fill=SOURCE, anchor="start")
    picture.text(left + 230, 24, "targets: odd positions", fill=TARGET, anchor="start")
    return picture


def contrastive() -> Picture:
    """Similarities of one image's tokens and one text's: both logits are means of maxima of one matrix."""
    values = [
        [0.82, 0.10, 0.31, 0.05, 0.90],
        [0.15, 0.44, 0.20, 0.12, 0.70],
        [0.76, 0.22, 0.09, 0.18, 0.10],
        [0.08, 0.35, 0.61, 0.25, 0.30],
    ]
    real, cell, left, top = 4, 52, 180, 70
    picture = Picture(760, 380)
    picture.text(left + 2.5 * cell, 24, "text tokens t_m", size=14)
    for column in range(5):
        name = f"t{column + 1}" if column < real else "padding"
        picture.text(left + (column + 0.5) * cell, top - 10, name, size=11)
    winners = [max(range(real), key=lambda m, row=row: row[m]) for row in values]
    for n, row in enumerate(values):
        picture.text(left - 14, top + (n + 0.58) * cell, f"v{n + 1}", anchor="end")
        for m, value in enumerate(row):
            masked = m >= real
            picture.box(left + m * cell, top + n * cell, cell, cell, GREY if masked else blue(0.8 * value))
            fill = "#888888" if masked else "white" if value > 0.5 else DARK
            picture.text(left + (m + 0.5) * cell, top + (n + 0.58) * cell, f"{value:.2f}", fill=fill)
    line = 'fill="none" stroke-width="3"'
    for n, m in enumerate(winners):
        shape = f'x="{left + m * cell + 3}" y="{top + n * cell + 3}" width="{cell - 6}" height="{cell - 6}"'
        picture.parts.append(f'<rect {shape} stroke="{PREFIX}" {line}/>')
        picture.text(left + 5 * cell + 34, top + (n + 0.58) * cell, f"{values[n][m]:.2f}", fill=OCHRE)
    for m in range(real):
        n = max(range(len(values)), key=lambda n, m=m: values[n][m])
        shape = f'x="{left + m * cell + 8}" y="{top + n * cell + 8}" width="{cell - 16}" height="{cell - 16}"'
        picture.parts.append(f'<rect {shape} stroke="{TARGET}" {line}/>')
        picture.text(left + (m + 0.5) * cell, top + 4 * cell + 24, f"{values[n][m]:.2f}", fill=TARGET)
    rows = sum(values[n][m] for n, m in enumerate(winners)) / len(values)
    columns = sum(max(row[m] for row in values) for m in range(real)) / real
    picture.text(60, top + 2 * cell, "image\ntokens v_n", size=14)
    words = f"maximum of every row;\nmean: per_image = {rows:.3f}"
    picture.text(left + 5 * cell + 90, top + 1.8 * cell, words, anchor="start", fill=OCHRE)
    words = f"maximum of every column; mean: per_text = {columns:.3f}"
    picture.text(left, top + 4 * cell + 52, words, anchor="start", fill=TARGET)
    picture.text(left, top + 4 * cell + 80, "grey: text_mask is False, so it wins nothing", size=11, anchor="start")
    return picture


def model() -> Picture:
    """The MLIP-style model: towers, Frequency Stage, merging, and what is contrasted."""
    picture = Picture(860, 360)

    def block(x: float, y: float, width: float, words: str, fill: str, height: float = 46) -> None:
        picture.box(x, y, width, height, fill, r=5)
        lines = words.count("\n")
        picture.text(x + width / 2, y + height / 2 + 4 - lines * 7.5, words, fill="white")

    block(20, 120, 90, "image", DARK)
    block(150, 120, 110, "patch\nembedding", SOURCE)
    block(310, 60, 210, "ViT with token merging\nbetween attention and MLP", SOURCE)
    block(310, 180, 210, "Frequency Stage: spectral\nfilter and MLP, full grid", TARGET)
    block(20, 290, 90, "caption", DARK)
    block(310, 290, 210, "text transformer", TEXT)
    block(590, 40, 240, "whole image, spatial", SOURCE, 34)
    block(590, 84, 240, "tokens, spatial (weighted by size)", SOURCE, 34)
    block(590, 164, 240, "whole image, frequency", TARGET, 34)
    block(590, 208, 240, "tokens, frequency", TARGET, 34)
    block(590, 290, 240, "whole caption and its tokens", TEXT)
    picture.arrow(110, 143, 146, 143)
    picture.arrow(260, 136, 306, 90)
    picture.arrow(260, 150, 306, 200)
    picture.arrow(415, 180, 415, 110)
    picture.text(424, 150, "guides what merges", size=11, anchor="start")
    for y, y2 in ((76, 58), (90, 100), (197, 182), (210, 224)):
        picture.arrow(520, y, 586, y2)
    picture.arrow(110, 313, 306, 313)
    picture.arrow(520, 313, 586, 313)
    picture.arrow(710, 286, 710, 246)
    picture.text(720, 272, "four contrastive terms", size=11, anchor="start")
    return picture


def architecture() -> Picture:
    """The road of a call."""
    picture = Picture(900, 330)

    def block(x: float, y: float, width: float, words: str, fill: str, height: float = 48) -> None:
        picture.box(x, y, width, height, fill, r=5)
        lines = words.count("\n")
        picture.text(x + width / 2, y + height / 2 + 4 - lines * 7.5, words, fill="white")

    block(20, 60, 180, "mk.weighted_mean(...)\npublic function", DARK)
    block(20, 130, 180, "WeightedMean.apply(...)\nautograd.Function", DARK)
    block(20, 200, 180, "torch.ops.mlip_kernels\n.merging_weighted_mean", DARK)
    block(260, 95, 150, "Operator.call:\nchecks, the switch", SOURCE)
    block(470, 20, 190, "plain PyTorch\n(the definition)", GREY_BLUE)
    block(470, 150, 190, "torch's dispatcher\n(the class records)", SOURCE)
    block(720, 80, 160, "CPU: C++\ncsrc/cpu", TARGET)
    block(720, 150, 160, "CUDA: Triton\nmlip_kernels/triton", TARGET)
    block(720, 220, 160, "CUDA: C++\ncsrc/cuda", TARGET)
    block(470, 260, 190, "compute, where there\nis no kernel", GREY_BLUE)
    picture.arrow(200, 84, 256, 110)
    picture.arrow(200, 154, 256, 130)
    picture.arrow(200, 224, 466, 180)
    picture.arrow(410, 105, 466, 56)
    picture.text(400, 40, "use_reference(),\ntorch.func, tangents", size=11)
    picture.arrow(410, 130, 466, 165)
    picture.arrow(660, 165, 716, 110)
    picture.arrow(660, 174, 716, 174)
    picture.arrow(660, 185, 716, 240)
    picture.arrow(565, 198, 565, 256)
    return picture


PICTURES = {draw.__name__: draw for draw in (spectral, merging, contrastive, model, architecture)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent)
    folder = parser.parse_args().folder
    for name, draw in PICTURES.items():
        (folder / f"{name}.svg").write_text(draw().svg(), encoding="utf-8")


if __name__ == "__main__":
    main()

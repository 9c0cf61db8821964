"""Valid calls of every public operator: which arguments they take, what they compute, what is differentiated."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import mlip_kernels as mk
from robustness.draws import CHANNELS, DTYPES, LENGTHS, Draw


class Case(NamedTuple):
    """A call ``operator(**arguments)``."""

    operator: str
    arguments: dict[str, Any]
    gradients: tuple[str, ...] = ()
    """The arguments whose gradients are compared; none where the result jumps, as at ties that rounding decides."""
    call: Callable[..., Any] | None = None
    """What is called, if not the function of the package that has the operator's name."""
    definition: Callable[..., Any] | None = None
    """What is right, if not the same call on the reference."""
    per_sample: bool = True
    """Whether every sample of the result depends on the same sample of the tensors alone."""
    scale: float = 0.0
    """The largest term of a result, where terms cancel and the result alone does not tell; else 0."""
    gradient_scale: float = 0.0
    """The same of a gradient, for a gradient of 1."""


def _tokens(draw: Draw, grid: tuple[int, int] | None, dtype: torch.dtype, least: int = 1) -> tuple[Tensor, int, int]:
    """Tokens with a prefix; its length and the number of points behind it."""
    points = math.prod(grid) if grid else max(draw.choice(LENGTHS), least)
    prefix = draw.choice((0, 0, 1, 5))
    return draw.tensor(draw.batch(), prefix + points, draw.choice(CHANNELS), dtype=dtype), prefix, points


def _cancelling(draw: Draw, x: Tensor, points: int) -> float:
    """What the terms of a coefficient sum up to without their signs: equal tokens round alike, so errors add up."""
    return points * float(x.double().abs().max()) if draw.values == "equal tokens" and x.numel() else 0.0


def _spectrum(grid: tuple[int, int] | None, points: int, basis: str) -> list[int]:
    *leading, last = grid or (points,)
    return [*leading, last // 2 + 1 if basis == "rfft" else last]


def _norm(draw: Draw) -> str | None:
    return draw.choice(("ortho", "backward", "forward", None))


def _given(draw: Draw, shape: Any, like: Tensor) -> dict[str, Tensor]:
    return {"out": draw.laid_out(torch.ones(shape)).to(like.dtype).clone()} if draw.chance(0.2) else {}


def cosine(draw: Draw, name: str) -> Case:
    grid, dtype = draw.grid(), draw.choice(DTYPES)
    type = draw.choice((1, 2, 3, 4))
    if type == 1 and grid:
        grid = grid[0] + 1, grid[1] + 1
    x, prefix, points = _tokens(draw, grid, dtype, least=2)
    dim = draw.choice((1, 1, -2)) if grid or x.shape[2] == 1 else draw.choice((1, 1, 2, -1))
    options = {"type": type, "dim": dim, "grid": grid, "norm": _norm(draw), "prefix_tokens": prefix}
    arguments = {"x": x, **options, **_given(draw, x.shape, x)}
    return Case(name, arguments, ("x",), scale=_cancelling(draw, x, points))


def rfft(draw: Draw) -> Case:
    grid = draw.grid()
    x, prefix, points = _tokens(draw, grid, draw.choice(DTYPES))
    arguments = {"x": x, "grid": grid, "norm": _norm(draw), "prefix_tokens": prefix}
    return Case("rfft", arguments, ("x",), scale=_cancelling(draw, x, points))


def irfft(draw: Draw) -> Case:
    grid, dtype, n = draw.grid(), draw.choice(DTYPES), draw.choice(LENGTHS)
    shape = (draw.batch(), *_spectrum(grid, n, "rfft"), draw.choice(CHANNELS))
    real, imaginary = draw.tensor(*shape, dtype=dtype), draw.tensor(*shape, dtype=dtype)
    arguments = {"real": real, "imag": imaginary, "n": None if grid else n, "grid": grid, "norm": _norm(draw)}
    return Case("irfft", arguments, ("real", "imag"))


def spectral_filter(draw: Draw) -> Case:
    grid, basis, dtype = draw.grid(), draw.choice(("rfft", "dct")), draw.choice(DTYPES)
    x, prefix, points = _tokens(draw, grid, dtype)
    shape = [*_spectrum(grid, points, basis), x.shape[2], *([2] if basis == "rfft" else [])]
    weight = torch.randn(shape, generator=draw.generator).to(draw.choice((torch.float32, dtype)))
    options = {"grid": grid, "basis": basis, "prefix_tokens": prefix}
    arguments = {"x": x, "weight": draw.laid_out(weight), **options, **_given(draw, x.shape, x)}
    return Case("spectral_filter", arguments, ("x", "weight"))


def band_energy(draw: Draw) -> Case:
    grid, basis = draw.grid(), draw.choice(("rfft", "dct"))
    x, prefix, points = _tokens(draw, grid, draw.choice(DTYPES))
    bands: int | Tensor = draw.random.randint(1, 6)
    if draw.chance(0.5):
        shape = _spectrum(grid, points, basis)
        bands = torch.randint(0, 4, shape, generator=draw.generator, dtype=draw.choice((torch.int64, torch.uint8)))
    return Case("band_energy", {"x": x, "bands": bands, "grid": grid, "basis": basis, "prefix_tokens": prefix}, ("x",))


def token_energy(draw: Draw) -> Case:
    grid, basis = draw.grid(), draw.choice(("rfft", "dct"))
    x, prefix, points = _tokens(draw, grid, draw.choice(DTYPES))
    terms = _cancelling(draw, x, points)
    noise = terms**2 * x.shape[2] * torch.finfo(torch.float32).eps  # the square of what rounding leaves
    options = {"cutoff": draw.choice((0, 0.25, 0.5, 1.0, 0.3)), "grid": grid, "basis": basis, "prefix_tokens": prefix}
    return Case("token_energy", {"x": x, **options}, ("x",), scale=noise, gradient_scale=2 * terms)


def amplitude(draw: Draw) -> Case:
    """The amplitude alone: the phase of a coefficient that is rounding noise is noise."""
    grid = draw.grid()
    x, prefix, _ = _tokens(draw, grid, draw.choice(DTYPES))
    smooth = ("x",) if draw.values == "normal" else ()
    arguments = {"x": x, "grid": grid, "eps": draw.choice((0, 1e-6)), "prefix_tokens": prefix}
    return Case("amplitude_phase", arguments, smooth, call=lambda **given: mk.amplitude_phase(**given)[0])


def spectral_resize(draw: Draw) -> Case:
    grid = draw.grid() or (1, draw.choice(LENGTHS))
    x, prefix, _ = _tokens(draw, grid, draw.choice(DTYPES))
    new = (draw.random.randint(1, 9), draw.random.randint(1, 9))
    options = {"grid": grid, "new_grid": new, "rescale": draw.chance(0.5), "prefix_tokens": prefix}
    shape = (x.shape[0], prefix + math.prod(new), x.shape[2])
    return Case("spectral_resize", {"x": x, **options, **_given(draw, shape, x)}, ("x",))


def _merging(draw: Draw) -> dict[str, Any]:
    batch, tokens = draw.batch(), draw.choice(LENGTHS)
    metric = draw.tensor(batch, tokens, draw.choice(CHANNELS), dtype=draw.choice(DTYPES))
    if batch and draw.chance(0.2):
        metric = metric.clone()
        metric[draw.random.randrange(batch), draw.random.randrange(tokens), 0] = draw.choice((math.nan, math.inf))
    arguments: dict[str, Any] = {"metric": metric, "r": draw.random.randint(0, tokens)}
    arguments["prefix_tokens"] = min(tokens, draw.choice((0, 1, 1, 2)))
    if draw.chance(0.4):
        guide = torch.rand(batch, tokens, generator=draw.generator).to(draw.choice(DTYPES))
        if guide.numel() and draw.chance(0.3):
            guide[0, 0] = draw.choice((math.nan, math.inf, -math.inf))
        arguments |= {"guide": draw.laid_out(guide), "guide_weight": draw.choice((0, 1.0, -2.5))}
    if draw.chance(0.4):
        arguments["mask"] = draw.mask(batch, tokens)
    if draw.chance(0.2):
        arguments["max_merges"] = draw.choice((1, 2))
    if draw.chance(0.5):
        size = torch.randint(0, 4, (batch, tokens), generator=draw.generator)
        arguments["size"] = draw.laid_out(size.to(draw.choice((torch.float32, torch.int64, torch.float64))))
    return arguments


def _maps(plan: mk.MergePlan) -> list[Tensor]:
    maps = (plan.assignment, plan.kept, plan.removed, plan.mask, plan.dropped)
    return [each for each in maps if each is not None]


def merge_plan(draw: Draw) -> Case:
    """The pairs, to the last tie, and the plan of two plans."""
    arguments = _merging(draw)

    def call(**given: Any) -> list[Tensor]:
        plan = mk.merge_plan(**given)
        size = plan.merge(given["metric"])[1]
        merged = torch.arange(plan.merged_tokens, dtype=torch.float32)[:, None].expand(len(size), -1, 1)
        following = mk.merge_plan(merged, 1, prefix_tokens=0, mask=plan.mask)
        return [*_maps(plan), size, *_maps(plan.then(following)), following.track(plan.track())]

    return Case("merge_plan", arguments, call=call)


def merge(draw: Draw) -> Case:
    """Means and copies by a plan that the kernels made, as the pairs of a float64 metric may differ."""
    planning = _merging(draw)
    with mk.use_reference():
        plan = mk.merge_plan(
            **{**planning, "mask": None, **({"mask": planning["mask"] != 0} if "mask" in planning else {})}
        )
    batch, tokens = planning["metric"].shape[:2]
    x = draw.tensor(batch, tokens, draw.choice(CHANNELS), dtype=draw.choice(DTYPES))

    def call(x: Tensor, size: Tensor | None = None) -> list[Tensor]:
        merged, merged_size = plan.merge(x, size)
        return [merged, merged_size, plan.unmerge(merged)]

    return Case("merge", {"x": x, "size": planning.get("size")}, ("x",), call=call)


def weighted_mean(draw: Draw) -> Case:
    x, prefix, _ = _tokens(draw, None, draw.choice(DTYPES))
    weight = None
    if draw.chance(0.7):
        weight = torch.rand(x.shape[:2], generator=draw.generator)
        weight[torch.rand(x.shape[:2], generator=draw.generator) < 0.3] = 0
        if x.shape[0] and draw.chance(0.3):
            weight[0] = 0
        if draw.chance(0.3):
            x = x.clone()
            x[weight == 0] = draw.choice((math.nan, math.inf, 1.0))
        weight = draw.laid_out(weight.to(draw.choice(DTYPES)))
    learned = ("x",) if weight is None or not x.isfinite().all() else ("x", "weight")
    # Tokens and their mean cancel in the gradient of the weight, which is divided by the sum of weights.
    largest = float(x.double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 0.0
    totals = x.new_ones(1) if weight is None else weight.double()[:, prefix:].sum(1)
    least = float(totals[totals > 0].min()) if bool((totals > 0).any()) else 1.0
    scale = largest * x.shape[2] / least
    return Case("weighted_mean", {"x": x, "weight": weight, "prefix_tokens": prefix}, learned, gradient_scale=scale)


def proportional_attention(draw: Draw) -> Case:
    batch, heads, queries, keys = draw.batch(), draw.choice((1, 3)), draw.choice(LENGTHS), draw.choice(LENGTHS)
    width, dtype = draw.choice((1, 4, 7, 16)), draw.choice(DTYPES)
    draw.values = draw.choice(("normal", "zeros", "tiny"))
    q, k, v = (draw.tensor(batch, heads, n, width, dtype=dtype) for n in (queries, keys, keys))
    size = None
    if draw.chance(0.8):
        size = torch.randint(0, 4, (batch, keys), generator=draw.generator).to(draw.choice((dtype, torch.int64)))

    def definition(q: Tensor, k: Tensor, v: Tensor, size: Tensor | None, scale: float | None) -> Tensor:
        counts = torch.ones_like(k[:, 0, :, 0]) if size is None else size.to(q.dtype)
        scores = q @ k.mT * (width**-0.5 if scale is None else scale)
        scores = scores + counts.log()[:, None, None]
        empty = (counts == 0).all(1)[:, None, None, None]
        return torch.where(empty, 0.0, scores.masked_fill(empty, 0).softmax(-1) @ v)

    arguments = {"q": q, "k": k, "v": v, "size": size, "scale": draw.choice((None, 0.5))}
    # The products of gradient and values cancel with their mean in the gradient of q and k.
    scale = width * max((float(part.double().abs().max()) for part in (q, k, v) if part.numel()), default=0.0) ** 2
    return Case("proportional_attention", arguments, ("q", "k", "v"), definition=definition, gradient_scale=scale)


def token_logits(draw: Draw) -> Case:
    dtype, width = draw.choice(DTYPES), draw.choice(CHANNELS)
    sides = (draw.batch(), draw.choice(LENGTHS)), (draw.batch(), draw.choice(LENGTHS))
    images, texts = (draw.tensor(*side, width, dtype=dtype) for side in sides)
    arguments: dict[str, Any] = {"image_tokens": images, "text_tokens": texts}
    learned = ["image_tokens", "text_tokens"]
    for name, side in zip(("image", "text"), sides, strict=True):
        if draw.chance(0.4):
            arguments[f"{name}_mask"] = draw.mask(*side)
        if draw.chance(0.4):
            weight = torch.randint(0, 4, side, generator=draw.generator).to(draw.choice((torch.float32, dtype)))
            arguments[f"{name}_weight"] = draw.laid_out(weight)
            learned.append(f"{name}_weight")
    arguments["scale"] = draw.choice((1.0, 2, torch.tensor(0.5), torch.tensor([14.0])))
    arguments["bias"] = draw.choice((None, -1.5, torch.tensor(0.25)))
    if isinstance(arguments["scale"], Tensor):
        learned.append("scale")
    # Sums of small integers are exact in any order, so ties are the same everywhere; others are decided by rounding.
    smooth = draw.values in ("normal", "integers")
    largest = [1 + float(side.double().abs().max()) if side.numel() else 1.0 for side in (images, texts)]
    similarity = width * math.prod(largest)  # those of either sign cancel in means and in the gradient of scale
    return Case(
        "token_logits",
        arguments,
        tuple(learned) if smooth else (),
        per_sample=False,
        scale=similarity * float(arguments["scale"]),
        gradient_scale=similarity,
    )


def pair_cross_entropy(draw: Draw) -> Case:
    rows = draw.choice(LENGTHS)
    directions = draw.choice(("both", "rows"))
    columns = rows if directions == "both" else rows + draw.choice((0, 1, 7))
    draw.values = draw.choice(("normal", "integers", "zeros", "tiny", "mixed scales"))
    logits = draw.tensor(rows, columns, dtype=draw.choice(DTYPES))
    labels = torch.randint(0, columns, (rows,), generator=draw.generator) if draw.chance(0.5) else None
    smoothing = draw.choice((0, 0.1, 1.0))
    arguments = {"logits": logits, "labels": labels, "directions": directions, "label_smoothing": smoothing}
    arguments["reduction"] = draw.choice(("mean", "sum"))

    def definition(logits: Tensor, labels: Tensor | None, directions: str, label_smoothing: float, reduction: str):
        labels = torch.arange(len(logits)) if labels is None else labels
        options = {"label_smoothing": label_smoothing, "reduction": reduction}
        loss = F.cross_entropy(logits.double(), labels, **options)
        if directions == "both":
            loss = (loss + F.cross_entropy(logits.double().t(), labels, **options)) / 2
        return loss.to(logits.dtype)

    # Logits cancel with the logarithms of sums in every term, probabilities with targets in the gradient.
    term = float(logits.double().abs().max()) + math.log(columns) + 1
    return Case(
        "pair_cross_entropy",
        arguments,
        ("logits",),
        definition=definition,
        per_sample=False,
        scale=term * (rows if arguments["reduction"] == "sum" else 1),
        gradient_scale=1.0,
    )


OPERATORS: dict[str, Callable[[Draw], Case]] = {
    "dct": lambda draw: cosine(draw, "dct"),
    "idct": lambda draw: cosine(draw, "idct"),
    "rfft": rfft,
    "irfft": irfft,
    "spectral_filter": spectral_filter,
    "band_energy": band_energy,
    "token_energy": token_energy,
    "amplitude_phase": amplitude,
    "spectral_resize": spectral_resize,
    "merge_plan": merge_plan,
    "merge": merge,
    "weighted_mean": weighted_mean,
    "proportional_attention": proportional_attention,
    "token_logits": token_logits,
    "pair_cross_entropy": pair_cross_entropy,
}

"""Draw docs/figures/speedups.svg: how many times as fast the operators are as PyTorch and as torch.compile.

    pytest benchmarks/ --benchmark-only --benchmark-json=run.json
    python benchmarks/draw_speedups.py run.json    # takes the figures of that run
    python benchmarks/draw_speedups.py             # draws the figures that are there, docs/figures/speedups.json

A run on a machine that does other work at the same time is worth little: take one from a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
COLOURS = {"PyTorch": "#7a8ba6", "torch.compile": "#2f6f9f", "unpatched model": "#4f8f5b"}


class Row(NamedTuple):
    """A bar or two of the plot, and where its ratios stand in a file of pytest-benchmark."""

    label: str
    group: str
    """A regular expression for the whole group of the benchmark."""
    ratios: dict[str, str]
    """What is compared -> its key in ``extra_info``."""


BOTH = r", forward \+ backward"
ROWS = (
    Row(
        "dct, 14 × 14 patches",
        rf"dct 14x14 float32{BOTH}, tuned allocator",
        {"PyTorch": "two matmuls / ours", "torch.compile": "compiled reference / ours"},
    ),
    Row(
        "spectral_filter, 14 × 14 patches",
        rf"spectral_filter 14x14 float32{BOTH}, tuned allocator",
        {"PyTorch": "torch.fft / ours", "torch.compile": "compiled reference / ours"},
    ),
    Row(
        "merge_tokens, 197 tokens, r = 16",
        rf"merge_tokens \[64, 197, 768\] r=16 metric 64{BOTH}, tuned malloc",
        {"PyTorch": "plain PyTorch / ours", "torch.compile": "compiled plain PyTorch / ours"},
    ),
    Row(
        "weighted_mean, float32",
        rf"weighted_mean \[64, 197, 384\] float32{BOTH}",
        {"PyTorch": "plain PyTorch / ours", "torch.compile": "compiled reference / ours"},
    ),
    Row(
        "token_logits, 49 × 77 tokens",
        rf"token_logits 64x64, 77 tokens of 512, float32{BOTH}",
        {"PyTorch": "written in PyTorch / ours", "torch.compile": "compiled / ours"},
    ),
    Row(
        "pair_cross_entropy, 1,024 pairs",
        rf"pair_cross_entropy 1024x1024, float32{BOTH}",
        {"PyTorch": "two cross-entropies / ours", "torch.compile": "compiled / ours"},
    ),
    Row(
        "ViT-S/16, r = 13, training step",
        r"timm's ViT-S/16 with r=13, training step, 16 images",
        {"unpatched model": "unpatched / ours"},
    ),
    Row(
        "ViT-S/16, r = 13, inference",
        r"timm's ViT-S/16 with r=13, inference, 16 images",
        {"unpatched model": "unpatched / ours"},
    ),
)


def figures_of(run: dict[str, Any]) -> dict[str, Any]:
    """What the plot shows of a file of pytest-benchmark, and the machine it is from.

    Raises:
        ValueError: no benchmark of the run belongs to a row of the plot.
    """
    rows = []
    for row in ROWS:
        found = [one for one in run["benchmarks"] if re.fullmatch(row.group, one["group"])]
        if not found:
            print(f"not in this run, so left out: {row.label}")
            continue
        notes = found[-1]["extra_info"]
        rows.append({"label": row.label, "ratios": {name: notes[key] for name, key in row.ratios.items()}})
    if not rows:
        raise ValueError("run: expected a file of `pytest benchmarks/ --benchmark-json`, got none of its benchmarks")
    machine = run["machine_info"]["mlip_kernels"]
    return {
        "machine": f"{machine['processor']}, {machine['cpu_capability']}",
        "gpu": machine["gpu"],
        "versions": f"PyTorch {machine['torch']}, mlip_kernels {machine['package'].partition(' ')[0]}",
        "measured": run["datetime"][:10],
        "rows": rows,
    }


def draw(figures: dict[str, Any], path: Path) -> None:
    """Horizontal bars, one colour for each thing compared with, and the ratio at the end of each bar."""
    import matplotlib

    matplotlib.use("svg")
    style = {"svg.fonttype": "none", "svg.hashsalt": "mlip_kernels", "font.size": 9, "savefig.facecolor": "white"}
    matplotlib.rcParams.update(style)
    from matplotlib import pyplot

    bars = [(row["label"], name, ratio) for row in figures["rows"] for name, ratio in row["ratios"].items()]
    figure, axes = pyplot.subplots(figsize=(7.5, 0.27 * len(bars) + 1.2), layout="constrained")
    places: dict[str, list[float]] = {}
    place, named = 0.0, set()
    for label, name, ratio in bars:
        place += 1.0 if label in places else 1.5
        places.setdefault(label, []).append(place)
        axes.barh(place, ratio, 0.9, color=COLOURS[name], label=None if name in named else name)
        axes.text(ratio, place, f" {ratio:.3g}", va="center")
        named.add(name)
    axes.set_yticks([sum(rows) / len(rows) for rows in places.values()], list(places))
    axes.axvline(1, color="black", linewidth=0.8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(ratio for _, _, ratio in bars))
    conditions = f"{figures['machine']}\n{figures['versions']}, {figures['measured']}"
    axes.set_xlabel(f"times as fast; operators: forward and backward, an allocator that keeps pages\n{conditions}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="compared with", frameon=False, loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a file of pytest --benchmark-json")
    parser.add_argument("--folder", type=Path, default=FIGURES, help="where speedups.json and speedups.svg are")
    given = parser.parse_args(arguments)
    record = given.folder / "speedups.json"
    if given.run:
        figures = figures_of(json.loads(given.run.read_text(encoding="utf-8")))
        record.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    draw(json.loads(record.read_text(encoding="utf-8")), given.folder / "speedups.svg")


if __name__ == "__main__":
    main()

"""What the results say: a page to read, and the backend that each operator would choose."""

from __future__ import annotations

from collections import Counter
from typing import Any

BACKENDS = ("triton", "cuda")
CLEARLY = 1.1
"""How many times as fast a backend has to be for another choice than the first."""


def choices(results: list[dict[str, Any]]) -> dict[str, dict[str, str]]:
    """``{operator: {dtype: "triton" | "cuda" | "eager"}}`` by the slower of device and host, forward and backward.

    A backend with a wrong or failed result of an operator is not chosen for it; where none is left, eager PyTorch is.
    """
    wrong = {
        (r["phase"].partition("-")[2], r["name"].partition(",")[0])
        for r in results
        if r["phase"].startswith(("correctness-", "capture-")) and "error" in r
    }
    seconds: dict[tuple[str, str], dict[str, float]] = {}
    for r in results:
        if not r["phase"].startswith("times-") or "kernels" not in r:
            continue
        backend, key = r["phase"].partition("-")[2], (r["operator"], r["dtype"])
        found = seconds.setdefault(key, {})
        found["eager"] = found.get("eager", 0.0) + _cost(r.get("eager")) / len(BACKENDS)
        if (backend, r["operator"]) not in wrong:
            found[backend] = found.get(backend, 0.0) + _cost(r["kernels"])
    chosen: dict[str, dict[str, str]] = {}
    for (operator, dtype), found in sorted(seconds.items()):
        best = next(name for name in (*BACKENDS, "eager") if name in found)
        for name in found:
            if found[name] * CLEARLY < found[best]:
                best = name
        chosen.setdefault(operator, {})[dtype] = best
    return chosen


def _cost(times: dict[str, float] | None) -> float:
    return 0.0 if times is None else max(times["device"], times["host"])


def page(results: list[dict[str, Any]], phases: dict[str, str]) -> str:
    """Markdown: how each phase ended, what failed, and times."""
    lines = ["# gpu-check", ""]
    environment = next((r for r in results if r["name"] == "environment" and "report" in r), None)
    lines += [environment["report"], ""] if environment else []
    lines += ["| phase | ended | cases | errors |", "|---|---|---|---|"]
    counts, errors = Counter(r["phase"] for r in results), Counter(r["phase"] for r in results if "error" in r)
    lines += [f"| {name} | {end} | {counts[name]} | {errors[name]} |" for name, end in phases.items()]
    failed = [r for r in results if "error" in r]
    if failed:
        lines += ["", "## Errors", "", *(f"* `{r['phase']}` {r['name']}: {r['error']}" for r in failed)]
    lines += ["", "## Ceilings and models", "", "| | |", "|---|---|"]
    for r in results:
        if r["phase"] == "machine" and (rate := r.get("bytes/s") or r.get("flop/s")):
            lines.append(f"| {r['name']} | {rate / 1e12:.3g} {'TB/s' if 'bytes/s' in r else 'TFLOP/s'} |")
        if r["phase"] == "models" and "device" in r:
            lines.append(f"| {r['name']} | {1e3 * max(r['device'], r['host']):.3g} ms |")
    lines += ["", "## Operators", "", "| operator | backend | ms | host ms | eager / this | compiled / this | TB/s |"]
    lines += ["|---|---|---|---|---|---|---|"]
    compiled = {r["name"]: _cost(r["compiled"]) for r in results if "compiled" in r}
    for r in results:
        if "kernels" not in r:
            continue
        cost, other = _cost(r["kernels"]), compiled.get(r["name"])
        cells = [r["name"], r["phase"].partition("-")[2], f"{1e3 * r['kernels']['device']:.3g}"]
        cells += [f"{1e3 * r['kernels']['host']:.3g}", f"{_cost(r.get('eager')) / cost:.3g}"]
        cells += [
            "" if other is None else f"{other / cost:.3g}",
            f"{r['bytes/s'] / 1e12:.3g}" if "bytes/s" in r else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"

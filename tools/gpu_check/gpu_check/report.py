"""What the results say: a page to read, and the backend that each operator would choose."""

from __future__ import annotations

from collections import Counter
from typing import Any

from mlip_kernels import _cuda_choices

BACKENDS = ("triton", "cuda")
CLEARLY = 1.1
"""How many times as fast another choice has to be for the choice to change."""


def choices(results: list[dict[str, Any]], table: _cuda_choices.Table, date: str) -> dict[str, dict[str, Any]]:
    """``table`` with the rows of the operators that were timed, by the slower of device and host.

    A registered operator costs what the calls cost that run it; one that only gradients run, what these add. A backend
    with a wrong or failed result is not chosen; where none is left, plain PyTorch is. What was not timed in float16 is
    as in bfloat16.
    """
    costs = _costs(results)
    chosen = {arch: dict(rows) for arch, rows in table.items()}
    for arch, operator in dict.fromkeys((arch, operator) for arch, operator, _ in costs):
        was = _cuda_choices.row(operator, int(arch.removeprefix("sm_")), table) or {}
        row = {}
        for dtype in ("bfloat16", "float32", "float16"):
            timed = costs.get((arch, operator, dtype))
            alike = row.get("bfloat16") if dtype == "float16" else None
            best = _best(timed, was.get(dtype)) if timed else alike or was.get(dtype)
            row |= {dtype: best} if best else {}
        if set(row) == set(_cuda_choices.DTYPES):
            ordered = {dtype: row[dtype] for dtype in _cuda_choices.DTYPES}
            chosen.setdefault(arch, {})[operator] = {**ordered, "basis": "measured", "date": date}
    return chosen


def _best(costs: dict[str, float], was: str | None) -> str:
    best = min(costs, key=costs.__getitem__)
    return was if was in costs and costs[was] <= CLEARLY * costs[best] else best


def _costs(results: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, float]]:
    """Architecture, registered operator, dtype -> choice -> seconds."""
    wrong = {
        (r["phase"].partition("-")[2], r["name"].partition(",")[0])
        for r in results
        if r["phase"].startswith(("correctness-", "capture-")) and "error" in r
    }
    timed = [r for r in results if r["phase"].startswith("times-") and "kernels" in r and r["arch"].startswith("sm_")]
    forward = {(r["phase"], r["workload"], r["dtype"]): r for r in timed if r["direction"] == "forward"}
    costs: dict[tuple[str, str, str], dict[str, float]] = {}
    for r in timed:
        backend, before = r["phase"].partition("-")[2], forward.get((r["phase"], r["workload"], r["dtype"]))
        less = before if r is not before else None
        primitives = set(r["primitives"]) - set(less["primitives"] if less else ())
        for operator in primitives:
            found = costs.setdefault((r["arch"], operator, r["dtype"]), {})
            taken = {"plain": "eager"} if (backend, r["operator"]) in wrong else {"plain": "eager", backend: "kernels"}
            for choice, times in taken.items():
                seconds = max(0.0, _cost(r.get(times)) - _cost(less.get(times) if less else None))
                share = 1 / len(BACKENDS) if choice == "plain" else 1  # timed beside either backend
                found[choice] = found.get(choice, 0.0) + seconds * share
    return costs


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

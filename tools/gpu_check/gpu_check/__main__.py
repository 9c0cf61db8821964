"""Runs the phases, each in a process with a deadline, and writes the report: ``python -m gpu_check --help``."""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import subprocess
import sys
from pathlib import Path

import torch

from gpu_check import record, report
from mlip_kernels import _cuda_choices
from mlip_kernels._variables import read

PHASES = {
    "machine": 40,
    "correctness-triton": 90,
    "correctness-cuda": 90,
    "capture-triton": 45,
    "capture-cuda": 45,
    "times-triton": 60,
    "times-cuda": 60,
    "compiled": 90,
    "models": 90,
}
"""Seconds that each may take."""
MODULES = {"compiled": "times"}


def main() -> int:
    """Run what was asked for; 1 if a case failed or a phase did not end by itself."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), help="folder of the results")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    parser.add_argument("--only", help="cases whose name has this in it")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = arguments.output / "results.jsonl"
    if arguments.phase is not None:
        _run(arguments.phase, record.Recorder(results, arguments.phase), torch.device(arguments.device), arguments.only)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: no GPU that PyTorch can use; --device cpu tries the script without one", file=sys.stderr)
        return 2
    results.unlink(missing_ok=True)
    ended = {phase: _process(phase, arguments) for phase in arguments.phases}
    found = record.read(results)
    choices = report.choices(found, _cuda_choices.load(), datetime.date.today().isoformat())
    (arguments.output / _cuda_choices.PATH.name).write_text(_cuda_choices.text(choices), encoding="utf-8")
    page = report.page(found, ended)
    (arguments.output / "report.md").write_text(page, encoding="utf-8")
    print(page)
    return int(any(end != "well" for end in ended.values()) or any("error" in result for result in found))


def _process(phase: str, arguments: argparse.Namespace) -> str:
    """Run a phase in a process of its own; how it ended."""
    backend = phase.partition("-")[2]
    environment = {**os.environ, **({"MLIP_KERNELS_CUDA_BACKEND": backend} if backend else {})}
    command = [sys.executable, "-m", "gpu_check", "--phase", phase, "--device", arguments.device]
    command += ["--output", str(arguments.output), *(["--only", arguments.only] if arguments.only else [])]
    try:
        done = subprocess.run(command, env=environment, timeout=PHASES[phase], check=False)
    except subprocess.TimeoutExpired:
        return f"after its {PHASES[phase]} seconds"
    return "well" if done.returncode == 0 else f"with exit code {done.returncode}"


def _run(phase: str, recorder: record.Recorder, device: torch.device, only: str | None) -> None:
    kind, _, backend = phase.partition("-")
    if backend and read("MLIP_KERNELS_CUDA_BACKEND") != backend:
        raise SystemExit(f"{phase}: expected MLIP_KERNELS_CUDA_BACKEND={backend}")
    module = importlib.import_module(f"gpu_check.{MODULES.get(kind, kind)}")  # only what this phase needs
    if kind == "compiled":
        module.run_compiled(recorder, device, only)
    elif kind in ("machine", "models"):
        module.run(recorder, device)
    else:
        module.run(recorder, device, only)


if __name__ == "__main__":
    raise SystemExit(main())
